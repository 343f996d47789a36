"""The planned engine on torch tensors: a chain of stages, each with its four rules.

The specification that the compiled backends are held to. One pass over the chain gives values,
one back gives cotangents; the Hessian-vector product is the same two passes for their tangents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.specs import spec_of
from maml_fast.fast_weights import (
    FactoredInput,
    FactoredLinear,
    FastLayer,
    LayerSpec,
    LinearSpec,
    StepwiseLayer,
    StillLayer,
    dense_stage,
    shared_stage,
)
from maml_fast.layers import LayerPlan
from maml_fast.losses import LOSSES, WeightedRows
from maml_fast.ops import Operation, Stage, Weighted
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, TaskBatch
from maml_fast.recorder import INNER, LOSS, QUERY, during, watched


@dataclass
class Trace:
    """What one inner step leaves for its Hessian-vector product, stage by stage."""

    saved: list[Any]
    cotangents: list[Tensor]  # of each stage's output
    loss_state: Tensor


class PlannedStepper:
    """One chunk of tasks, for `stepping.drive`; fast weights are the number of a step."""

    def __init__(self, problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> None:
        assert isinstance(problem.loss, str)  # the plan refuses others
        self.problem, self.batch, self.gradient = problem, batch, gradient
        rules = LOSSES[problem.loss]
        recorder, below = plan.recorder, len(plan.body)
        support, query = (
            watched(WeightedRows(rules, weight), LOSS, recorder)
            for weight in (batch.support_weight, batch.query_weight)
        )
        self.losses = support, query
        self.prelude = [
            watched(frozen_stage(layer, problem), (below + i,), recorder)
            for i, layer in enumerate(plan.layers)
            if layer.prelude
        ]
        with during(recorder, INNER):
            self.support_x = through(self.prelude, batch.support_x)
        with during(recorder, QUERY):
            self.query_x = through(self.prelude, batch.query_x)
        self.layers = [layer for layer in plan.layers if not layer.prelude]
        below += len(self.prelude)
        self.stages = [
            watched(self._stage(layer, i), (below + i,), recorder)
            for i, layer in enumerate(self.layers)
        ]
        self.fast = {i: s for i, s in enumerate(self.stages) if isinstance(s, FastLayer)}
        # Gradients by the rows that enter the stages, where they are wanted: of support and query
        self.by_input: list[Tensor | None] = [None, None]

    def _stage(self, layer: LayerPlan, position: int) -> Stage:
        op = layer.link.op
        if isinstance(op, Operation):
            return op
        problem, batch = self.problem, self.batch
        if layer.form == "shared":
            return frozen_stage(layer, problem)
        spec = spec_of(op, problem, batch.tasks)
        if layer.form == "still":
            return self._still(op, spec)
        second_order = self.gradient and not problem.first_order
        if layer.form == "dense" or not isinstance(spec, LinearSpec):
            return dense_stage(spec)
        queries = sum(problem.query_weight_at(step) != 0 for step in range(problem.inner_steps)) + 1
        if position == 0 and not problem.wants_inputs:
            return FactoredInput(spec, self.support_x, self.query_x, second_order)
        rows, query_rows = (x.shape[1] * layer.positions for x in (batch.support_x, batch.query_x))
        return FactoredLinear(spec, rows, query_rows, second_order, queries)

    def _still(self, op: Weighted, spec: LayerSpec) -> Stage:
        names, values = (op.weight or "", op.bias or ""), self.problem.by_step
        by_step = names[0] in values, names[1] in values
        if not any(by_step):
            return StillLayer(spec, shared_stage(spec))
        of_steps = []
        for step in range(self.problem.inner_steps + 1):
            weight, bias = (
                values[name][step] if own else p
                for name, own, p in zip(names, by_step, (spec.weight, spec.bias), strict=True)
            )
            own_spec: LayerSpec = replace(spec, weight=weight, bias=bias)
            of_steps.append(StillLayer(own_spec, shared_stage(own_spec)))
        return StepwiseLayer(spec, of_steps, by_step)

    def start(self) -> int:
        return 0

    def _values(self, step: int, x: Tensor) -> tuple[Tensor, list[Any]]:
        kept = []
        for stage in self.stages:
            x, saved = stage.forward(step, x)
            kept.append(saved)
        return x, kept

    def _cotangents(self, step: int, saved: list[Any], dy: Tensor) -> list[Tensor]:
        """The cotangent of each stage's output; nothing adapts below the first stage."""
        found = [dy]
        for i in range(len(self.stages) - 1, 0, -1):
            dy = self.stages[i].backward(step, saved[i], dy)
            found.append(dy)
        return found[::-1]

    def _add_input(self, which: int, gradient: Tensor) -> None:
        before = self.by_input[which]
        self.by_input[which] = gradient if before is None else before + gradient

    def inner_step(self, fast: int, step: int) -> tuple[Tensor, int, Trace]:
        z, saved = self._values(step, self.support_x)
        loss, y = self.losses[0], self.batch.support_y
        losses, state = loss.value(z, y)
        cotangents = self._cotangents(step, saved, loss.cotangent(state, y))
        for i, layer in self.fast.items():
            layer.descend(step, saved[i], cotangents[i])
        return losses, step + 1, Trace(saved, cotangents, state)

    def query(
        self, fast: int, weight: float, gradient: bool, adjoint: None
    ) -> tuple[Tensor, Tensor, None]:
        z, saved = self._values(fast, self.query_x)
        loss, y = self.losses[1], self.batch.query_y
        losses, state = loss.value(z, y)
        if gradient:
            dz = loss.cotangent(state, y)
            cotangents = self._cotangents(fast, saved, dz if weight == 1 else dz * weight)
            for i, layer in self.fast.items():
                layer.add_query(fast, saved[i], cotangents[i])
            if self.problem.wants_inputs:
                dx = cotangents[0]
                if self.stages:
                    dx = self.stages[0].backward(fast, saved[0], dx)
                self._add_input(1, dx)
        return losses, z, None

    def pull_back(self, adjoint: None, trace: Trace, step: int) -> None:
        saved, cotangents = trace.saved, trace.cotangents
        for i, layer in self.fast.items():
            if layer.spec.learns_rates:
                layer.add_rate_gradients(step, saved[i], cotangents[i])
            layer.turn(step)
        if self.problem.first_order or not self.fast:
            return
        tangents: list[Tensor | None] = [None]  # of each stage's input, and of the output
        for stage, kept, dy in zip(self.stages, saved, cotangents, strict=True):
            tangents.append(stage.tangent(step, kept, dy, tangents[-1]))
        t_z = tangents[-1]
        if t_z is None:  # nothing moved
            return
        t_dy = self.losses[0].tangent(trace.loss_state, t_z)
        for i in range(len(self.stages) - 1, -1, -1):
            stage, kept, dy, t_x = self.stages[i], saved[i], cotangents[i], tangents[i]
            goes_on = i > 0 or self.problem.wants_inputs
            t_dx = stage.tangent_backward(step, kept, dy, t_x, t_dy) if goes_on else None
            if i in self.fast:
                self.fast[i].pull_back(step, kept, dy, t_x, t_dy)
            if t_dx is not None:
                t_dy = t_dx
        if self.problem.wants_inputs:
            self._add_input(0, -t_dy)

    def solve(self, fast: int, adjoint: None) -> tuple[None, Tensor]:
        raise AssertionError("the plan sends the implicit meta-gradient elsewhere")

    def finish(self, adjoint: None, outcome: Outcome) -> None:
        found, rates = {}, {}
        for stage in self.fast.values():
            spec = stage.spec
            for name, gradient, by_step in zip(
                (spec.op.weight, spec.op.bias),
                stage.gradient_sums(),
                stage.rate_gradients,
                strict=True,
            ):
                if name is not None and gradient is not None:
                    found[name], rates[name] = gradient, by_step.to(gradient.dtype)
        problem = self.problem
        zeros = {
            name: torch.zeros_like(problem.like(name))
            for name in problem.learned
            if name not in found  # parameters that the chain does not use
        }
        outcome.gradients = {
            name: found[name] if name in found else zeros[name] for name in problem.learned
        }
        outcome.rate_gradients = {
            name: rates[name] if name in rates else problem.no_rate_gradient(name, self.support_x)
            for name in problem.rates.learning
        }
        if problem.wants_inputs:
            of_support, of_query = self.by_input
            assert of_query is not None
            if of_support is None:
                of_support = torch.zeros_like(self.support_x)
            # What runs once keeps the rows' numbers in order: all else is below, in the body.
            outcome.input_gradients = (
                of_support.reshape(self.batch.support_x.shape),
                of_query.reshape(self.batch.query_x.shape),
            )

    def adapted(self, fast: int, support_losses: Tensor) -> AdaptedByPlan:
        return AdaptedByPlan(self, fast, support_losses)


class AdaptedByPlan:
    """Adapted models in the plan's own forms; weights are formed when they are asked for."""

    def __init__(self, stepper: PlannedStepper, step: int, support_losses: Tensor) -> None:
        self.stepper, self.step, self.support_losses = stepper, step, support_losses

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        return self.stepper._values(self.step, through(self.stepper.prelude, query_x))[0]

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        tasks = self.stepper.batch.tasks
        found = {
            name: tensor.expand(tasks, *tensor.shape)
            for name, tensor in self.stepper.problem.parameters.items()
        }
        for stage in self.stepper.fast.values():
            op = stage.spec.op
            for name, formed in zip((op.weight, op.bias), stage.weights(self.step), strict=True):
                if name is not None and formed is not None:
                    found[name] = formed
        return found


def frozen_stage(layer: LayerPlan, problem: Problem) -> Stage:
    """A layer that does not adapt."""
    op = layer.link.op
    if isinstance(op, Operation):
        return op
    return shared_stage(spec_of(op, problem, 1))


def through(stages: list[Stage], x: Tensor) -> Tensor:
    for stage in stages:
        x, _ = stage.forward(0, x)
    return x
