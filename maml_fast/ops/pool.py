"""Pooling of images [C, height, width]: maximum, average, and the mean over all positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_fast.ops.base import Features, Operation

MAX_POOL_CALLS = (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)


def _pair(what: str, value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    sizes = sizes * 2 if len(sizes) == 1 else sizes
    if len(sizes) != 2 or not all(isinstance(n, int) for n in sizes):
        raise ValueError(f"{what} is {value}; wanted are one or two numbers")
    return sizes


class _Windows(Operation):
    """Pooling of windows `kernel`, `stride` apart; what is left at the edges is dropped."""

    def __init__(self, kernel: Any, stride: Any = None) -> None:
        self.kernel = _pair("kernel_size", kernel)
        self.stride = self.kernel if stride in (None, [], ()) else _pair("stride", stride)

    def out_features(self, features: Features) -> Features:
        if len(features) != 3:
            raise ValueError(f"rows have shape {list(features)}, wanted is [C, height, width]")
        channels, *sizes = features
        pairs = zip(sizes, self.kernel, self.stride, strict=True)
        height, width = ((n - k) // s + 1 for n, k, s in pairs)
        if height < 1 or width < 1:
            raise ValueError(f"images of {sizes[0]}x{sizes[1]} are smaller than its window")
        return channels, height, width


class MaxPool(_Windows):
    """Windows 2x2 side by side. saved: where each maximum was, and the shape before.

    Of equal numbers the first counts, as in torch; NaN is the largest.
    """

    native = ("max_pool", ())
    modules = {
        nn.MaxPool2d: lambda m: MaxPool.of(
            None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        )
    }
    calls = dict.fromkeys(
        MAX_POOL_CALLS, lambda input, *args, **named: MaxPool.of(input, *args, **named)
    )

    @classmethod
    def of(
        cls,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> MaxPool:
        op = cls(kernel_size, stride)
        plain = _pair("padding", padding) == (0, 0) and _pair("dilation", dilation) == (1, 1)
        if op.kernel != (2, 2) or op.stride != (2, 2) or not plain or ceil_mode or return_indices:
            raise ValueError(
                "planned are windows 2x2 side by side, without padding, dilation, ceil_mode or "
                "return_indices"
            )
        return op

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        y, places = F.max_pool2d(x.flatten(0, 2), 2, return_indices=True)
        return y.unflatten(0, x.shape[:3]), (places.unflatten(0, x.shape[:3]), x.shape)

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        places, shape = saved
        dx = dy.new_zeros(shape).flatten(3)
        return dx.scatter_(3, places.flatten(3), dy.flatten(3)).view(shape)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        if t_x is None:
            return None
        places, _ = saved
        return t_x.flatten(3).gather(3, places.flatten(3)).view(places.shape)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return self.backward(step, saved, t_dy)

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(2), (3, 4, 6)
        yield cls(2), (2, 5, 7)

    def oracle(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    def __str__(self) -> str:
        return "max pool 2x2"


class AveragePool(_Windows):
    """saved: the shape before."""

    modules = {
        nn.AvgPool2d: lambda m: AveragePool.of(
            None,
            m.kernel_size,
            m.stride,
            m.padding,
            m.ceil_mode,
            m.count_include_pad,
            m.divisor_override,
        )
    }
    calls = dict.fromkeys(
        (F.avg_pool2d, torch._C._nn.avg_pool2d),
        lambda input, *args, **named: AveragePool.of(input, *args, **named),
    )

    def __init__(self, kernel: Any, stride: Any = None) -> None:
        super().__init__(kernel, stride)
        self.native = ("average_pool", (*map(float, self.kernel), *map(float, self.stride)))

    @classmethod
    def of(
        cls,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> AveragePool:
        if _pair("padding", padding) != (0, 0) or ceil_mode or divisor_override is not None:
            raise ValueError("planned is no padding, ceil_mode or divisor_override")
        return cls(kernel_size, stride)

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return self._pooled(x), x.shape

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        (kh, kw), (sh, sw) = self.kernel, self.stride
        _, height, width = self.out_features(tuple(saved[2:]))
        share, dx = dy / (kh * kw), dy.new_zeros(saved)
        for y in range(kh):
            for x in range(kw):
                rows = slice(y, y + (height - 1) * sh + 1, sh)
                dx[..., rows, x : x + (width - 1) * sw + 1 : sw] += share
        return dx

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else self._pooled(t_x)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return self.backward(step, saved, t_dy)

    def _pooled(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.flatten(0, 2), self.kernel, self.stride)
        return pooled.unflatten(0, x.shape[:3])

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(2), (3, 4, 7)
        yield cls(3, 2), (2, 7, 5)

    def oracle(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.kernel, self.stride)

    def __str__(self) -> str:
        return f"average pool {self.kernel[0]}x{self.kernel[1]}"


class GlobalMean(Operation):
    """The mean over all positions: [C, height, width] -> [C], or [C, 1, 1] with `keeps`.

    By nn.AdaptiveAvgPool2d(1), or `x.mean((2, 3))`. saved: the shape before.
    """

    native = ("global_mean", ())
    modules = {nn.AdaptiveAvgPool2d: lambda module: GlobalMean.adaptive(None, module.output_size)}
    calls = {
        F.adaptive_avg_pool2d: lambda input, output_size: GlobalMean.adaptive(input, output_size),
        **dict.fromkeys(
            (torch.mean, "mean"),
            lambda input, dim=None, keepdim=False, *, dtype=None: GlobalMean.by_mean(
                dim, keepdim, dtype
            ),
        ),
    }

    def __init__(self, keeps: bool = False) -> None:
        self.keeps = keeps

    @classmethod
    def adaptive(cls, input: Any, output_size: Any) -> GlobalMean:
        if _pair("output_size", output_size) != (1, 1):
            raise ValueError(f"output_size is {output_size}; planned is 1")
        return cls(keeps=True)

    @classmethod
    def by_mean(cls, dim: Any, keepdim: bool, dtype: Any) -> GlobalMean:
        dims = sorted(dim) if isinstance(dim, (tuple, list)) else [dim]
        if dims not in ([2, 3], [-2, -1]) or dtype is not None:
            raise ValueError(f"a mean over dim {dim}; planned is over (2, 3), the positions")
        return cls(keepdim)

    def out_features(self, features: Features) -> Features:
        if len(features) != 3:
            raise ValueError(f"rows have shape {list(features)}, wanted is [C, height, width]")
        return (features[0], 1, 1) if self.keeps else features[:1]

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return x.mean((3, 4), keepdim=self.keeps), x.shape

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        share = dy / (saved[3] * saved[4])
        return share.view(*share.shape[:3], 1, 1).expand(saved)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else t_x.mean((3, 4), keepdim=self.keeps)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return self.backward(step, saved, t_dy)

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (3, 4, 5)
        yield cls(keeps=True), (2, 3, 1)

    def oracle(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keeps)

    def __str__(self) -> str:
        return "mean over positions"
