"""A linear layer of the fused meta-step and the activation behind it: what rows pass through.

W and b, theta_k of the task, and their adjoint Lam are dense. What a routine stored, other threads
read in the next: each ends with a barrier. Dimensions: see fused.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, slopes
from .products import fold, put_row_tile, row_tile, times
from .table import FIELDS, place, shape


@triton.jit
def forward(
    layer, is_first, weights, x, y, z, n,
    ACTIVATIONS: tl.constexpr, KEEPS_Z: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = A W^T + b, Y = f(Z)"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w, b = weights + place(layer + 5), weights + place(layer + 6)
    out, which = place(layer + 8), tl.load(layer + 9)
    a = tl.where(is_first, x, y + place(layer + 7))
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        if O == 1:
            columns = tl.arange(0, 16)
            acc = tl.load(b + columns)[None, :] + fold(a, in_stride, rows, n, w, I, INNER)
            _put_forward(
                acc, rows, n, columns, O, y + out, z + out, out_stride, which,
                ACTIVATIONS, KEEPS_Z,
            )  # fmt: skip
        else:
            for first_column in tl.range(
                0, OUTER if ALL_OUTER else out_stride, OUTER, num_stages=1
            ):
                columns = first_column + tl.arange(0, OUTER)
                bias = tl.load(b + columns, mask=columns < out_stride, other=0.0)
                acc = times(
                    tl.zeros([ROWS, OUTER], tl.float32) + bias[None, :], a, in_stride, rows, n,
                    w, w_stride, I, O, columns, True, INNER, PRECISION,
                )  # fmt: skip
                _put_forward(
                    acc, rows, n, columns, O, y + out, z + out, out_stride, which,
                    ACTIVATIONS, KEEPS_Z,
                )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _put_forward(
    acc, rows, n, columns, O, y, z, stride, which,
    ACTIVATIONS: tl.constexpr, KEEPS_Z: tl.constexpr,
):  # fmt: skip
    if KEEPS_Z:
        put_row_tile(z, rows, n, columns, stride, acc)
    put_row_tile(y, rows, n, columns, stride, activate(acc, columns < O, which, ACTIVATIONS))


@triton.jit
def backward(
    layer, weights, y, d, z, dy, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY = D W of the layer below, and its D = f'(Z) dY."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w, below, out = weights + place(layer + 5), place(layer + 7), place(layer + 8)
    which = tl.load(layer - FIELDS + 9)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        if I == 1:
            acc = fold(d + out, out_stride, rows, n, w, O, INNER)
            _put_backward(
                acc, rows, n, tl.arange(0, 16), y + below, d + below, z + below, dy + below,
                in_stride, which, ACTIVATIONS, CURVED,
            )  # fmt: skip
        else:
            for first_column in tl.range(0, OUTER if ALL_OUTER else in_stride, OUTER, num_stages=1):
                columns = first_column + tl.arange(0, OUTER)
                acc = times(
                    tl.zeros([ROWS, OUTER], tl.float32), d + out, out_stride, rows, n,
                    w, w_stride, I, O, columns, False, INNER, PRECISION,
                )  # fmt: skip
                _put_backward(
                    acc, rows, n, columns, y + below, d + below, z + below, dy + below,
                    in_stride, which, ACTIVATIONS, CURVED,
                )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _put_backward(
    acc, rows, n, columns, y, d, z, dy, stride, which,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
):  # fmt: skip
    if CURVED:
        put_row_tile(dy, rows, n, columns, stride, acc)
    slope, _ = slopes(y, z, rows, n, columns, stride, which, ACTIVATIONS, False)
    put_row_tile(d, rows, n, columns, stride, slope * acc)


@triton.jit
def tangent(
    layer, is_first, rate, weights, lam, x, y, z, t_y, t_z, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t_Z = t_A W^T + eta (A Lam^T + lam_b), t_Y = f'(Z) t_Z"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, below, out = place(layer + 5), place(layer + 7), place(layer + 8)
    w, lam_w, lam_b = weights + w_at, lam + w_at, lam + place(layer + 6)
    which = tl.load(layer + 9)
    eta_w, eta_b = tl.load(rate), tl.load(rate + 1)
    a = tl.where(is_first, x, y + below)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        if O == 1:
            acc = fold(a, in_stride, rows, n, lam_w, I, INNER)
            acc = eta_w * acc + (eta_b * tl.load(lam_b + tl.arange(0, 16)))[None, :]
            if not is_first:
                acc += fold(t_y + below, in_stride, rows, n, w, I, INNER)
            _put_tangent(
                acc, rows, n, tl.arange(0, 16), y + out, z + out, t_y + out, t_z + out,
                out_stride, which, ACTIVATIONS, CURVED,
            )  # fmt: skip
        else:
            for first_column in tl.range(
                0, OUTER if ALL_OUTER else out_stride, OUTER, num_stages=1
            ):
                columns = first_column + tl.arange(0, OUTER)
                acc = times(
                    tl.zeros([ROWS, OUTER], tl.float32), a, in_stride, rows, n,
                    lam_w, w_stride, I, O, columns, True, INNER, PRECISION,
                )  # fmt: skip
                bias = tl.load(lam_b + columns, mask=columns < out_stride, other=0.0)
                acc = eta_w * acc + (eta_b * bias)[None, :]
                if not is_first:
                    acc = times(
                        acc, t_y + below, in_stride, rows, n,
                        w, w_stride, I, O, columns, True, INNER, PRECISION,
                    )  # fmt: skip
                _put_tangent(
                    acc, rows, n, columns, y + out, z + out, t_y + out, t_z + out,
                    out_stride, which, ACTIVATIONS, CURVED,
                )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _put_tangent(
    acc, rows, n, columns, y, z, t_y, t_z, stride, which,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
):  # fmt: skip
    if CURVED:
        put_row_tile(t_z, rows, n, columns, stride, acc)
    slope, _ = slopes(y, z, rows, n, columns, stride, which, ACTIVATIONS, False)
    put_row_tile(t_y, rows, n, columns, stride, slope * acc)


@triton.jit
def tangent_backward(
    layer, rate, weights, lam, y, d, z, dy, t_z, t_d, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, INNER: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t_dY = t_D W + eta D Lam of the layer below, and its t_D = f' t_dY + f'' t_Z dY."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, below, out = place(layer + 5), place(layer + 7), place(layer + 8)
    w, lam_w, eta = weights + w_at, lam + w_at, tl.load(rate)
    which = tl.load(layer - FIELDS + 9)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        if I == 1:
            acc = eta * fold(d + out, out_stride, rows, n, lam_w, O, INNER)
            acc += fold(t_d + out, out_stride, rows, n, w, O, INNER)
            _put_tangent_backward(
                acc, rows, n, tl.arange(0, 16), y + below, z + below, dy + below, t_z + below,
                t_d + below, in_stride, which, ACTIVATIONS, CURVED,
            )  # fmt: skip
        else:
            for first_column in tl.range(0, OUTER if ALL_OUTER else in_stride, OUTER, num_stages=1):
                columns = first_column + tl.arange(0, OUTER)
                acc = times(
                    tl.zeros([ROWS, OUTER], tl.float32), d + out, out_stride, rows, n,
                    lam_w, w_stride, I, O, columns, False, INNER, PRECISION,
                )  # fmt: skip
                acc = times(
                    eta * acc, t_d + out, out_stride, rows, n,
                    w, w_stride, I, O, columns, False, INNER, PRECISION,
                )  # fmt: skip
                _put_tangent_backward(
                    acc, rows, n, columns, y + below, z + below, dy + below, t_z + below,
                    t_d + below, in_stride, which, ACTIVATIONS, CURVED,
                )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _put_tangent_backward(
    acc, rows, n, columns, y, z, dy, t_z, t_d, stride, which,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
):  # fmt: skip
    slope, curve = slopes(y, z, rows, n, columns, stride, which, ACTIVATIONS, CURVED)
    found = slope * acc
    if CURVED:
        t_z_tile = row_tile(t_z, rows, n, columns, stride)
        found += curve * t_z_tile * row_tile(dy, rows, n, columns, stride)
    put_row_tile(t_d, rows, n, columns, stride, found)
