"""Which of a network's activations a layer has is known at run time only: these choose."""

from __future__ import annotations

import triton
import triton.language as tl

from . import pointwise
from .products import row_tile


@triton.constexpr_function
def _chain(ACTIVATIONS, i):
    return ACTIVATIONS[i]


@triton.constexpr_function
def _count(x):
    return len(x)


@triton.jit
def activate(z, is_feature, which, ACTIVATIONS: tl.constexpr):
    """f(Z) of a tile; 0 in the columns behind the features, where Z is 0."""
    y = z
    for i in tl.static_range(_count(ACTIVATIONS)):
        if _count(_chain(ACTIVATIONS, i)) > 0:
            if which == i:
                y = pointwise.value(z, _chain(ACTIVATIONS, i))
                if pointwise.moves_zero(_chain(ACTIVATIONS, i)):
                    y = tl.where(is_feature[None, :], y, 0.0)
    return y


@triton.jit
def slopes(y, z, rows, n, columns, stride, which, ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr):
    """f'(Z) and f''(Z) of a tile."""
    slope = tl.full([rows.shape[0], columns.shape[0]], 1.0, tl.float32)
    curve = slope * 0.0
    for i in tl.static_range(_count(ACTIVATIONS)):
        if _count(_chain(ACTIVATIONS, i)) > 0:
            if which == i:
                if pointwise.keeps_input(_chain(ACTIVATIONS, i)):
                    kept = row_tile(z, rows, n, columns, stride)
                else:
                    kept = row_tile(y, rows, n, columns, stride)
                slope = pointwise.slope(kept, _chain(ACTIVATIONS, i))
                if CURVED:
                    if pointwise.is_curved(_chain(ACTIVATIONS, i)):
                        curve = pointwise.curve(kept, _chain(ACTIVATIONS, i))
    return slope, curve
