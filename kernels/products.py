"""Products of matrices in memory, one tile of the result in registers.

Rows of features: X [n, width], weights W [O, I] as torch has them. Rows lie `stride` apart, a
multiple of 16, and the columns up to it are there and zero. Where I or O is 1, W is a vector and
every product with it a vector operation, never a padded product of tiles.
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
def times(
    acc, x, x_stride, rows, row_count, w, w_stride, I, O, columns,
    FORWARD: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] + X W^T, with X [n, I], or + X W, with X [n, O], if not FORWARD.

    `columns` are features of the result, which has more than one (else: `fold`); INNER features
    are summed at a time.
    """
    width = I if FORWARD else O
    if width == 1:
        x_column = tl.load(x + rows * x_stride, mask=rows < row_count, other=0.0)
        out_width = O if FORWARD else I
        w_row = tl.load(w + columns, mask=columns < out_width, other=0.0)
        acc += x_column[:, None] * w_row[None, :]
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
def fold(x, x_stride, rows, row_count, w, width, INNER: tl.constexpr):
    """X w, with X [n, width] and a vector w: [rows, 16], of which the first column counts and the
    others are zero."""
    sums = tl.zeros([rows.shape[0]], tl.float32)
    if width == 1:
        x_column = tl.load(x + rows * x_stride, mask=rows < row_count, other=0.0)
        sums = x_column * tl.load(w)
    else:
        for first in tl.range(0, width, INNER, num_stages=1):
            inner = first + tl.arange(0, INNER)
            w_row = tl.load(w + inner, mask=inner < width, other=0.0)
            sums += tl.sum(row_tile(x, rows, row_count, inner, x_stride) * w_row[None, :], 1)
    return sums[:, None] * tl.where(tl.arange(0, 16) == 0, 1.0, 0.0)[None, :]


@triton.jit
def add_outer(
    acc,
    d,
    d_stride,
    outs,
    a,
    a_stride,
    ins,
    n,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [outs, ins] + D^T A, with D [n, O] and A [n, I], both of more than one feature."""
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        d_tile = tl.trans(row_tile(d, rows, n, outs, d_stride))
        acc = dot(d_tile, row_tile(a, rows, n, ins, a_stride), acc, PRECISION)
    return acc


@triton.jit
def outer_vector(
    d, d_stride, a, a_stride, columns, n, I, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr
):
    """D^T A [columns] where I or O is 1."""
    x, x_stride, s, s_stride = a, a_stride, d, d_stride
    if I == 1:
        x, x_stride, s, s_stride = d, d_stride, a, a_stride
    sums = tl.zeros([columns.shape[0]], tl.float32)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        s_column = tl.load(s + rows * s_stride, mask=rows < n, other=0.0)
        sums += tl.sum(row_tile(x, rows, n, columns, x_stride) * s_column[:, None], 0)
    return sums


@triton.jit
def row_sums(d, d_stride, outs, n, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr):
    """The sum over rows of D [n, O]: [outs]"""
    sums = tl.zeros([outs.shape[0]], tl.float32)
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        sums += tl.sum(row_tile(d, rows, n, outs, d_stride), 0)
    return sums
