"""A linear layer of the fused meta-step and the activation behind it: all of a task's rows.

W and b, theta_k of the task, and their adjoint Lam are dense. What a routine stored, other threads
read in the next: those that rows pass through end with a barrier. Dimensions: see fused.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, slopes
from .products import (
    add_outer,
    put_row_tile,
    put_weight_tile,
    row_sums,
    row_tile,
    times,
    weight_tile,
)
from .table import FIELDS, place, shape


@triton.jit
def forward(
    layer, is_first, weights, x, y, z, n,
    ACTIVATIONS: tl.constexpr, KEEPS_Z: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = A W^T + b, Y = f(Z)"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w, b = weights + place(layer + 5), weights + place(layer + 6)
    out, which = place(layer + 8), tl.load(layer + 9)
    a = tl.where(is_first, x, y + place(layer + 7))
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        for first_column in tl.range(0, out_stride, OUTER, num_stages=1):
            columns = first_column + tl.arange(0, OUTER)
            bias = tl.load(b + columns, mask=columns < out_stride, other=0.0)
            acc = tl.zeros([ROWS, OUTER], tl.float32) + bias[None, :]
            acc = times(
                acc, a, in_stride, rows, n, w, w_stride, I, O, columns, True, INNER, PRECISION
            )
            if KEEPS_Z:
                put_row_tile(z + out, rows, n, columns, out_stride, acc)
            found = tl.where((columns < O)[None, :], activate(acc, which, ACTIVATIONS), 0.0)
            put_row_tile(y + out, rows, n, columns, out_stride, found)
    tl.debug_barrier()


@triton.jit
def backward(
    layer, weights, y, d, z, dy, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY = D W of the layer below, and its D = f'(Z) dY."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w, below, out = weights + place(layer + 5), place(layer + 7), place(layer + 8)
    which = tl.load(layer - FIELDS + 9)
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        for first_column in tl.range(0, in_stride, OUTER, num_stages=1):
            columns = first_column + tl.arange(0, OUTER)
            acc = times(
                tl.zeros([ROWS, OUTER], tl.float32), d + out, out_stride, rows, n,
                w, w_stride, I, O, columns, False, INNER, PRECISION,
            )  # fmt: skip
            if CURVED:
                put_row_tile(dy + below, rows, n, columns, in_stride, acc)
            slope, _ = slopes(
                y + below, z + below, rows, n, columns, in_stride, which, ACTIVATIONS, False
            )
            put_row_tile(d + below, rows, n, columns, in_stride, slope * acc)
    tl.debug_barrier()


@triton.jit
def descend(
    layer, is_first, rate, is_step, weights, target, x, y, d, n,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """theta_{k+1} = theta_k - eta D^T A after a step; Lam = D^T A after the query."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, b_at, out = place(layer + 5), place(layer + 6), place(layer + 8)
    a = tl.where(is_first, x, y + place(layer + 7))
    for first_out in tl.range(0, O, INNER, num_stages=1):
        outs = first_out + tl.arange(0, INNER)
        sums = row_sums(d + out, out_stride, outs, n, ROWS)
        if is_step:
            bias = tl.load(weights + b_at + outs, mask=outs < out_stride, other=0.0)
            sums = bias - tl.load(rate + 1) * sums
        tl.store(target + b_at + outs, sums, mask=outs < out_stride)
        for first_in in tl.range(0, w_stride, OUTER, num_stages=1):
            ins = first_in + tl.arange(0, OUTER)
            acc = add_outer(
                tl.zeros([INNER, OUTER], tl.float32), d + out, out_stride, outs,
                a, in_stride, ins, n, I, O, ROWS, PRECISION,
            )  # fmt: skip
            if is_step:
                before = weight_tile(weights + w_at, outs, O, ins, w_stride)
                acc = before - tl.load(rate) * acc
            put_weight_tile(target + w_at, outs, O, ins, w_stride, acc)


@triton.jit
def tangent(
    layer, is_first, rate, weights, lam, x, y, z, t_y, t_z, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t_Z = t_A W^T + eta (A Lam^T + lam_b), t_Y = f'(Z) t_Z"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, below, out = place(layer + 5), place(layer + 7), place(layer + 8)
    which = tl.load(layer + 9)
    a = tl.where(is_first, x, y + below)
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        for first_column in tl.range(0, out_stride, OUTER, num_stages=1):
            columns = first_column + tl.arange(0, OUTER)
            acc = times(
                tl.zeros([ROWS, OUTER], tl.float32), a, in_stride, rows, n,
                lam + w_at, w_stride, I, O, columns, True, INNER, PRECISION,
            )  # fmt: skip
            b_at = lam + place(layer + 6)
            bias = tl.load(b_at + columns, mask=columns < out_stride, other=0.0)
            acc = tl.load(rate) * acc + (tl.load(rate + 1) * bias)[None, :]
            if not is_first:
                acc = times(
                    acc, t_y + below, in_stride, rows, n,
                    weights + w_at, w_stride, I, O, columns, True, INNER, PRECISION,
                )  # fmt: skip
            if CURVED:
                put_row_tile(t_z + out, rows, n, columns, out_stride, acc)
            slope, _ = slopes(
                y + out, z + out, rows, n, columns, out_stride, which, ACTIVATIONS, False
            )
            put_row_tile(t_y + out, rows, n, columns, out_stride, slope * acc)
    tl.debug_barrier()


@triton.jit
def tangent_backward(
    layer, rate, weights, lam, y, d, z, dy, t_z, t_d, n,
    ACTIVATIONS: tl.constexpr, CURVED: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t_dY = t_D W + eta D Lam of the layer below, and its t_D = f' t_dY + f'' t_Z dY."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, below, out = place(layer + 5), place(layer + 7), place(layer + 8)
    which = tl.load(layer - FIELDS + 9)
    for first in tl.range(0, n, ROWS, num_stages=1):
        rows = first + tl.arange(0, ROWS)
        for first_column in tl.range(0, in_stride, OUTER, num_stages=1):
            columns = first_column + tl.arange(0, OUTER)
            acc = times(
                tl.zeros([ROWS, OUTER], tl.float32), d + out, out_stride, rows, n,
                lam + w_at, w_stride, I, O, columns, False, INNER, PRECISION,
            )  # fmt: skip
            acc = times(
                tl.load(rate) * acc, t_d + out, out_stride, rows, n,
                weights + w_at, w_stride, I, O, columns, False, INNER, PRECISION,
            )  # fmt: skip
            slope, curve = slopes(
                y + below, z + below, rows, n, columns, in_stride, which, ACTIVATIONS, CURVED
            )
            found = slope * acc
            if CURVED:
                found += (
                    curve * row_tile(t_z + below, rows, n, columns, in_stride)
                    * row_tile(dy + below, rows, n, columns, in_stride)
                )  # fmt: skip
            put_row_tile(t_d + below, rows, n, columns, in_stride, found)
    tl.debug_barrier()


@triton.jit
def pull_back(
    layer, is_first, lam, x, y, d, t_y, t_d, n,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lam = Lam - t_D^T A - D^T t_A; lam_b = lam_b - the row sums of t_D"""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, b_at, out = place(layer + 5), place(layer + 6), place(layer + 8)
    below = place(layer + 7)
    a = tl.where(is_first, x, y + below)
    for first_out in tl.range(0, O, INNER, num_stages=1):
        outs = first_out + tl.arange(0, INNER)
        bias_mask = outs < out_stride
        bias = tl.load(lam + b_at + outs, mask=bias_mask, other=0.0)
        bias -= row_sums(t_d + out, out_stride, outs, n, ROWS)
        tl.store(lam + b_at + outs, bias, mask=bias_mask)
        for first_in in tl.range(0, w_stride, OUTER, num_stages=1):
            ins = first_in + tl.arange(0, OUTER)
            acc = add_outer(
                tl.zeros([INNER, OUTER], tl.float32), t_d + out, out_stride, outs,
                a, in_stride, ins, n, I, O, ROWS, PRECISION,
            )  # fmt: skip
            if not is_first:
                acc = add_outer(
                    acc, d + out, out_stride, outs, t_y + below, in_stride, ins,
                    n, I, O, ROWS, PRECISION,
                )  # fmt: skip
            before = weight_tile(lam + w_at, outs, O, ins, w_stride)
            put_weight_tile(lam + w_at, outs, O, ins, w_stride, before - acc)


@triton.jit
def put_rate_gradients(
    layer, is_first, to, lam, x, y, d, n,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dloss/deta = -<g, Lam>, for weight and bias."""
    I, O, w_stride, in_stride, out_stride = shape(layer)
    w_at, b_at, out = place(layer + 5), place(layer + 6), place(layer + 8)
    a = tl.where(is_first, x, y + place(layer + 7))
    of_weight, of_bias = tl.zeros([INNER], tl.float32), tl.zeros([INNER], tl.float32)
    for first_out in tl.range(0, O, INNER, num_stages=1):
        outs = first_out + tl.arange(0, INNER)
        adjoint = tl.load(lam + b_at + outs, mask=outs < out_stride, other=0.0)
        of_bias += row_sums(d + out, out_stride, outs, n, ROWS) * adjoint
        for first_in in tl.range(0, w_stride, OUTER, num_stages=1):
            ins = first_in + tl.arange(0, OUTER)
            acc = add_outer(
                tl.zeros([INNER, OUTER], tl.float32), d + out, out_stride, outs,
                a, in_stride, ins, n, I, O, ROWS, PRECISION,
            )  # fmt: skip
            of_weight += tl.sum(acc * weight_tile(lam + w_at, outs, O, ins, w_stride), 1)
    tl.store(to, -tl.sum(of_weight, 0))
    tl.store(to + 1, -tl.sum(of_bias, 0))
