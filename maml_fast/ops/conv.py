"""Convolutions of images, 3x3 and 1x1, by nn.Conv2d or F.conv2d."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_fast.ops.base import Features, NameOf, Weighted

KERNELS, STRIDES, PADDINGS = (1, 3), (1, 2), (0, 1)


@dataclass(frozen=True)
class Conv2d(Weighted):
    """A convolution of a plan: weight [K, C, kernel, kernel], bias [K]; zeros around the image."""

    weight: str
    bias: str | None
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def out_features(self, features: Features) -> Features:
        if len(features) != 3 or features[0] != self.in_channels:
            raise ValueError(
                f"rows have shape {list(features)}, wanted is [{self.in_channels}, height, width]"
            )
        around = 2 * self.padding - self.kernel
        height, width = ((n + around) // self.stride + 1 for n in features[1:])
        if height < 1 or width < 1:
            raise ValueError(
                f"images of {features[1]}x{features[2]} are smaller than the {self.kernel}x"
                f"{self.kernel} kernel"
            )
        return self.out_channels, height, width

    @property
    def shapes(self) -> tuple[Features, Features]:
        kernel = self.kernel, self.kernel
        return (self.out_channels, self.in_channels, *kernel), (self.out_channels,)

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        for kernel in KERNELS:
            for stride in STRIDES:
                for padding in PADDINGS:
                    yield cls("weight", "bias", 2, 3, kernel, stride, padding), (2, 5, 4)
        yield cls("weight", None, 1, 1, 3), (1, 3, 3)

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def __str__(self) -> str:
        text = f"conv {self.kernel}x{self.kernel} {self.in_channels}->{self.out_channels}"
        return f"{text} stride {self.stride}" if self.stride > 1 else text


def _call(
    name_of: NameOf,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Conv2d:
    name = name_of(weight)
    if name is None:
        raise ValueError("its weight is not one of the model's parameters")
    out_channels, in_channels, *size = weight.shape
    kernel, stride = _square("kernel", size, KERNELS), _square("stride", stride, STRIDES)
    if padding in ("same", "valid"):
        if padding == "same" and stride != 1:
            raise ValueError("padding is 'same' with a stride; wanted is a number")
        padding = kernel // 2 if padding == "same" else 0
    padding = _square("padding", padding, PADDINGS)
    if _square("dilation", dilation) != 1 or groups != 1:
        raise ValueError(f"dilation is {dilation} and groups is {groups}; planned is 1 for both")
    return Conv2d(name, name_of(bias), in_channels, out_channels, kernel, stride, padding)


def _square(what: str, value: Any, known: tuple[int, ...] = ()) -> int:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(set(sizes)) != 1 or (known and sizes[0] not in known):
        planned = f"{' and '.join(map(str, known))}, " if known else ""
        raise ValueError(f"{what} is {value}; planned are {planned}the same both ways")
    return int(sizes[0])


def _module(module: nn.Conv2d, name_of: NameOf) -> Conv2d:
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {module.padding_mode!r}; planned is 'zeros'")
    return _call(
        name_of,
        None,
        module.weight,
        module.bias,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
    )


Conv2d.modules = {nn.Conv2d: _module}
Conv2d.calls = dict.fromkeys((F.conv2d, torch.conv2d), _call)
