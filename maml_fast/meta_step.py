"""The meta-step: inner steps, query, adjoint; over any backend.

    theta_{k+1} = theta_k - eta_k * g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1
    lam = grad L_query(theta_S)
    lam = lam - H_k (eta_k * lam)                                             k = S-1 .. 0
    dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
and the meta-gradient is lam, summed over tasks (Finn et al. 2017, equation 1, differentiated).
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_fast.backends import cpu, reference
from maml_fast.backends.functional import FunctionalStepper
from maml_fast.backends.planned import PlannedStepper
from maml_fast.plan import Plan
from maml_fast.problem import AdaptedTasks, Outcome, Problem, Stepper, TaskBatch


def drive(stepper: Stepper, inner_steps: int, gradient: bool) -> Outcome:
    """One chunk of tasks through a backend that works in pieces."""
    fast = stepper.start()
    traces, support_losses = [], []
    for step in range(inner_steps):
        losses, fast, trace = stepper.inner_step(fast, step)
        support_losses.append(losses)
        if gradient:
            traces.append(trace)
    task_losses, outputs, adjoint = stepper.query(fast, gradient)
    outcome = Outcome(task_losses, _by_step(support_losses, outputs), outputs)
    if gradient:
        for step in reversed(range(inner_steps)):
            adjoint = stepper.pull_back(adjoint, traces.pop(), step)
        outcome.gradients, outcome.rate_gradients = stepper.gradients(adjoint)
    return outcome


def run(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """A whole meta-step, `plan.chunk_size` tasks a pass; sums over tasks are taken in order."""
    outcomes: list[Outcome] = []
    for chunk in batch.chunks(plan.chunk_size):
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
    if plan.backend == "reference":
        return reference.AdaptedByReference(problem, support_x, support_y)
    if plan.backend == "cpu":
        return cpu.AdaptedByCpu(plan, problem, support_x, support_y)
    batch = TaskBatch(support_x, support_y, support_x, support_y)
    stepper = _stepper(plan, problem, batch, gradient=False)
    fast = stepper.start()
    support_losses = []
    for step in range(problem.inner_steps):
        losses, fast, _ = stepper.inner_step(fast, step)
        support_losses.append(losses)
    return stepper.adapted(fast, _by_step(support_losses, support_x))


def _run_pass(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    if plan.backend == "reference":
        return reference.meta_step(problem, batch, gradient)
    if plan.backend == "cpu":
        return cpu.meta_step(problem, batch, plan, gradient)
    return drive(_stepper(plan, problem, batch, gradient), problem.inner_steps, gradient)


def _stepper(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Stepper:
    if plan.backend == "torch":
        return PlannedStepper(problem, batch, plan, gradient)
    return FunctionalStepper(problem, batch, plan.forward_mode)


def _by_step(losses: list[Tensor], like: Tensor) -> Tensor:
    """[S] tensors of [T] -> [T, S]"""
    return torch.stack(losses, 1) if losses else like.new_empty(len(like), 0)


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
