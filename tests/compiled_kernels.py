"""The smallest kernel around maml_fast.kernels.dots, to be compiled."""

import triton
import triton.language as tl

from maml_fast.kernels.dots import dot


@triton.jit
def product(a, b, c, SHAPE: tl.constexpr, PRECISION: tl.constexpr):
    """c = a b, of one tile: SHAPE is (m, n, k) for c [m, n], a [m, k], b [k, n]."""
    M: tl.constexpr = SHAPE[0]  # in the list of tl.zeros, SHAPE[0] itself does not compile
    N: tl.constexpr = SHAPE[1]
    K: tl.constexpr = SHAPE[2]
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    a_tile = tl.load(a + m * K + k[None, :])
    b_tile = tl.load(b + k[:, None] * N + n)
    acc = tl.zeros([M, N], tl.float32)
    tl.store(c + m * N + n, dot(a_tile, b_tile, acc, PRECISION))
