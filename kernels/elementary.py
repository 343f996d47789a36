"""Elementary functions of float32 tiles, to a few units in the last place; NaN stays NaN.

Triton's own will not do: tl.exp loses digits as |x| grows, tl.sin inlines a huge reduction, with
tl.erf no digit is left in the normal distribution's tail, and there is no tanh. Beside polynomials
only exp2 and division are the hardware's, so that what the interpreter shows holds on a GPU to 2 or
3 units more.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number
LOG2_E = tl.constexpr(math.log2(math.e))
# High parts have few bits, so that small whole numbers multiply them without rounding.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(math.log(2) - 0.693359375)
PI_HIGH, PI_MIDDLE = tl.constexpr(201 / 2**7), tl.constexpr(127 / 2**18)
PI_LOW = tl.constexpr(math.pi / 2 - 201 / 2**7 - 127 / 2**18)
SQRT_2_PI = tl.constexpr(math.sqrt(2 * math.pi))


@triton.constexpr_function
def _coefficients(NAME):
    if NAME == "log1p":  # log(1 + x) / x for x from 0 to 1
        return (
            1.0, -0.49999902, 0.33329964, -0.24954133, 0.19675931,
            -0.1530557, 0.10603617, -0.05695916, 0.01985126, -0.003243981,
        )  # fmt: skip
    if NAME == "tanh":  # (tanh(x) / x - 1) / x^2 in x^2, for |x| up to 5/8
        return (-0.3333328, 0.13331442, -0.053739712, 0.020639079, -0.0057049785)
    if NAME == "sin":  # (sin(x) / x - 1) / x^2 in x^2, for |x| up to pi / 4
        return (-0.16666654, 0.008332083, -0.00019504316)
    if NAME == "cos":  # (cos(x) - 1 + x^2 / 2) / x^4 in x^2, likewise
        return (0.041666646, -0.0013887243, 2.4423887e-05)
    assert NAME == "cdf"  # Phi(-x) e^{x^2 / 2} / t in t = 1 / (1 + 0.3 x), for x from 0 to 14
    return (
        0.11968663, 0.11957283, 0.11022739, 0.07842527, 0.09605873,
        -0.07924901, 0.19158369, -0.228069, 0.11237641, -0.020612946,
    )  # fmt: skip


@triton.constexpr_function
def _degree(NAME):
    return len(_coefficients(NAME)) - 1


@triton.constexpr_function
def _coefficient(NAME, power):
    return _coefficients(NAME)[power]


@triton.jit
def _polynomial(x, NAME: tl.constexpr):
    """The minimax fit of that name, of the relative error."""
    y = x * _coefficient(NAME, _degree(NAME)) + _coefficient(NAME, _degree(NAME) - 1)
    for i in tl.static_range(2, _degree(NAME) + 1):
        y = y * x + _coefficient(NAME, _degree(NAME) - i)
    return y


@triton.jit
def exp(x):
    """e^x for x <= 0; 0 instead of less than a normal number."""
    x = tl.maximum(x, -88.3, propagate_nan=tl.PropagateNan.ALL)
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    # 2^n by its bits; the rounder's own are shifted out. n = -127 makes a 0.
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.exp2(r * LOG2_E) * scale


@triton.jit
def log1p(x):
    """log(1 + x) for x from 0 to 1"""
    return x * _polynomial(x, "log1p")


@triton.jit
def tanh(x):
    size = tl.abs(x)
    e = exp(-2 * size)
    far = 1 - 2 * e / (1 + e)
    square = tl.minimum(x * x, 1.0)  # nothing overflows where `far` is taken
    near = x + x * square * _polynomial(square, "tanh")
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid_slope(x):
    """s = 1 / (1 + e^-x) and s' = s (1 - s), each exact to its last digits on both sides"""
    e = exp(-tl.abs(x))
    near_one = 1 / (1 + e)
    rest = e * near_one
    return tl.where(x < 0, rest, near_one), rest * near_one


@triton.jit
def cdf_pdf(x):
    """The normal distribution Phi(x) and its density"""
    size = tl.abs(x)
    e = exp(-0.5 * x * x)
    t = 1 / (1 + 0.3 * size)
    tail = e * t * _polynomial(t, "cdf")
    return tl.where(x < 0, tail, 1 - tail), e * (1 / SQRT_2_PI)


@triton.jit
def sin_cos(x):
    """sin x and cos x for |x| up to 100,000, good to 1e-7 there; NaN beyond, where neighbouring
    float32 numbers are 0.008 apart and a wrong value would pass unseen."""
    x = tl.where(tl.abs(x) <= 1e5, x, float("nan"))
    shifted = x * (2 / math.pi) + ROUNDER
    n = shifted - ROUNDER
    r = ((x - n * PI_HIGH) - n * PI_MIDDLE) - n * PI_LOW
    square = r * r
    odd = r + r * square * _polynomial(square, "sin")
    even = (1 - 0.5 * square) + square * square * _polynomial(square, "cos")
    quarter = shifted.to(tl.int32, bitcast=True)
    turned = (quarter & 1) != 0
    sine = tl.where(turned, even, odd)
    cosine = tl.where(turned, odd, even)
    return (
        tl.where((quarter & 2) != 0, -sine, sine),
        tl.where(((quarter + 1) & 2) != 0, -cosine, cosine),
    )
