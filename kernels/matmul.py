"""Large matrix products in a chosen precision: out = alpha A B (+ beta C) (+ bias).

A [batch, m, k], B [batch, k, n], C and out [batch, m, n], bias [n]. A and B may have any strides: a
transpose is a view, and one matrix for all the batch has a batch stride of 0. It may take the place
of torch's product where that is slower in full float32; `product` says which of the two runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .dots import dot
from .launch import Launch

ENGINES = ("torch", "triton")
GROUP = 8  # tiles of rows that share the same columns of B one after the other, for the cache
STRIDES = ("a_batch", "a_row", "a_column", "b_batch", "b_row", "b_column", "c_batch", "c_row")


@triton.jit(do_not_specialize=["m", "n", "k", "c_batch"])
def matmul_kernel(
    a, b, c, bias, out,
    m, n, k,
    a_batch, a_row, a_column, b_batch, b_row, b_column, c_batch, c_row,
    alpha, beta,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out, and all of k."""
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    matrix = (program // (down * across)).to(tl.int64)
    tile = program % (down * across)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    row = ((first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (within // height * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_ok, column_ok = row < m, column < n
    a += matrix * a_batch
    b += matrix * b_batch
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inner_ok = inner < k
        a_ok, b_ok = row_ok[:, None] & inner_ok[None, :], inner_ok[:, None] & column_ok[None, :]
        a_tile = tl.load(a + (row[:, None] * a_row + inner[None, :] * a_column), a_ok, 0.0)
        b_tile = tl.load(b + (inner[:, None] * b_row + column[None, :] * b_column), b_ok, 0.0)
        acc = dot(a_tile, b_tile, acc, PRECISION)
    acc *= alpha
    if bias is not None:
        acc += tl.load(bias + column, column_ok, 0.0)[None, :]
    place = matrix * c_batch + row[:, None] * c_row + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if c is not None:
        acc += beta * tl.load(c + place, ok, 0.0)
    tl.store(out + place, acc, ok)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def default_tiles(m: int, n: int) -> Tiles:
    """Tiles that fit the registers; nothing was timed yet."""
    rows = min(128, max(16, triton.next_power_of_2(m)))
    columns = min(64, max(16, triton.next_power_of_2(n)))
    return Tiles(rows, columns, 32, 8 if rows == 128 else 4, 3)


@functools.lru_cache(maxsize=1024)
def describe(
    batch: int,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    given: frozenset[str],
    precision: str,
    tiles: Tiles | None = None,
) -> Launch:
    """The launch of products of m, n, k; `given` are those of c and bias that there are."""
    m, n, k = shape
    cut = tiles or default_tiles(m, n)
    constants: dict[str, Any] = dict(PRECISION=precision, GROUP=GROUP)
    constants |= dict(BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k)
    constants |= {name: None for name in ("c", "bias") if name not in given}
    signature = dict.fromkeys(("a", "b", "out", *given), "*fp32")
    signature |= dict(m="i32", n="i32", k="i32", alpha="fp32", beta="fp32")
    for name, stride in zip(STRIDES, strides, strict=True):
        if stride == 1 and name != "c_batch":
            constants[name] = 1
        else:
            signature[name] = "i32" if stride % 16 or name == "c_batch" else "i32:16"
    signature |= dict.fromkeys(constants, "constexpr")
    grid = batch * triton.cdiv(m, cut.m) * triton.cdiv(n, cut.n)
    layout = "".join("t" if strides[i] == 1 else "n" for i in (1, 4))
    more = "+".join(sorted(given))
    name = f"matmul [{more}] {layout} {batch}x{m}x{n}x{k} {precision}"
    return Launch(name, matmul_kernel, signature, constants, cut.warps, cut.stages, (grid,))


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    engine: str = "torch",
    precision: str = "tf32x3",
    tiles: Tiles | None = None,
) -> Tensor:
    """alpha a b (+ beta c) (+ bias), of [m, k] and [k, n] or of batches; either may be one for all.

    engine: one of ENGINES. The precision is the kernel's; torch's product follows torch's setting.
    """
    if engine == "torch":
        out = a @ b
        out = out if alpha == 1 else out.mul_(alpha)
        out = out if c is None else out.add_(c, alpha=beta)
        return out if bias is None else out.add_(bias)
    assert engine == "triton"
    batch = max(t.shape[0] if t.dim() == 3 else 1 for t in (a, b))
    left, right = (t.expand(batch, *t.shape[-2:]) for t in (a, b))
    (m, k), n = left.shape[1:], right.shape[2]
    out = a.new_empty(batch, m, n)
    tensors = dict(a=left, b=right, out=out)
    if c is not None:
        tensors["c"] = c.expand(batch, m, n).contiguous()
    if bias is not None:
        tensors["bias"] = bias.contiguous()
    strides = (*left.stride(), *right.stride(), *out.stride()[:2])
    given = frozenset(tensors.keys() & {"c", "bias"})
    launch = describe(batch, (m, n, k), strides, given, precision, tiles)
    numbers = dict(zip(STRIDES, strides, strict=True)) | dict(m=m, n=n, k=k, alpha=alpha, beta=beta)
    arguments = {**launch.constants, **tensors, **numbers}
    launch.kernel[launch.grid](
        **arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    return out if a.dim() == 3 or b.dim() == 3 else out[0]
