"""The meta-step over any backend: all tasks, pass by pass.

What a pass computes, and in which order: `maml_fast.backends.stepping`, for backends in pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_fast.backends import cpu, reference, stepping, triton
from maml_fast.backends.functional import FunctionalStepper
from maml_fast.backends.planned import PlannedStepper
from maml_fast.plan import Plan
from maml_fast.problem import AdaptedTasks, Outcome, Problem, Stepper, TaskBatch


def run(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """A whole meta-step, `plan.chunk_size` tasks a pass; sums over tasks are taken in order."""
    outcomes: list[Outcome] = []
    for chunk in batch.chunks(plan.chunk_size):
        if plan.centred_by:
            support_x, query_x = _centred(chunk.support_x), _centred(chunk.query_x)
            chunk = chunk._replace(support_x=support_x, query_x=query_x)
        outcome = _run_pass(plan, problem, chunk, gradient)
        if gradient and outcomes:
            _accumulate(outcomes[0], outcome)
        outcomes.append(outcome)
    total = outcomes[0]
    if len(outcomes) > 1:
        total.task_losses = torch.cat([outcome.task_losses for outcome in outcomes])
        total.support_losses = torch.cat([outcome.support_losses for outcome in outcomes])
        total.query_outputs = torch.cat([outcome.query_outputs for outcome in outcomes])
        total.finite = None  # each pass spoke of itself, and sums may overflow
    return total


def adapt(plan: Plan, problem: Problem, support_x: Tensor, support_y: Tensor) -> AdaptedTasks:
    """The inner loop alone: the adapted models of all tasks."""
    if plan.centred_by:
        support_x = _centred(support_x)
        return _Centred(_adapt(plan, problem, support_x, support_y))
    return _adapt(plan, problem, support_x, support_y)


class _Centred:
    """Adapted models that get their data less the mean over a task's rows."""

    def __init__(self, adapted: AdaptedTasks) -> None:
        self._adapted, self.support_losses = adapted, adapted.support_losses
        self.parameters = adapted.parameters

    def predict(self, query_x: Tensor) -> Tensor:
        return self._adapted.predict(_centred(query_x))


def _centred(x: Tensor) -> Tensor:
    """Rows [T, N, ...] less their mean over N."""
    return x - x.mean(1, keepdim=True)


def _adapt(plan: Plan, problem: Problem, support_x: Tensor, support_y: Tensor) -> AdaptedTasks:
    if plan.backend == "reference":
        return reference.AdaptedByReference(problem, support_x, support_y)
    if plan.backend == "cpu":
        return cpu.AdaptedByCpu(plan, problem, support_x, support_y)
    batch = TaskBatch(support_x, support_y, support_x, support_y)
    stepper = _stepper(plan, problem, batch, gradient=False)
    return stepping.adapt(stepper, problem.inner_steps, support_x)


def _run_pass(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    if plan.backend == "reference":
        return reference.meta_step(problem, batch, gradient)
    if plan.backend == "cpu":
        return cpu.meta_step(problem, batch, plan, gradient)
    if plan.backend == "triton":
        return triton.meta_step(problem, batch, plan, gradient)
    stepper = _stepper(plan, problem, batch, gradient)
    return stepping.drive(stepper, problem.inner_steps, gradient)


def _stepper(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Stepper:
    if plan.backend == "torch":
        return PlannedStepper(problem, batch, plan, gradient)
    if plan.backend == "triton":
        return triton.layer_stepper(problem, batch, plan, gradient)
    return FunctionalStepper(problem, batch, plan.forward_mode)


def _accumulate(total: Outcome, outcome: Outcome) -> None:
    """Add the gradients of one pass to the total, and let go of them."""
    assert total.gradients is not None and total.rate_gradients is not None
    for mine, theirs in (
        (total.gradients, outcome.gradients),
        (total.rate_gradients, outcome.rate_gradients),
    ):
        for name, tensor in (theirs or {}).items():
            mine[name].add_(tensor)
    outcome.gradients = outcome.rate_gradients = None
