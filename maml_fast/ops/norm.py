"""Normalisation: y = gamma * (x - mean) / sqrt(variance + eps) + beta.

Batch norm (Ioffe and Szegedy 2015) takes mean and variance of each channel over the task's own
rows, always: as in the MAML paper, support and query each by their own statistics (transductive),
and running statistics are neither read nor updated. Layer norm (Ba et al. 2016) and group norm
(Wu and He 2018) take them over each row by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from maml_fast.ops.base import Features, NameOf, Weighted

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_RUNNING = (
    "would normalise by running statistics in eval(), which MAML never does: it takes those of "
    "each task's own rows, as in train(); "
)
RUNNING = _RUNNING + (
    "call train() of it, or build it with track_running_stats=False, for which eval() changes "
    "nothing"
)
RUNNING_CALL = _RUNNING + "call train(), or pass {}=True"


class Norm(Weighted):
    """A normalisation of a plan; `weight` is gamma, `bias` is beta."""

    eps: float

    def split(self, features: Features) -> tuple[Features, tuple[int, ...], Features]:
        """How rows [N, *features] are seen: [N, *view]; mean and variance are over `axes` of that,
        and gamma and beta have shape `affine` there (without N)."""
        raise NotImplementedError

    def out_features(self, features: Features) -> Features:
        self.split(features)
        return features


@dataclass(frozen=True)
class BatchNorm(Norm):
    """Of channels, the first axis of a row; one gamma and beta a channel."""

    weight: str | None
    bias: str | None
    channels: int
    eps: float = 1e-5

    def split(self, features: Features) -> tuple[Features, tuple[int, ...], Features]:
        _check_channels(features, self.channels)
        positions = features[1:]
        axes = (0, *range(2, 2 + len(positions)))
        return features, axes, (self.channels, *(1 for _ in positions))

    @property
    def shapes(self) -> tuple[Features, Features]:
        return (self.channels,), (self.channels,)

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        yield cls("weight", "bias", 4), (4,)
        yield cls(None, "bias", 2, 1e-3), (2, 3, 4)
        yield cls("weight", None, 1), (1, 5)
        yield cls(None, None, 3), (3, 2, 2)

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

    def __str__(self) -> str:
        return f"batch norm {self.channels}"


@dataclass(frozen=True)
class GroupNorm(Norm):
    """Of groups of channels, each row by itself; one gamma and beta a channel."""

    weight: str | None
    bias: str | None
    groups: int
    channels: int
    eps: float = 1e-5

    def split(self, features: Features) -> tuple[Features, tuple[int, ...], Features]:
        _check_channels(features, self.channels)
        size, positions = self.channels // self.groups, features[1:]
        axes = tuple(range(2, 3 + len(positions)))
        return (self.groups, size, *positions), axes, (self.groups, size, *(1 for _ in positions))

    @property
    def shapes(self) -> tuple[Features, Features]:
        return (self.channels,), (self.channels,)

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        yield cls("weight", "bias", 2, 4), (4,)
        yield cls("weight", "bias", 1, 3), (3, 2, 3)
        yield cls(None, "bias", 2, 2, 1e-3), (2, 3, 4)
        yield cls(None, None, 2, 6), (6, 5)

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def __str__(self) -> str:
        return f"group norm {self.channels} in {self.groups}"


@dataclass(frozen=True)
class LayerNorm(Norm):
    """Of the last axes of a row, [.., *shape]; gamma and beta have that shape."""

    weight: str | None
    bias: str | None
    shape: Features
    eps: float = 1e-5

    def split(self, features: Features) -> tuple[Features, tuple[int, ...], Features]:
        before = len(features) - len(self.shape)
        if before < 0 or features[before:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"rows have shape {list(features)}, wanted is [.., {wanted}]")
        axes = tuple(range(1 + before, 1 + len(features)))
        return features, axes, (*(1 for _ in range(before)), *self.shape)

    @property
    def shapes(self) -> tuple[Features, Features]:
        return self.shape, self.shape

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        yield cls("weight", "bias", (4,)), (4,)
        yield cls("weight", "bias", (3, 4)), (2, 3, 4)
        yield cls(None, "bias", (4,), 1e-3), (2, 3, 4)
        yield cls("weight", None, (2, 1, 4)), (2, 1, 4)
        yield cls(None, None, (5,)), (5,)

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.shape, weight, bias, self.eps)

    def __str__(self) -> str:
        return f"layer norm {'x'.join(map(str, self.shape))}"


NORMS = (BatchNorm, GroupNorm, LayerNorm)


def runs_on_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Whether torch would normalise by running statistics in eval(), and update them in train()."""
    return isinstance(module, _NormBase) and isinstance(module.running_mean, Tensor)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Norms in train() take the statistics of the rows, as ever, and update no running ones."""
    tracking = [
        module
        for module in model.modules()
        if runs_on_statistics(module) and module.training and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def _check_channels(features: Features, channels: int) -> None:
    if not features or features[0] != channels:
        raise ValueError(f"rows have shape {list(features)}, wanted is [{channels}, ..]")


def _batch_module(module: Any, name_of: NameOf) -> BatchNorm:
    if runs_on_statistics(module) and not module.training:
        raise ValueError(RUNNING)
    weight, bias = name_of(module.weight), name_of(module.bias)
    return BatchNorm(weight, bias, module.num_features, module.eps)


def _batch_call(
    name_of: NameOf,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNorm:
    if not training:
        raise ValueError(RUNNING_CALL.format("training"))
    sized = next((t for t in (weight, bias, running_mean) if isinstance(t, Tensor)), None)
    if sized is None:
        raise ValueError(
            "has neither parameters nor buffers; nn.BatchNorm2d says how many channels"
        )
    return BatchNorm(name_of(weight), name_of(bias), len(sized), eps)


def _torch_batch_call(
    name_of: NameOf,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BatchNorm:
    return _batch_call(
        name_of, input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _group_call(
    name_of: NameOf,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # of torch.group_norm alone
    *,
    channels: int | None = None,
) -> GroupNorm:
    if channels is None:
        sized = weight if isinstance(weight, Tensor) else bias
        if not isinstance(sized, Tensor):
            raise ValueError("has no parameters; nn.GroupNorm says how many channels")
        channels = len(sized)
    return GroupNorm(name_of(weight), name_of(bias), num_groups, channels, eps)


def _group_module(module: nn.GroupNorm, name_of: NameOf) -> GroupNorm:
    weight, bias, channels = module.weight, module.bias, module.num_channels
    eps, groups = module.eps, module.num_groups
    return _group_call(name_of, None, groups, weight, bias, eps, channels=channels)


def _layer_call(
    name_of: NameOf,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # of torch.layer_norm alone
) -> LayerNorm:
    return LayerNorm(name_of(weight), name_of(bias), tuple(normalized_shape), eps)


def _layer_module(module: nn.LayerNorm, name_of: NameOf) -> LayerNorm:
    shape = module.normalized_shape
    return _layer_call(name_of, None, shape, module.weight, module.bias, module.eps)


BatchNorm.modules = dict.fromkeys(BATCH_NORMS, _batch_module)
BatchNorm.calls = {F.batch_norm: _batch_call, torch.batch_norm: _torch_batch_call}
GroupNorm.modules = {nn.GroupNorm: _group_module}
GroupNorm.calls = {F.group_norm: _group_call, torch.group_norm: _group_call}
LayerNorm.modules = {nn.LayerNorm: _layer_module}
LayerNorm.calls = {F.layer_norm: _layer_call, torch.layer_norm: _layer_call}


def size_of(norm: Norm, features: Features) -> int:
    """How many numbers of one row share a mean and a variance."""
    view, axes, _ = norm.split(features)
    return math.prod(view[axis - 1] for axis in axes if axis)
