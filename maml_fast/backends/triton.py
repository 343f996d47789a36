"""The meta-step on Triton's kernels: fused in one launch, or layer by layer.

Kernels are compiled when they are first launched, and Triton keeps them on disk. On a GPU a
meta-step that comes a second time with data of the same shapes becomes a CUDA graph
(`cuda_graphs.py`), and the tiles of the fused kernel are chosen by measuring (`tuning.py`).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends import stepping
from maml_fast.backends.triton_fused import FusedStep
from maml_fast.backends.triton_step import PreparedStep, Results, places
from maml_fast.layers import Variant
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, Stepper, TaskBatch

PROGRAMS_KEPT = 8  # of a plan
_LOCK = threading.Lock()


def meta_step(problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> Outcome:
    """The whole meta-step of one pass."""
    assert plan.triton is not None
    assert isinstance(problem.loss, str)  # the plan refuses others
    variant = Variant(
        problem.loss,
        problem.inner_steps,
        batch.support_x.shape[1],
        batch.query_x.shape[1],
        problem.first_order,
        gradient,
        False,
        tuple(problem.rates.values),
        problem.rates.learning if gradient else frozenset(),
    )
    key = variant, batch.tasks, plan.triton
    with _LOCK:
        step = plan.programs.pop(key, None)
        if step is None:
            kind = FusedStep if plan.triton.kernels == "fused" else LayersStep
            step = kind(plan, variant, problem)
        plan.programs[key] = step  # the latest last
        if len(plan.programs) > PROGRAMS_KEPT:
            plan.programs.pop(next(iter(plan.programs)))
        return step.run(problem, batch)


class LayersStep(PreparedStep):
    """Layer by layer."""

    def __init__(self, plan: Plan, variant: Variant, problem: Problem) -> None:
        super().__init__(plan, variant)
        self._rates: tuple[object, Tensor | None] = (None, None)

    def key(self, problem: Problem) -> object:
        return places(problem.parameters), tuple(problem.rates.values.items())

    def launch(self, problem: Problem, batch: TaskBatch) -> Results:
        rates = tuple(problem.rates.values.items())
        if rates != self._rates[0]:  # not while a graph is captured: those rates came before
            self._rates = rates, _layers().rate_table(problem, self.plan)
        stepper = layer_stepper(problem, batch, self.plan, self.variant.gradient, self._rates[1])
        outcome = stepping.drive(stepper, problem.inner_steps, self.variant.gradient)
        parts = [outcome.task_losses, outcome.support_losses.flatten()]
        if outcome.gradients is not None:
            parts += [gradient.flatten() for gradient in outcome.gradients.values()]
            parts += self._by_layer(outcome.rate_gradients or {})
        numbers = torch.cat(parts)
        return Results(numbers, outcome.query_outputs, numbers.sum())

    def _by_layer(self, rate_gradients: Mapping[str, Tensor]) -> list[Tensor]:
        if not rate_gradients:
            return []
        zeros = next(iter(rate_gradients.values())) * 0
        names = [name or "" for op in self.ops for name in (op.weight, op.bias)]
        by_layer = [rate_gradients.get(name, zeros) for name in names]
        return [torch.stack(by_layer, 1).flatten()]


def layer_stepper(
    problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool, rates: Tensor | None = None
) -> Stepper:
    """The layer kernels in pieces."""
    assert plan.triton is not None
    layers = _layers()
    stepper: Stepper = layers.LayerStepper(
        problem, batch, plan, gradient, plan.triton.precision, rates
    )
    return stepper


def _layers() -> Any:
    """Loaded when first wanted: it needs Triton."""
    return importlib.import_module("maml_fast.backends.triton_layers")
