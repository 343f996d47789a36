"""Products of matrices in memory, one tile of the result in registers.

Rows of features: X [n, width], weights W [O, I] as torch has them. Rows of activations lie
`stride` apart, a multiple of 16; so do rows of W, but for I = 1, where W is a vector. Columns up
to that multiple are there and zero. A width of 1 is a vector operation, never a padded product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dots import dot


@triton.jit
def row_tile(at, rows, row_count, columns, stride):
    """x[rows, columns] of a matrix with zero columns up to `stride`; 0 outside."""
    stride = (stride >> 4) * 16  # says that it is a multiple of 16
    mask = (rows < row_count)[:, None] & (columns < stride)[None, :]
    return tl.load(at + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def put_row_tile(at, rows, row_count, columns, stride, value):
    """x[rows, columns] = value, where x is."""
    stride = (stride >> 4) * 16  # says that it is a multiple of 16
    mask = (rows < row_count)[:, None] & (columns < stride)[None, :]
    tl.store(at + rows[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def weight_tile(at, outs, O, ins, stride):
    """w[outs, ins] of weights [O, I]; 0 outside."""
    if stride == 1:
        mask = (outs < O)[:, None] & (ins == 0)[None, :]
        value = tl.load(at + outs[:, None] + ins[None, :], mask=mask, other=0.0)
    else:
        value = row_tile(at, outs, O, ins, stride)
    return value


@triton.jit
def put_weight_tile(at, outs, O, ins, stride, value):
    """w[outs, ins] = value, where w is."""
    if stride == 1:
        mask = (outs < O)[:, None] & (ins == 0)[None, :]
        tl.store(at + outs[:, None] + ins[None, :], value, mask=mask)
    else:
        put_row_tile(at, outs, O, ins, stride, value)


@triton.jit
def times(
    acc, x, x_stride, rows, row_count, w, w_stride, I, O, columns,
    FORWARD: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] + X W^T, with X [n, I], or + X W, with X [n, O], if not FORWARD.

    `columns` are features of the result; INNER features are summed at a time.
    """
    width = I if FORWARD else O
    out_width = O if FORWARD else I
    if width == 1:
        x_column = tl.load(x + rows * x_stride, mask=rows < row_count, other=0.0)
        w_row = tl.load(w + columns, mask=columns < out_width, other=0.0)
        acc += x_column[:, None] * w_row[None, :]
    elif out_width == 1:
        sums = tl.sum(acc, 1) * 0.0
        for first in tl.range(0, width, INNER, num_stages=1):
            inner = first + tl.arange(0, INNER)
            w_row = tl.load(w + inner, mask=inner < width, other=0.0)
            sums += tl.sum(row_tile(x, rows, row_count, inner, x_stride) * w_row[None, :], 1)
        acc += tl.where(columns == 0, 1.0, 0.0)[None, :] * sums[:, None]
    else:
        for first in tl.range(0, width, INNER, num_stages=1):
            inner = first + tl.arange(0, INNER)
            x_tile = row_tile(x, rows, row_count, inner, x_stride)
            if FORWARD:
                w_tile = tl.trans(row_tile(w, columns, O, inner, w_stride))
            else:
                w_tile = row_tile(w, inner, O, columns, w_stride)
            acc = dot(x_tile, w_tile, acc, PRECISION)
    return acc


@triton.jit
def add_outer(
    acc, d, d_stride, outs, a, a_stride, ins, n, I, O,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [outs, ins] + D^T A, with D [n, O] and A [n, I]."""
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        if I == 1:
            a_column = tl.load(a + rows * a_stride, mask=rows < n, other=0.0)
            sums = tl.sum(row_tile(d, rows, n, outs, d_stride) * a_column[:, None], 0)
            acc += sums[:, None] * tl.where(ins == 0, 1.0, 0.0)[None, :]
        elif O == 1:
            d_column = tl.load(d + rows * d_stride, mask=rows < n, other=0.0)
            sums = tl.sum(row_tile(a, rows, n, ins, a_stride) * d_column[:, None], 0)
            acc += tl.where(outs == 0, 1.0, 0.0)[:, None] * sums[None, :]
        else:
            d_tile = tl.trans(row_tile(d, rows, n, outs, d_stride))
            acc = dot(d_tile, row_tile(a, rows, n, ins, a_stride), acc, PRECISION)
    return acc


@triton.jit
def row_sums(d, d_stride, outs, n, ROWS: tl.constexpr):
    """The sum over rows of D [n, O]: [outs]"""
    sums = tl.zeros([outs.shape[0]], tl.float32)
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        sums += tl.sum(row_tile(d, rows, n, outs, d_stride), 0)
    return sums
