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
NameOf = Callable[[Any], str | None]  # the name of a parameter; None of None; ValueError


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


class Weighted:
    """An operation with up to two parameters, that may adapt.

    The rules live in `maml_fast.fast_weights`, for each form that the parameters take there.
    `weight` and `bias` are names in `model.named_parameters()`; None where there is none.
    """

    weight: str | None
    bias: str | None

    # As those of `Operation`, but builders get the module and `name_of`, or `name_of` and the
    # call's arguments.
    modules: ClassVar[dict[type[nn.Module], Callable[[Any, NameOf], Weighted]]] = {}
    calls: ClassVar[dict[Callable[..., Any] | str, Callable[..., Weighted]]] = {}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def out_features(self, features: Features) -> Features:
        """The shape of a row after the operation; ValueError if it cannot take this one."""
        raise NotImplementedError

    @property
    def shapes(self) -> tuple[Features, Features]:
        """Of a weight and of a bias."""
        raise NotImplementedError

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        """Operations with a "weight" and a "bias", or without, and row shapes for the tests."""
        raise NotImplementedError

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same operation of one task by torch, for the tests."""
        raise NotImplementedError
