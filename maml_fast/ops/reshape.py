"""Flatten and its kin: the same numbers in rows of another shape. All four rules reshape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast.ops.base import Features, Operation


class Rearrange(Operation):
    """Rows rearranged as `out_features` says; `saved` is the shape before."""

    native = ("reshape", ())

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return x.reshape(*x.shape[:2], *self.out_features(tuple(x.shape[2:]))), x.shape

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return dy.reshape(saved)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else t_x.reshape(dy.shape)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return t_dy.reshape(saved)


class Reshape(Rearrange):
    """Rows [*features] -> [*shape]; one entry of `shape` may be -1, as in torch."""

    def __init__(self, shape: Features) -> None:
        self.shape = shape

    def out_features(self, features: Features) -> Features:
        known, size = math.prod(n for n in self.shape if n != -1), math.prod(features)
        if self.shape.count(-1) > 1 or (size % known if -1 in self.shape else size != known):
            raise ValueError(f"cannot reshape rows of shape {list(features)} to {list(self.shape)}")
        return tuple(size // known if n == -1 else n for n in self.shape)

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls((-1,)), (2, 3, 4)
        yield cls((4, -1)), (2, 6)

    def oracle(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)

    def __str__(self) -> str:
        return f"reshape{list(self.shape)}"


class Flatten(Rearrange):
    """nn.Flatten(start_dim, end_dim) of [rows, *features]; the rows themselves stay."""

    modules = {nn.Flatten: lambda module: Flatten(module.start_dim, module.end_dim)}
    calls = dict.fromkeys(
        (torch.flatten, "flatten"),
        lambda input, start_dim=0, end_dim=-1: Flatten(start_dim, end_dim),
    )

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def out_features(self, features: Features) -> Features:
        dims = 1 + len(features)  # as the model sees a task: [rows, *features]
        start, end = (d + dims if d < 0 else d for d in (self.start_dim, self.end_dim))
        if start < 1:
            raise ValueError("flattens the rows of a task into one; start_dim=1 keeps them")
        inner = math.prod(features[start - 1 : end])
        return (*features[: start - 1], inner, *features[end:])

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (2, 3, 4)
        yield cls(2, -1), (2, 3, 4)
        yield cls(1, -2), (2, 3, 4)

    def oracle(self, x: Tensor) -> Tensor:
        return torch.flatten(x, self.start_dim, self.end_dim)

    def __str__(self) -> str:
        return "flatten"


class Squeeze(Rearrange):
    """Drops a feature axis of length 1, as `prediction.squeeze(-1)` does."""

    calls = dict.fromkeys((torch.squeeze, "squeeze"), lambda input, dim=None: Squeeze(dim))

    def __init__(self, dim: int | None) -> None:
        if not isinstance(dim, int):
            raise ValueError("squeeze without one dim may drop the rows; name the dim")
        self.dim = dim

    def out_features(self, features: Features) -> Features:
        axis = self.dim + len(features) if self.dim < 0 else self.dim - 1
        if not 0 <= axis < len(features):
            raise ValueError("squeezes the rows of a task; name a feature axis")
        if features[axis] != 1:
            return features
        return (*features[:axis], *features[axis + 1 :])

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(-1), (3, 1)
        yield cls(1), (1, 4)
        yield cls(2), (3, 4)

    def oracle(self, x: Tensor) -> Tensor:
        return x.squeeze(self.dim)

    def __str__(self) -> str:
        return "squeeze"


class MergeRows(Rearrange):
    """[T, N, *positions, I] -> [T, N * positions, I], for a linear layer on more than one position.

    The plan puts it before such a layer and `SplitRows` behind; no model has it of its own.
    """

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return x.flatten(1, -2), x.shape


class SplitRows(Rearrange):
    """[T, N * positions, O] -> [T, N, *positions, O]"""

    def __init__(self, positions: Features) -> None:
        self.positions = positions

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return x.unflatten(1, (-1, *self.positions)), x.shape
