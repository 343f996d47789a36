"""The loss of a task's rows in the fused meta-step: value, cotangent and its tangent."""

from __future__ import annotations

import triton
import triton.language as tl

from . import losses
from .activations import slopes
from .products import put_row_tile, row_tile
from .table import place


@triton.jit
def _targets(
    targets, first_row, rows, n, columns, C, LOSS: tl.constexpr
):  # [ROWS, ALL_ROWS, CLASSES], or classes [ROWS, ALL_ROWS, 1]
    if LOSS == "cross_entropy":
        found = tl.load(targets + first_row + rows, mask=rows < n, other=0)[:, None]
    else:
        mask = (rows < n)[:, None] & (columns < C)[None, :]
        at = targets + (first_row + rows)[:, None] * C + columns[None, :]
        found = tl.load(at, mask=mask, other=0.0)
    return found


@triton.jit
def loss_pass(
    layer, targets, first_row, y, d, z, dy, n, C, scale,
    LOSS: tl.constexpr, ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The loss of the rows; D of the last layer."""
    stride, out, which = place(layer + 4), place(layer + 8), tl.load(layer + 9)
    columns = tl.arange(0, CLASSES)
    sums = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & (columns < C)[None, :]
        prediction = row_tile(y + out, rows, n, columns, stride)
        target = _targets(targets, first_row, rows, n, columns, C, LOSS)
        sums += losses.row_losses(prediction, target, mask, LOSS)
        cotangent = losses.cotangent(prediction, target, mask, LOSS) * scale
        slope, _ = slopes(y + out, z + out, rows, n, columns, stride, which, ACTIVATIONS, False)
        put_row_tile(d + out, rows, n, columns, stride, slope * cotangent)
        if CURVED:
            put_row_tile(dy + out, rows, n, columns, stride, cotangent)
    tl.debug_barrier()
    return tl.sum(sums, 0) * scale


@triton.jit
def put_outputs(
    layer, y, outputs, n, C, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, CLASSES: tl.constexpr
):
    """Predictions [n, C], rows without gaps."""
    stride, out = place(layer + 4), place(layer + 8)
    columns = tl.arange(0, CLASSES)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & (columns < C)[None, :]
        value = row_tile(y + out, rows, n, columns, stride)
        tl.store(outputs + rows[:, None] * C + columns[None, :], value, mask=mask)


@triton.jit
def loss_tangent(
    layer, targets, first_row, y, z, dy, t_y, t_z, t_d, n, C, scale,
    LOSS: tl.constexpr, ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """t_D of the last layer: f' t_dY + f'' t_Z dY with t_dY = L'' t_Y."""
    stride, out, which = place(layer + 4), place(layer + 8), tl.load(layer + 9)
    columns = tl.arange(0, CLASSES)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & (columns < C)[None, :]
        prediction = row_tile(y + out, rows, n, columns, stride)
        target = _targets(targets, first_row, rows, n, columns, C, LOSS)
        t_prediction = row_tile(t_y + out, rows, n, columns, stride)
        found = losses.tangent(prediction, target, t_prediction, mask, LOSS) * scale
        slope, curve = slopes(
            y + out, z + out, rows, n, columns, stride, which, ACTIVATIONS, CURVED
        )
        found = slope * found
        if CURVED:
            found += (
                curve * row_tile(t_z + out, rows, n, columns, stride)
                * row_tile(dy + out, rows, n, columns, stride)
            )  # fmt: skip
        put_row_tile(t_d + out, rows, n, columns, stride, found)
    tl.debug_barrier()
