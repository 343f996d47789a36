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

from maml_fast.backends import stepping, tuning
from maml_fast.backends.triton_fused import FusedStep
from maml_fast.backends.triton_step import PreparedStep, Results, on_device, places
from maml_fast.layers import Variant
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, Stepper, TaskBatch
from maml_fast.recorder import ALL_LAYERS, measured

PROGRAMS_KEPT = 8  # of a plan, and one for each step's loss
_LOCK = threading.Lock()  # of plans' programs


def meta_step(problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> Outcome:
    """The whole meta-step of one pass."""
    assert plan.triton is not None
    variant = Variant.of(problem, batch, gradient)
    key = variant, batch.tasks, plan.triton
    with _LOCK:
        step = plan.programs.pop(key, None)
        if step is None:
            kind = FusedStep if plan.triton.kernels == "fused" else LayersStep
            step = kind(plan, variant, problem)
        plan.programs[key] = step  # the latest last
        if len(plan.programs) > PROGRAMS_KEPT + len(plan.asked.step_weights):
            plan.programs.pop(next(iter(plan.programs)))
    with step.lock, on_device(batch.support_x):
        return step.run(problem, batch)


class LayersStep(PreparedStep):
    """Layer by layer."""

    def __init__(self, plan: Plan, variant: Variant, problem: Problem) -> None:
        super().__init__(plan, variant)
        self._rates: tuple[object, Tensor | None] = (None, None)
        self.engine = "torch"

    def get_ready(self, problem: Problem) -> None:
        rates = tuple(problem.rates.values.items())
        if rates != self._rates[0]:
            self._rates = rates, _layers().rate_table(problem, self.plan)

    def key(self, problem: Problem) -> object:
        return places(problem.parameters), self._rates[0], self.engine

    def alive(self) -> object:
        return self._rates

    def launch(self, problem: Problem, batch: TaskBatch) -> Results:
        outcome = self._drive(problem, batch, self.engine)
        numbers = torch.cat([part.flatten() for part in self._parts(outcome)])
        return Results(numbers, outcome.query_outputs, numbers.sum())

    def tune(self, problem: Problem, batch: TaskBatch) -> bool:
        """Which products with shared weights are quicker, torch's or the Triton kernel's."""
        variant, sizes = self.variant, [p.numel() for p in problem.parameters.values()]
        layers = [
            (str(layer.link.op), layer.form, layer.positions)
            for layer in self.plan.layers
            if not layer.prelude
        ]
        learning = sorted(variant.learning)
        run_as = variant._replace(learning=frozenset(), adapting=())
        key = repr(
            (
                self.triton.device.name, self.triton.precision, layers, batch.tasks.bit_length(),
                run_as, learning, sizes,
            )
        )  # fmt: skip

        def run(engine: str) -> list[Tensor]:
            return self._parts(self._drive(problem, batch, engine))

        found = tuning.quickest(key, ["torch", "triton"], run)
        self.engine = found or self.engine
        return found is not None

    def _drive(self, problem: Problem, batch: TaskBatch, engine: str) -> Outcome:
        """engine: of products with shared weights, torch's or a Triton kernel."""
        gradient = self.variant.gradient
        stepper = _layers().LayerStepper(
            problem, batch, self.plan, gradient, self.triton.precision, self._rates[1], engine
        )
        stepper = measured(stepper, self.plan.recorder, ALL_LAYERS)
        return stepping.drive(stepper, problem, gradient)

    def _parts(self, outcome: Outcome) -> list[Tensor]:
        """All its numbers, as `Results` has them."""
        parts = [outcome.task_losses, outcome.support_losses]
        if outcome.gradients is not None:
            parts += outcome.gradients.values()
            parts += self._by_layer(outcome.rate_gradients or {})
        return parts

    def _by_layer(self, rate_gradients: Mapping[str, Tensor]) -> list[Tensor]:
        if not rate_gradients:
            return []
        zeros = next(iter(rate_gradients.values())) * 0
        names = [name or "" for op in self.ops for name in (op.weight, op.bias)]
        by_layer = [rate_gradients.get(name, zeros) for name in names]
        return [torch.stack(by_layer, 1).flatten()]


def layer_stepper(problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> Stepper:
    """The layer kernels in pieces."""
    assert plan.triton is not None
    stepper: Stepper = _layers().LayerStepper(problem, batch, plan, gradient, plan.triton.precision)
    return stepper


def _layers() -> Any:
    """Loaded when first wanted: it needs Triton."""
    return importlib.import_module("maml_fast.backends.triton_layers")
