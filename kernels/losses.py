"""Losses of tiles, for kernels: per row, and the cotangent and tangent of a row's loss.

Tiles of R rows and C features (or classes), C padded to a power of two:
    z, t_z  [R, C]   predictions and their tangent
    y       [R, C]   targets; for cross entropy [R, 1], class numbers
    mask    [R, C]   False in padding rows and columns, where anything may stand in the others
Nothing is divided: a row's loss is the sum over its features, and callers put in the mean's 1/N.
LOSS is "mse", "cross_entropy", "bce_with_logits" or "huber".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp, log1p, sigmoid_slope


@triton.jit
def _softmax_parts(z, mask):
    """[R, C]: z less the row's largest, and e to that; both 0 outside the mask"""
    lowest: tl.constexpr = -3.4e38
    # A NaN is no largest; it comes through by itself.
    largest = tl.max(tl.where(mask & (z == z), z, lowest), axis=1, keep_dims=True)
    shifted = tl.where(mask, z - largest, 0.0)
    return shifted, tl.where(mask, exp(shifted), 0.0)


@triton.jit
def _softmax(z, mask):
    _, weights = _softmax_parts(z, mask)
    total = tl.sum(weights, axis=1, keep_dims=True)
    return weights / tl.where(total == 0, 1.0, total)


@triton.jit
def _bounded(difference):
    bounded = tl.minimum(difference, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(bounded, -1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _cross_entropies(z, y, mask):
    """[R]"""
    shifted, weights = _softmax_parts(z, mask)
    hit = (tl.arange(0, z.shape[1])[None, :] == y) & mask
    # how far the class is below the largest; -1: no such class, or NaN
    below = tl.max(tl.where(hit & (shifted <= 0), -shifted, -1.0), axis=1)
    below = tl.where(below < 0, float("nan"), below)
    total = tl.sum(weights, axis=1)
    outside = total == 0  # a row inside has a weight of 1
    return tl.where(outside, 0.0, below + tl.log(tl.where(outside, 1.0, total)))


@triton.jit
def _losses(z, y, LOSS: tl.constexpr):
    """[R, C]: the features' losses"""
    if LOSS == "bce_with_logits":
        # log(1 + e^z) - y z, in the form that neither overflows nor loses small digits
        positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive - z * y + log1p(exp(-tl.abs(z)))
    elif LOSS == "huber":
        difference = z - y
        bounded = _bounded(difference)
        return bounded * (difference - 0.5 * bounded)
    else:
        tl.static_assert(LOSS == "mse")
        return (z - y) * (z - y)


@triton.jit
def row_losses(z, y, mask, LOSS: tl.constexpr):
    """[R]: the rows' losses, 0 outside the mask; NaN where a class number is out of range"""
    if LOSS == "cross_entropy":
        return _cross_entropies(z, y, mask)
    else:
        return tl.sum(tl.where(mask, _losses(z, y, LOSS), 0.0), axis=1)


@triton.jit
def cotangent(z, y, mask, LOSS: tl.constexpr):
    """[R, C]: D = dL/dz, 0 outside the mask"""
    if LOSS == "cross_entropy":
        hit = tl.arange(0, z.shape[1])[None, :] == y
        D = _softmax(z, mask) - tl.where(hit, 1.0, 0.0)
    elif LOSS == "bce_with_logits":
        D = sigmoid_slope(z)[0] - y
    elif LOSS == "huber":
        D = _bounded(z - y)
    else:
        tl.static_assert(LOSS == "mse")
        D = 2 * (z - y)
    return tl.where(mask, D, 0.0)


@triton.jit
def tangent(z, y, t_z, mask, LOSS: tl.constexpr):
    """[R, C]: t_D = L'' t_z, 0 outside the mask"""
    if LOSS == "cross_entropy":
        p = _softmax(z, mask)
        t_z = tl.where(mask, t_z, 0.0)
        t_D = p * (t_z - tl.sum(p * t_z, axis=1, keep_dims=True))
    elif LOSS == "bce_with_logits":
        t_D = sigmoid_slope(z)[1] * t_z
    elif LOSS == "huber":
        # As autograd has it: the second derivative at |z - y| = 1 is 1.
        t_D = tl.where(tl.abs(z - y) > 1, 0.0, t_z)
    else:
        tl.static_assert(LOSS == "mse")
        t_D = 2 * t_z
    return tl.where(mask, t_D, 0.0)
