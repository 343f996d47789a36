"""Activations of tiles, for kernels: f(z), f'(z), f''(z) of a chain of operations.

OPS is a constexpr tuple of (name, *constants), applied in order, with the names and constants of
`Operation.native`: (), (("relu",),), (("scale", 30.0), ("sine",)).
    y = value(z, OPS)       f(z)
    slope(kept, OPS)        f'(z)
    curve(kept, OPS)        f''(z), where is_curved(OPS)
`kept` is z where keeps_input(OPS), else y. Tiles are float32, of any shape. Kinks are as torch has
them, and a NaN in z is a NaN in y. Functions without f(0) = 0 fill padded columns: mask them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .elementary import cdf_pdf, exp, log1p, sigmoid_slope, sin_cos, tanh

GELU_A, GELU_B = tl.constexpr(2 * math.sqrt(2 / math.pi)), tl.constexpr(0.044715)


@triton.constexpr_function
def keeps_input(OPS):
    """Whether f' and f'' want z; else they want y."""
    if len(OPS) != 1:
        return len(OPS) > 1
    if OPS[0][0] == "leaky_relu":
        return not OPS[0][1] > 0  # only then do y and z have the same sign
    return OPS[0][0] not in ("relu", "tanh", "sigmoid")


@triton.constexpr_function
def is_curved(OPS):
    """Whether f'' is anything but zero."""
    return any(op[0] not in ("relu", "leaky_relu", "scale") for op in OPS)


# Compiled code cannot index a tuple that holds strings: these do.
@triton.constexpr_function
def moves_zero(OPS):
    """Whether f(0) is not 0, so that f fills padded columns."""
    return any(op[0] in ("sigmoid", "softplus") for op in OPS)


@triton.constexpr_function
def _one(OPS, i):
    return (OPS[i],)


@triton.constexpr_function
def _name(OPS, i):
    return OPS[i][0]


@triton.constexpr_function
def _constant(OPS, i, j):
    return float(OPS[i][j])


@triton.constexpr_function
def _is_curved_before(OPS, i):
    return is_curved(OPS[:i])


@triton.jit
def value(z, OPS: tl.constexpr):
    """f(z)"""
    for i in tl.static_range(len(OPS)):
        z = _value(z, OPS, i)
    return z


@triton.jit
def slope(kept, OPS: tl.constexpr):
    """f'(z): the product of the operations' slopes."""
    if len(OPS) == 0:
        return tl.full(kept.shape, 1.0, tl.float32)
    elif len(OPS) == 1:
        return _slope(kept, OPS, 0)
    else:
        first = tl.full(kept.shape, 1.0, tl.float32)
        for i in tl.static_range(len(OPS)):
            y = _value(kept, OPS, i)
            if keeps_input(_one(OPS, i)):
                first *= _slope(kept, OPS, i)
            else:
                first *= _slope(y, OPS, i)
            kept = y
        return first


@triton.jit
def curve(kept, OPS: tl.constexpr):
    """f''(z); of g(f(z)): g'' f'^2 + g' f''."""
    tl.static_assert(is_curved(OPS))
    if len(OPS) == 1:
        return _curve(kept, OPS, 0)
    else:
        first = tl.full(kept.shape, 1.0, tl.float32)
        second = tl.full(kept.shape, 0.0, tl.float32)
        for i in tl.static_range(len(OPS)):
            y = _value(kept, OPS, i)
            own = kept
            if not keeps_input(_one(OPS, i)):
                own = y
            g1 = _slope(own, OPS, i)
            if _is_curved_before(OPS, i):
                second *= g1
            if is_curved(_one(OPS, i)):
                second += _curve(own, OPS, i) * first * first
            first *= g1
            kept = y
        return second


@triton.jit
def _gelu_inside(z):
    """v and v' of the tanh form of gelu, z s(v) with s the sigmoid: v = A z (1 + B z^2)"""
    square = z * z
    return z * GELU_A * (1 + square * GELU_B), (1 + square * (3 * GELU_B)) * GELU_A


@triton.jit
def _value(z, OPS: tl.constexpr, i: tl.constexpr):
    NAME: tl.constexpr = _name(OPS, i)
    if NAME == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "leaky_relu":
        return tl.where(z > 0, z, z * _constant(OPS, i, 1))
    elif NAME == "tanh":
        return tanh(z)
    elif NAME == "sigmoid":
        return sigmoid_slope(z)[0]
    elif NAME == "silu":
        return z * sigmoid_slope(z)[0]
    elif NAME == "gelu":
        return z * cdf_pdf(z)[0]
    elif NAME == "gelu_tanh":
        return z * sigmoid_slope(_gelu_inside(z)[0])[0]
    elif NAME == "softplus":
        v = z * _constant(OPS, i, 1)
        y = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(exp(-tl.abs(v)))
        return tl.where(v > _constant(OPS, i, 2), z, y * (1 / _constant(OPS, i, 1)))
    elif NAME == "sine":
        return sin_cos(z)[0]
    else:
        tl.static_assert(NAME == "scale")
        return z * _constant(OPS, i, 1)


@triton.jit
def _slope(kept, OPS: tl.constexpr, i: tl.constexpr):
    NAME: tl.constexpr = _name(OPS, i)
    if NAME == "relu":
        return tl.where(kept <= 0, 0.0, 1.0)
    elif NAME == "leaky_relu":
        return tl.where(kept > 0, 1.0, _constant(OPS, i, 1))
    elif NAME == "tanh":
        return 1 - kept * kept
    elif NAME == "sigmoid":
        return kept * (1 - kept)
    elif NAME == "silu":
        s, s1 = sigmoid_slope(kept)
        return s + kept * s1
    elif NAME == "gelu":
        cdf, pdf = cdf_pdf(kept)
        return cdf + kept * pdf
    elif NAME == "gelu_tanh":
        v, v1 = _gelu_inside(kept)
        s, s1 = sigmoid_slope(v)
        return s + kept * s1 * v1
    elif NAME == "softplus":
        v = kept * _constant(OPS, i, 1)
        return tl.where(v > _constant(OPS, i, 2), 1.0, sigmoid_slope(v)[0])
    elif NAME == "sine":
        return sin_cos(kept)[1]
    else:
        tl.static_assert(NAME == "scale")
        return tl.full(kept.shape, _constant(OPS, i, 1), tl.float32)


@triton.jit
def _curve(kept, OPS: tl.constexpr, i: tl.constexpr):
    NAME: tl.constexpr = _name(OPS, i)
    if NAME == "tanh":
        return -2 * kept * (1 - kept * kept)
    elif NAME == "sigmoid":
        return (1 - 2 * kept) * kept * (1 - kept)
    elif NAME == "silu":
        s, s1 = sigmoid_slope(kept)
        return s1 * (2 + kept * (1 - 2 * s))
    elif NAME == "gelu":
        return (2 - kept * kept) * cdf_pdf(kept)[1]
    elif NAME == "gelu_tanh":
        # f' = s + z s' v', differentiated once more; s'' = s' (1 - 2 s)
        v, v1 = _gelu_inside(kept)
        s, s1 = sigmoid_slope(v)
        v2 = kept * (6 * GELU_A * GELU_B)
        return s1 * (2 * v1 + kept * (v2 + v1 * v1 * (1 - 2 * s)))
    elif NAME == "softplus":
        v = kept * _constant(OPS, i, 1)
        return tl.where(v > _constant(OPS, i, 2), 0.0, sigmoid_slope(v)[1] * _constant(OPS, i, 1))
    else:
        tl.static_assert(NAME == "sine")
        return -sin_cos(kept)[0]
