"""What every operation answers: four rules, and how it is recognised in a model.

The rules of y = f(x), with d the cotangent and t the tangent of a value:
    forward            x -> y                        and what the other rules need of this pass
    backward           dy -> dx
    tangent            t_x -> t_y                    the tangent of forward
    tangent_backward   t_x, t_dy -> t_dx             the tangent of backward
The tangent rules get the saved primal values, so they compute tangents only. A tangent that is
None is zero. `step` is the inner step k whose weights are meant; only weighted operations look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

Features = tuple[int, ...]  # the shape of one row: [T, N, *features]


class Stage:
    """One operation at work inside a meta-step."""

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        raise NotImplementedError

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        raise NotImplementedError

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        raise NotImplementedError


class Operation(Stage):
    """An operation without weights: it is its own stage.

    `modules` and `calls` say which modules, functions and tensor methods (by name) it stands for,
    and build it from the module, or from the call's arguments with `input` in the first place.
    """

    modules: ClassVar[dict[type[nn.Module], Callable[[Any], Operation]]] = {}
    calls: ClassVar[dict[Callable[..., Any] | str, Callable[..., Operation]]] = {}

    # What the compiled backends call the operation, and its constants; None: they do not have it.
    native: tuple[str, tuple[float, ...]] | None = None

    def out_features(self, features: Features) -> Features:
        """The shape of a row after the operation; ValueError if it cannot take this one."""
        return features

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        """Operations and row shapes for the tests to walk."""
        raise NotImplementedError

    def oracle(self, x: Tensor) -> Tensor:
        """The same operation by torch, for the tests: [R, *features] -> [R, *out_features]."""
        raise NotImplementedError
