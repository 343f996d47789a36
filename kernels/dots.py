"""Products of tiles on tensor cores, in one of four precisions.

tf32x3    fp32-exact (error 2e-7 to 1e-6): three tf32 products of a split a = high + low, small
          terms first; low times low, and the last bit of a low part, are beyond a float32's digits.
          The three make a sum of their own, which is added by the ordinary units: tensor cores cut
          off digits when they add, and over a long sum that would be more than is spared
ieee      fp32-exact by FMA: slower, for checks
tf32      operands rounded to 10 bits
bf16      operands rounded to 7 bits
All accumulate in float32. The interpreter multiplies in float32 whatever it is told; as operands
are rounded here, it computes what the tensor cores do, but for that last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, for tiles a [m, k], b [k, n] and acc [m, n] in float32."""
    if PRECISION == "tf32x3":
        a_high, b_high = to_tf32(a), to_tf32(b)
        part = tl.dot(a - a_high, b_high, input_precision="tf32")
        part = tl.dot(a_high, b - b_high, part, input_precision="tf32")
        acc += tl.dot(a_high, b_high, part, input_precision="tf32")
    elif PRECISION == "tf32":
        acc = tl.dot(_kept_nan(a), _kept_nan(b), acc, input_precision="tf32")
    elif PRECISION == "bf16":
        acc = tl.dot(_to_bf16(a), _to_bf16(b), acc)
    else:
        tl.static_assert(PRECISION == "ieee")
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def to_tf32(x):
    """x rounded to the 10 bits of tf32 (cutting them off instead fails the error rule). A NaN may
    become a number, but x less that is a NaN again."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _kept_nan(x):
    """x rounded to tf32, where nothing else tells of a NaN."""
    return tl.where(x == x, to_tf32(x), x)


@triton.jit
def _to_bf16(x):
    """x as bfloat16; in the interpreter, whose products know none, a float32 rounded to one."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:  # Triton compiles what follows an early return as well
        return x.to(tl.bfloat16)
