"""Layers that get a meta-gradient and do not adapt, among those that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maml_fast.fast_weights.base import FastLayer, LayerSpec, Pair, Still, added


class StillLayer(FastLayer):
    """A layer that does not adapt among those that do, and gets a meta-gradient: Lam is one sum
    over all tasks, and no tangent moves its parameters."""

    def __init__(self, spec: LayerSpec, stage: Still) -> None:
        super().__init__(spec)
        self.stage = stage
        self.lam: Pair = None, None

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return self.stage.forward(step, x)

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return self.stage.backward(step, saved, dy)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return self.stage.tangent(step, saved, dy, t_x)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return self.stage.tangent_backward(step, saved, dy, t_x, t_dy)

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        pass

    def add_query(self, step: int, saved: Any, dy: Tensor) -> None:
        weight, bias = self.stage.gradients(saved, dy)
        self.lam = added(self.lam[0], weight), added(self.lam[1], bias)

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        weight, bias = self.stage.t_gradients(saved, dy, t_x, t_dy)
        self.lam = added(self.lam[0], weight, -1), added(self.lam[1], bias, -1)

    def gradient_sums(self) -> Pair:
        return self.lam

    def weights(self, step: int) -> Pair:
        tasks = self.spec.tasks
        w, b = (
            None if p is None else p.expand(tasks, *p.shape)
            for p in (self.spec.weight, self.spec.bias)
        )
        return w, b

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        raise AssertionError("it has no rates")


class StepwiseLayer(FastLayer):
    """A layer that does not adapt, and has values of its own for each step and the query: a still
    layer for each."""

    def __init__(self, spec: LayerSpec, of_steps: Sequence[StillLayer], by_step: tuple[bool, bool]):
        """by_step: whether weight and bias have; the other is the same at every step."""
        super().__init__(spec)
        self.of_steps, self.by_step = of_steps, by_step

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return self.of_steps[step].forward(step, x)

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return self.of_steps[step].backward(step, saved, dy)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return self.of_steps[step].tangent(step, saved, dy, t_x)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return self.of_steps[step].tangent_backward(step, saved, dy, t_x, t_dy)

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        pass

    def add_query(self, step: int, saved: Any, dy: Tensor) -> None:
        self.of_steps[step].add_query(step, saved, dy)

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        self.of_steps[step].pull_back(step, saved, dy, t_x, t_dy)

    def gradient_sums(self) -> Pair:
        found: list[Tensor | None] = [None, None]
        for i, (by_step, p) in enumerate(zip(self.by_step, self._parameters(0), strict=True)):
            parts = [layer.lam[i] for layer in self.of_steps]
            if p is not None and any(part is not None for part in parts):
                whole = torch.stack(
                    [torch.zeros_like(p) if part is None else part for part in parts]
                )
                found[i] = whole if by_step else whole.sum(0)
        return found[0], found[1]

    def _parameters(self, step: int) -> Pair:
        spec = self.of_steps[step].spec
        return spec.weight, spec.bias

    def weights(self, step: int) -> Pair:
        return self.of_steps[step].weights(step)

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        raise AssertionError("it has no rates")
