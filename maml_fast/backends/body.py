"""Layers below all that adapts: every task has the same, so they run once, and are differentiated
once for all tasks.

The meta-step above them gives the loss's gradient by their results; from there on this is plain
backpropagation, on rows of all tasks together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maml_fast.backends.specs import spec_of
from maml_fast.fast_weights import Still, shared_stage
from maml_fast.layers import LayerPlan
from maml_fast.ops import Operation, Stage, Weighted
from maml_fast.problem import Problem
from maml_fast.recorder import Recorder, watched


class Body:
    """The layers of a plan's body, for one chunk of tasks."""

    def __init__(
        self, layers: list[LayerPlan], problem: Problem, recorder: Recorder | None = None
    ) -> None:
        self.problem = problem
        self.stages: list[Stage] = []
        self.ops: list[Operation | Weighted] = [layer.link.op for layer in layers]
        for i, op in enumerate(self.ops):
            stage = op if isinstance(op, Operation) else shared_stage(spec_of(op, problem, 1))
            self.stages.append(watched(stage, (i,), recorder))
        learns = [isinstance(op, Weighted) and bool(self._learned(op)) for op in self.ops]
        # Nothing learns below this one
        self.lowest = learns.index(True) if True in learns else len(learns)

    def _learned(self, op: Weighted) -> list[str]:
        return [name for name in op.parameters if name in self.problem.learned]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """x [T, rows, ...] -> the last layer's result, and what `backward` needs."""
        kept = []
        for stage in self.stages:
            x, saved = stage.forward(0, x)
            kept.append(saved)
        return x, kept

    def backward(
        self, kept: list[Any], dy: Tensor, found: dict[str, Tensor], wants_input: bool
    ) -> Tensor | None:
        """Adds gradients of parameters, summed over tasks, to `found`; that of x if it is wanted.

        dy: the gradient by what `forward` gave.
        """
        lowest = 0 if wants_input else self.lowest
        for i in range(len(self.stages) - 1, lowest - 1, -1):
            stage, op = self.stages[i], self.ops[i]
            if isinstance(op, Weighted) and (names := self._learned(op)):
                assert isinstance(stage, Still)
                for name, gradient in zip(
                    (op.weight, op.bias), stage.gradients(kept[i], dy), strict=True
                ):
                    if name in names and gradient is not None:
                        found[name] = found[name] + gradient if name in found else gradient
            if i > lowest or wants_input:
                dy = stage.backward(0, kept[i], dy)
        return dy if wants_input else None
