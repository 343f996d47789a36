"""Launches of the norm kernels: normalisation, activation and 2x2 max pool, each pass of them.

T tasks, N images of a task, C channels; images [T, N, height, width, C]. `norm_kernel.py` says what
is computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from .launch import Launch
from .norm_kernel import COUNTS, apply_kernel, sum_kernel
from .reduce import total_kernel

if TYPE_CHECKING:
    from torch import Tensor

PASSES = ("forward", "backward", "tangent", "tangent_backward")
TENSORS = ("x", "t_x", "dy", "t_dy", "code", "gamma", "beta", "lam", "lam_b", "stats", "t_stats")
APPLIED = (*TENSORS, "sums", "t_sums", "out")
SUMMED = (*TENSORS, "partials")
SPLIT = 512  # pixels of a part of a task's sum


@dataclass(frozen=True)
class Shape:
    """Sizes of one task's images, and what is done to them.

    norm: "batch", "rows" (groups of `group_size` channels in each image) or "none". ops: as
    `pointwise` has them. pool: whether the largest of 2x2 pixels stay.
    """

    images: int
    height: int
    width: int
    channels: int
    norm: str
    ops: tuple[Any, ...] = ()
    pool: bool = False
    group_size: int = 1

    @property
    def pixels(self) -> int:
        return self.images * self.height * self.width

    @property
    def out_pixels(self) -> int:
        if not self.pool:
            return self.pixels
        return self.images * (self.height // 2) * (self.width // 2)

    @property
    def groups(self) -> int:
        """Of an image."""
        return self.channels // self.group_size

    @property
    def statistics(self) -> int:
        """How many means there are."""
        return self.images * self.groups if self.norm == "rows" else self.channels

    @property
    def count(self) -> int:
        """Numbers that share a mean."""
        if self.norm == "rows":
            return self.height * self.width * self.group_size
        return self.pixels

    @property
    def parts(self) -> int:
        """Of a task's pixels, each summed by itself."""
        return triton.cdiv(self.pixels, SPLIT)


@dataclass(frozen=True)
class Config:
    """How the work is cut: pixels and channels of a tile."""

    rows: int
    columns: int
    warps: int


def default_config(kernel: str, shape: Shape, by_group: bool = False) -> Config:
    """Tiles that fit the registers, as compiled for sm_90; nothing was timed yet."""
    numbers = 1024 if kernel == "sum" else 2048
    width = shape.group_size if by_group else shape.channels
    columns = min(64 if not by_group else 512, triton.next_power_of_2(width))
    rows = shape.height * shape.width if by_group else shape.pixels
    return Config(min(numbers // columns, max(4, triton.next_power_of_2(rows))), columns, 4)


@dataclass(frozen=True)
class Affine:
    """A norm's own weights and, in the tangent passes, its adjoint and the step's rates."""

    gamma: Tensor | None = None  # [T, C] or [C]
    beta: Tensor | None = None
    lam: Tensor | None = None  # [T, C]
    lam_b: Tensor | None = None
    rate: float = 0.0
    rate_b: float = 0.0


@functools.lru_cache(maxsize=1024)
def describe(
    kernel: str,
    kind: str,
    given: frozenset[str],
    tasks: int,
    shape: Shape,
    by_group: bool = False,
    config: Config | None = None,
) -> Launch:
    """The launch of one pass of "sum" or "apply"; `given` are the names of the tensors."""
    assert kind in PASSES
    cut = config or default_config(kernel, shape, by_group)
    names = SUMMED if kernel == "sum" else APPLIED
    constants: dict[str, Any] = {name: None for name in names if name not in given}
    constants |= dict(PASS=kind, NORM=shape.norm, OPS=shape.ops, POOL=shape.pool)
    constants |= dict(ROWS=cut.rows, COLS=cut.columns)
    signature = {name: "*i8" if name == "code" else "*fp32" for name in names if name in given}
    signature |= dict.fromkeys((*COUNTS, "groups", "group_size", "gamma_task", "beta_task"), "i32")
    signature |= dict(rate="fp32", rate_b="fp32")
    blocks = triton.cdiv(shape.channels, cut.columns)
    if kernel == "sum":
        constants["BY_GROUP"] = by_group
        signature |= dict(splits="i32", split="i32")
        grid = tasks * (shape.images * shape.groups if by_group else shape.parts * blocks)
    else:
        down = shape.out_pixels if kind in ("forward", "tangent") else shape.pixels
        grid = tasks * triton.cdiv(down, cut.rows) * blocks
    if shape.channels == 1:
        constants["channels"] = 1
    else:
        signature["channels"] = "i32" if shape.channels % 16 else "i32:16"
    signature |= dict.fromkeys(constants, "constexpr")
    tensors = "+".join(name for name in names if name in given)
    done = "+".join((*(op[0] for op in shape.ops), *(("pool",) if shape.pool else ())))
    sizes = f"{shape.images}x{shape.height}x{shape.width}x{shape.channels}"
    of = shape.norm + (f" in {shape.group_size}" * (shape.norm == "rows"))
    of += " by group" if by_group else ""
    name = f"norm {kernel} {kind} {of} [{done}] [{tensors}] {sizes}"
    function = sum_kernel if kernel == "sum" else apply_kernel
    return Launch(name, function, signature, constants, cut.warps, 1, (grid,))


@functools.lru_cache(maxsize=1024)
def describe_total(forward: bool, given: frozenset[str], tasks: int, size: int) -> Launch:
    """The launch that adds up parts, of `size` statistics."""
    columns = min(128, triton.next_power_of_2(size))
    names = ("partials", "totals", "w", "w_out", "b", "b_out")
    constants: dict[str, Any] = {name: None for name in names if name not in given}
    constants |= dict(FORWARD=forward, COLS=columns, SPLITS=8)
    signature = {name: "*fp32" for name in names if name in given}
    integers = ("tasks", "size", "splits", "split", "count", "w_task", "b_task")
    signature |= dict.fromkeys(integers, "i32")
    signature |= dict.fromkeys(("scale", "scale_b", "factor", "eps"), "fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    tensors = "+".join(name for name in names if name in given)
    name = f"norm total {'forward ' if forward else ''}[{tensors}] {columns}"
    grid = tasks * triton.cdiv(size, columns)
    return Launch(name, total_kernel, signature, constants, 4, 1, (grid,))


def sums(
    kind: str,
    shape: Shape,
    tasks: int,
    affine: Affine,
    by_group: bool = False,
    config: Config | None = None,
    **tensors: Tensor | None,
) -> Tensor:
    """The two sums of a pass, of each part of a task: [T, parts, 2, C], or of each group
    [T, 1, 2, N * groups]. tensors: those of TENSORS that the pass reads, x among them."""
    x = tensors["x"]
    assert x is not None
    parts, size = (1, shape.images * shape.groups) if by_group else (shape.parts, shape.channels)
    partials = x.new_empty(tasks, parts, 2, size)
    given = _given(affine, dict(tensors, partials=partials))
    launch = describe("sum", kind, frozenset(given), tasks, shape, by_group, config)
    _run(launch, given, shape, affine, tasks, splits=parts, split=SPLIT)
    return partials


def total(
    partials: Tensor,
    count: int,
    split: int = SPLIT,
    eps: float | None = None,
    factor: float = 1.0,
    totals: bool = True,
    w: Tensor | None = None,
    w_out: Tensor | None = None,
    scale: float = 1.0,
    b: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_b: float = 1.0,
) -> Tensor | None:
    """[2, T, size] from [T, parts, 2, size]: the sums times `factor`; with an eps, mean and r of
    parts' means and squares about them, of `split` numbers each and `count` together.

    w_out = w + scale times the second sum, b_out = b + scale_b times the first; w and b [T, size]
    or [size], or absent.
    """
    tasks, parts, _, size = partials.shape
    to = partials.new_empty(2, tasks, size) if totals else None
    tensors = dict(partials=partials, totals=to, w=w, w_out=w_out, b=b, b_out=b_out)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    launch = describe_total(eps is not None, frozenset(given), tasks, size)
    numbers = dict(tasks=tasks, size=size, splits=parts, split=split, count=count, factor=factor)
    numbers |= dict(w_task=_stride(w), b_task=_stride(b), scale=scale, scale_b=scale_b)
    arguments = {**launch.constants, **given, **numbers, "eps": eps or 0.0}
    launch.kernel[launch.grid](**arguments, num_warps=launch.num_warps, num_stages=1)
    return to


def apply(
    kind: str,
    shape: Shape,
    out: Tensor,
    affine: Affine,
    config: Config | None = None,
    **tensors: Tensor | None,
) -> None:
    """Write a pass's result to `out`: y or t_y [T, pooled pixels, C], dx or t_dx [T, pixels, C].

    tensors: those of APPLIED that the pass reads. `code` [T, pooled pixels, C] is written forward.
    """
    given = _given(affine, dict(tensors, out=out))
    launch = describe("apply", kind, frozenset(given), len(out), shape, False, config)
    _run(launch, given, shape, affine, len(out))


def new_code(shape: Shape, tasks: int, like: Tensor) -> Tensor | None:
    """Where a forward pass leaves which pixel was the largest; None where nothing is pooled."""
    if not shape.pool:
        return None
    return torch.empty(
        tasks, shape.out_pixels, shape.channels, dtype=torch.int8, device=like.device
    )


def _given(affine: Affine, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    tensors |= dict(gamma=affine.gamma, beta=affine.beta, lam=affine.lam, lam_b=affine.lam_b)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _stride(tensor: Tensor | None) -> int:
    """From task to task; 0 where all tasks share it."""
    return 0 if tensor is None or tensor.dim() == 1 else tensor.stride(0)


def _run(
    launch: Launch,
    given: dict[str, Tensor],
    shape: Shape,
    affine: Affine,
    tasks: int,
    **numbers: int,
) -> None:
    counts = dict(tasks=tasks, images=shape.images, height=shape.height, width=shape.width)
    counts |= dict(channels=shape.channels, groups=shape.groups, group_size=shape.group_size)
    strides = dict(gamma_task=_stride(affine.gamma), beta_task=_stride(affine.beta))
    rates = dict(rate=affine.rate, rate_b=affine.rate_b)
    arguments = {**launch.constants, **given, **counts, **strides, **rates, **numbers}
    launch.kernel[launch.grid](
        **arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
