"""Launches of the convolution kernels: what they sum, how the work is cut, and their outputs.

T tasks, N images of a task, C/K in and out channels; images [T, N, height, width, channels],
weights [T, taps, C, K] or [taps, C, K] for all tasks. `conv_kernel.py` says what is computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton

from .conv_kernel import COUNTS, STRIDES, conv_kernel, outer_kernel
from .launch import Launch

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("forward", "backward", "outer")
TENSORS = {
    "conv": ("x", "weight", "x2", "weight2", "bias", "out", "partials"),
    "outer": ("x", "d", "x2", "d2", "base", "bias", "out", "bias_out"),
}
FOLDED = 16  # channels from which on they are summed tap by tap


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes: of one task's images before it, and of its own."""

    images: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def rows(self) -> int:
        """Pixels of a task before it."""
        return self.images * self.height * self.width

    @property
    def out_rows(self) -> int:
        """Pixels of a task behind it."""
        return self.images * self.out_height * self.out_width


@dataclass(frozen=True)
class Config:
    """How the work is cut: rows of the tile (pixels; of `outer`, taps' channels), its columns, and
    numbers summed at a time."""

    rows: int
    columns: int
    summed: int
    warps: int
    stages: int


def default_config(kind: str, geometry: Geometry) -> Config:
    """Tiles that fit the registers, as compiled for sm_90; nothing was timed yet."""
    g = geometry
    before, behind = g.channels, g.out_channels
    if kind == "outer":
        folded = before < FOLDED
        rows = min(64, _power(g.taps * before if folded else before))
        return Config(rows, min(64, _power(behind)), 32, 4, 2)
    if kind == "backward":
        before, behind = behind, before
    summed = 32 if before % 32 == 0 or (before < FOLDED and before * g.taps > 16) else 16
    pixels = (
        g.out_rows
        if kind == "forward"
        else g.images * -(-g.height // g.stride) * -(-g.width // g.stride)
    )
    return Config(min(64, _power(pixels)), min(64, _power(behind)), summed, 4, 2)


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def tiles_of(geometry: Geometry, config: Config | None = None) -> tuple[int, int]:
    """How many tiles of a task's pixels the forward pass has, each with partial statistics, and
    pixels of each."""
    cut = config or default_config("forward", geometry)
    return triton.cdiv(geometry.out_rows, cut.rows), cut.rows


@functools.lru_cache(maxsize=1024)
def describe(
    kind: str,
    given: frozenset[str],
    tasks: int,
    geometry: Geometry,
    precision: str,
    config: Config | None = None,
) -> Launch:
    """The launch of one product; `given` are the names of the tensors that there are."""
    assert kind in KINDS
    g, cut = geometry, config or default_config(kind, geometry)
    tensors = TENSORS["outer" if kind == "outer" else "conv"]
    constants: dict[str, Any] = {name: None for name in tensors if name not in given}
    constants |= dict(KERNEL=g.kernel, STRIDE=g.stride, PADDING=g.padding, PRECISION=precision)
    before, behind = g.channels, g.out_channels
    if kind == "backward":
        before, behind = behind, before
    constants |= dict(FOLD=before < FOLDED, BLOCK_O=cut.columns)
    if kind == "outer":
        constants |= dict(BLOCK_M=cut.rows, BLOCK_R=cut.summed)
    else:
        constants |= dict(BACKWARD=kind == "backward", BLOCK_R=cut.rows, BLOCK_C=cut.summed)
    signature = {name: "*fp32" for name in tensors if name in given}
    signature |= dict.fromkeys(COUNTS, "i32") | dict(scale="fp32", bias_scale="fp32")
    strides = [name for name in STRIDES if kind != "outer" or name != "w2_task"]
    signature |= dict.fromkeys(strides, "i32")
    for name, size in (("channels", before), ("out_channels", behind)):
        if size == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if size % 16 else "i32:16"
    signature |= dict.fromkeys(constants, "constexpr")
    if kind == "outer":
        of_taps = triton.cdiv(g.taps * g.channels, cut.rows)
        down = of_taps if before < FOLDED else g.taps * triton.cdiv(g.channels, cut.rows)
    elif kind == "forward":
        down = triton.cdiv(g.out_rows, cut.rows)
    else:
        pixels = triton.cdiv(g.height, g.stride) * triton.cdiv(g.width, g.stride)
        down = g.stride**2 * triton.cdiv(g.images * pixels, cut.rows)
    grid = tasks * down * triton.cdiv(behind, cut.columns)
    names = "+".join(name for name in tensors if name in given and name != "out")
    shape = f"{g.images}x{g.height}x{g.width} {g.channels}-{g.out_channels}"
    geometry_name = f"{g.kernel}x{g.kernel}/{g.stride}+{g.padding}"
    name = f"conv {kind} [{names}] {geometry_name} {shape} {precision}"
    kernel = outer_kernel if kind == "outer" else conv_kernel
    return Launch(name, kernel, signature, constants, cut.warps, cut.stages, (grid,))


def convolve(
    kind: str,
    geometry: Geometry,
    out: Tensor,
    precision: str,
    x: Tensor | None,
    weight: Tensor | None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
    partials: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write conv(x, weight) + scale conv(x2, weight2) + bias_scale bias to `out` [T, pixels, K]; of
    kind "backward", with the transposed weights, [T, pixels, C]. Either pair may be absent.

    bias: [T, K] or [K]. partials: [T, tiles, 2, K] of `tiles_of`, the forward pass's own mean and
    sum of squares about it of each tile.
    """
    tensors = dict(x=x, weight=weight, x2=x2, weight2=weight2, bias=bias, out=out)
    tensors |= dict(partials=partials)
    strides = dict(
        w_task=_stride(weight, 3), w2_task=_stride(weight2, 3), bias_task=_stride(bias, 1)
    )
    _launch(kind, tensors, strides, len(out), geometry, precision, scale, bias_scale, config)


def outer(
    geometry: Geometry,
    out: Tensor,
    precision: str,
    x: Tensor,
    d: Tensor,
    x2: Tensor | None = None,
    d2: Tensor | None = None,
    scale: float = 1.0,
    base: Tensor | None = None,
    bias_out: Tensor | None = None,
    bias_scale: float = 1.0,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write base + scale (outer(x, d) + outer(x2, d2)) to `out` [T, taps, C, K], and bias +
    bias_scale times the sum of d over pixels to `bias_out` [T, K]."""
    tensors = dict(x=x, d=d, x2=x2, d2=d2, base=base, bias=bias, out=out, bias_out=bias_out)
    strides = dict(w_task=_stride(base, 3), bias_task=_stride(bias, 1))
    _launch("outer", tensors, strides, len(out), geometry, precision, scale, bias_scale, config)


def _stride(tensor: Tensor | None, dims: int) -> int:
    """From task to task; 0 where all tasks share it."""
    return 0 if tensor is None or tensor.dim() == dims else tensor.stride(0)


def _launch(
    kind: str,
    tensors: dict[str, Tensor | None],
    strides: dict[str, int],
    tasks: int,
    geometry: Geometry,
    precision: str,
    scale: float,
    bias_scale: float,
    config: Config | None,
) -> None:
    g = geometry
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    launch = describe(kind, frozenset(given), tasks, g, precision, config)
    before = g.height, g.width, g.channels
    behind = g.out_height, g.out_width, g.out_channels
    if kind == "backward":
        before, behind = behind, before
    counts = dict(zip(("height", "width", "channels"), before, strict=True))
    counts |= dict(zip(("out_height", "out_width", "out_channels"), behind, strict=True))
    numbers = dict(images=g.images, scale=scale, bias_scale=bias_scale, **counts, **strides)
    arguments = {**launch.constants, **given, **numbers}
    launch.kernel[launch.grid](
        **arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
