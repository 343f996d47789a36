"""The layer table of the fused meta-step, and copies between tensors and a program's scratch.

In scratch, rows of features and of weights lie a multiple of 16 apart with zeros behind each; the
weights of a layer with a single feature on either side are a vector. Dimensions: see fused.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import put_row_tile, row_tile

# Numbers in a row of the layer table: I, O, stride of W's rows, strides of the nodes before and
# behind, where W and b begin in a copy of the parameters, where the nodes before and behind begin
# in a copy of the activations, which activation, where W and b begin in the gradients (-1: nowhere)
FIELDS = tl.constexpr(12)


@triton.jit
def shape(layer):
    """I, O, the stride of W's rows, and of the rows before and behind the layer."""
    strides = place(layer + 3), place(layer + 4)
    return tl.load(layer), tl.load(layer + 1), tl.load(layer + 2), strides[0], strides[1]


@triton.jit
def place(field):
    """A place or a stride of the layer table, all of which are multiples of 16."""
    return tl.multiple_of(tl.load(field), 16)


@triton.jit
def zero(at, count):
    for first in tl.range(0, count, 1024, num_stages=1):
        i = first + tl.arange(0, 1024)
        tl.store(at + i, tl.zeros([1024], tl.float32), mask=i < count)


@triton.jit
def copy_parameters(
    layers, addresses, theta, L, TALL: tl.constexpr, OUTER: tl.constexpr, ALL_OUTER: tl.constexpr
):
    """The meta-parameters into theta_0, with zeros behind each row."""
    for l in tl.range(0, L, num_stages=1):
        layer = layers + l * FIELDS
        I, O, w_stride, _, out_stride = shape(layer)
        weight = tl.load(addresses + 2 * l).to(tl.pointer_type(tl.float32))
        w, b = theta + place(layer + 5), theta + place(layer + 6)
        if (I == 1) | (O == 1):
            _copy_vector(weight, w, I * O, I * O, OUTER, ALL_OUTER)
        else:
            for first_out in tl.range(0, O, TALL, num_stages=1):
                outs = first_out + tl.arange(0, TALL)
                for first_in in tl.range(0, OUTER if ALL_OUTER else w_stride, OUTER, num_stages=1):
                    ins = first_in + tl.arange(0, OUTER)
                    mask = (outs < O)[:, None] & (ins < I)[None, :]
                    at = weight + outs[:, None] * I + ins[None, :]
                    value = tl.load(at, mask=mask, other=0.0)
                    put_row_tile(w, outs, O, ins, w_stride, value)
        address = tl.load(addresses + 2 * l + 1)
        bias = address.to(tl.pointer_type(tl.float32))
        _copy_vector(bias, b, tl.where(address != 0, O, 0), out_stride, OUTER, ALL_OUTER)


@triton.jit
def _copy_vector(x, to, count, size, OUTER: tl.constexpr, ALL_OUTER: tl.constexpr):
    """x [count], and zeros up to `size`."""
    for first in tl.range(0, OUTER if ALL_OUTER else size, OUTER, num_stages=1):
        i = first + tl.arange(0, OUTER)
        tl.store(to + i, tl.load(x + i, mask=i < count, other=0.0), mask=i < size)


@triton.jit
def copy_rows(
    x,
    to,
    n,
    width,
    stride,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    ALL_OUTER: tl.constexpr,
):
    """Rows [n, width] to where they lie `stride` apart, with zeros behind each."""
    for first in tl.range(0, ROWS if ALL_ROWS else n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        for first_column in tl.range(0, OUTER if ALL_OUTER else stride, OUTER, num_stages=1):
            columns = first_column + tl.arange(0, OUTER)
            mask = (rows < n)[:, None] & (columns < width)[None, :]
            value = tl.load(x + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
            put_row_tile(to, rows, n, columns, stride, value)


@triton.jit
def add_gradients(
    layer, lam, gradients, TALL: tl.constexpr, OUTER: tl.constexpr, ALL_OUTER: tl.constexpr
):
    """Lam to the program's sum, without the gaps."""
    I, O, w_stride, _, _ = shape(layer)
    w, b = lam + place(layer + 5), lam + place(layer + 6)
    to_weight, to_bias = tl.load(layer + 10), tl.load(layer + 11)
    if to_bias >= 0:
        _add_vector(b, gradients + to_bias, O, OUTER, ALL_OUTER)
    if to_weight >= 0:
        if (I == 1) | (O == 1):
            _add_vector(w, gradients + to_weight, I * O, OUTER, ALL_OUTER)
        else:
            for first_out in tl.range(0, O, TALL, num_stages=1):
                outs = first_out + tl.arange(0, TALL)
                for first_in in tl.range(0, OUTER if ALL_OUTER else w_stride, OUTER, num_stages=1):
                    ins = first_in + tl.arange(0, OUTER)
                    mask = (outs < O)[:, None] & (ins < I)[None, :]
                    at = gradients + to_weight + outs[:, None] * I + ins[None, :]
                    total = tl.load(at, mask=mask, other=0.0)
                    tl.store(at, total + row_tile(w, outs, O, ins, w_stride), mask=mask)


@triton.jit
def _add_vector(x, to, count, OUTER: tl.constexpr, ALL_OUTER: tl.constexpr):
    for first in tl.range(0, OUTER if ALL_OUTER else count, OUTER, num_stages=1):
        i = first + tl.arange(0, OUTER)
        mask = i < count
        total = tl.load(to + i, mask=mask, other=0.0)
        tl.store(to + i, total + tl.load(x + i, mask=mask, other=0.0), mask=mask)
