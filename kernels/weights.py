"""A linear layer's own numbers in the fused meta-step: weights, their adjoint, and their gradients.

All are outer products of few rows. None of these ends with a barrier: the layers of a network do
not read each other's. Dimensions: see fused.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import add_outer, outer_vector, put_row_tile, row_sums, row_tile
from .table import place, shape


@triton.jit
def descend(
    layer, is_first, rate, is_step, weights, target, x, y, d, n,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TALL: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """theta_{k+1} = theta_k - eta D^T A after a step; Lam = D^T A, for an eta of -1, after the
    query."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, b_at = place(layer + 5), place(layer + 6)
    d += place(layer + 8)
    a = tl.where(is_first, x, y + place(layer + 7))
    eta_w, eta_b = tl.load(rate), tl.load(rate + 1)
    for first_out in tl.range(0, OUTER if ALL_OUTER else O, OUTER, num_stages=1):
        outs = first_out + tl.arange(0, OUTER)
        mask = outs < out_stride
        was = outs < tl.where(is_step, out_stride, 0)
        bias = tl.load(weights + b_at + outs, mask=was, other=0.0)
        bias -= eta_b * row_sums(d, out_stride, outs, n, ROWS, ALL_ROWS)
        tl.store(target + b_at + outs, bias, mask=mask)
    if (I == 1) | (O == 1):
        for first in tl.range(0, OUTER if ALL_OUTER else I * O, OUTER, num_stages=1):
            columns = first + tl.arange(0, OUTER)
            found = outer_vector(d, out_stride, a, in_stride, columns, n, I, ROWS, ALL_ROWS)
            mask = columns < I * O
            was = columns < tl.where(is_step, I * O, 0)
            before = tl.load(weights + w_at + columns, mask=was, other=0.0)
            tl.store(target + w_at + columns, before - eta_w * found, mask=mask)
    else:
        for first_out in tl.range(0, O, TALL, num_stages=1):
            outs = first_out + tl.arange(0, TALL)
            for first_in in tl.range(0, OUTER if ALL_OUTER else w_stride, OUTER, num_stages=1):
                ins = first_in + tl.arange(0, OUTER)
                acc = add_outer(
                    tl.zeros([TALL, OUTER], tl.float32), d, out_stride, outs,
                    a, in_stride, ins, n, ROWS, ALL_ROWS, PRECISION,
                )  # fmt: skip
                before = row_tile(weights + w_at, outs, tl.where(is_step, O, 0), ins, w_stride)
                put_row_tile(target + w_at, outs, O, ins, w_stride, before - eta_w * acc)


@triton.jit
def pull_back(
    layer, is_first, lam, x, y, d, t_y, t_d, n,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TALL: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lam = Lam - t_D^T A - D^T t_A; lam_b = lam_b - the row sums of t_D"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    lam_w, lam_b = lam + place(layer + 5), lam + place(layer + 6)
    out, below = place(layer + 8), place(layer + 7)
    d += out
    t_d += out
    a, t_a = tl.where(is_first, x, y + below), t_y + below
    for first_out in tl.range(0, OUTER if ALL_OUTER else O, OUTER, num_stages=1):
        outs = first_out + tl.arange(0, OUTER)
        mask = outs < out_stride
        bias = tl.load(lam_b + outs, mask=mask, other=0.0)
        bias -= row_sums(t_d, out_stride, outs, n, ROWS, ALL_ROWS)
        tl.store(lam_b + outs, bias, mask=mask)
    if (I == 1) | (O == 1):
        for first in tl.range(0, OUTER if ALL_OUTER else I * O, OUTER, num_stages=1):
            columns = first + tl.arange(0, OUTER)
            mask = columns < I * O
            found = tl.load(lam_w + columns, mask=mask, other=0.0)
            found -= outer_vector(t_d, out_stride, a, in_stride, columns, n, I, ROWS, ALL_ROWS)
            if not is_first:
                found -= outer_vector(d, out_stride, t_a, in_stride, columns, n, I, ROWS, ALL_ROWS)
            tl.store(lam_w + columns, found, mask=mask)
    else:
        for first_out in tl.range(0, O, TALL, num_stages=1):
            outs = first_out + tl.arange(0, TALL)
            for first_in in tl.range(0, OUTER if ALL_OUTER else w_stride, OUTER, num_stages=1):
                ins = first_in + tl.arange(0, OUTER)
                acc = add_outer(
                    tl.zeros([TALL, OUTER], tl.float32), t_d, out_stride, outs,
                    a, in_stride, ins, n, ROWS, ALL_ROWS, PRECISION,
                )  # fmt: skip
                if not is_first:
                    acc = add_outer(
                        acc, d, out_stride, outs, t_a, in_stride, ins, n, ROWS, ALL_ROWS, PRECISION
                    )
                before = row_tile(lam_w, outs, O, ins, w_stride)
                put_row_tile(lam_w, outs, O, ins, w_stride, before - acc)


@triton.jit
def put_rate_gradients(
    layer, is_first, to, lam, x, y, d, n,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TALL: tl.constexpr,
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dloss/deta = -<g, Lam>, for weight and bias."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    lam_w, lam_b = lam + place(layer + 5), lam + place(layer + 6)
    d += place(layer + 8)
    a = tl.where(is_first, x, y + place(layer + 7))
    of_bias, of_weight = tl.zeros([OUTER], tl.float32), tl.zeros([OUTER], tl.float32)
    for first_out in tl.range(0, OUTER if ALL_OUTER else O, OUTER, num_stages=1):
        outs = first_out + tl.arange(0, OUTER)
        adjoint = tl.load(lam_b + outs, mask=outs < O, other=0.0)
        of_bias += (
            tl.where(outs < O, row_sums(d, out_stride, outs, n, ROWS, ALL_ROWS), 0.0) * adjoint
        )
    if (I == 1) | (O == 1):
        for first in tl.range(0, OUTER if ALL_OUTER else I * O, OUTER, num_stages=1):
            columns = first + tl.arange(0, OUTER)
            found = outer_vector(d, out_stride, a, in_stride, columns, n, I, ROWS, ALL_ROWS)
            adjoint = tl.load(lam_w + columns, mask=columns < I * O, other=0.0)
            of_weight += tl.where(columns < I * O, found, 0.0) * adjoint
    else:
        for first_out in tl.range(0, O, TALL, num_stages=1):
            outs = first_out + tl.arange(0, TALL)
            for first_in in tl.range(0, OUTER if ALL_OUTER else w_stride, OUTER, num_stages=1):
                ins = first_in + tl.arange(0, OUTER)
                acc = add_outer(
                    tl.zeros([TALL, OUTER], tl.float32), d, out_stride, outs,
                    a, in_stride, ins, n, ROWS, ALL_ROWS, PRECISION,
                )  # fmt: skip
                of_weight += tl.sum(acc * row_tile(lam_w, outs, O, ins, w_stride), 0)
    tl.store(to, -tl.sum(of_weight, 0))
    tl.store(to + 1, -tl.sum(of_bias, 0))
