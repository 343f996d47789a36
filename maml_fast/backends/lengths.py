"""Meta-gradients put together from inner loops of several lengths, for engines that have one query
loss, behind the last step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from maml_fast.problem import Outcome, Problem, TaskBatch

Run = Callable[[Problem, TaskBatch, bool], Outcome]  # with a gradient or without


def losses_of_steps(run: Run, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """Losses of several steps, for engines that have the last one's: the sum of as many
    meta-gradients, each of an inner loop that ends there."""
    last = problem.inner_steps
    weight = problem.query_weight_at(last)
    total = run(problem.up_to(last), batch, gradient and weight != 0)
    total.finite = None  # the sums are still to be made
    total.task_losses = total.task_losses * weight
    parts = [(weight, total)]
    for step in range(last):
        if weight := problem.query_weight_at(step):
            part = run(problem.up_to(step), batch, gradient)
            total.task_losses.add_(part.task_losses, alpha=weight)
            parts.append((weight, part))
    if gradient:
        _add_up(problem, batch, [part for part in parts if part[0]], total)
    return total


def _add_up(
    problem: Problem, batch: TaskBatch, parts: list[tuple[float, Outcome]], total: Outcome
) -> None:
    """The gradients of `parts`, each times its weight, into the total."""
    found = {name: torch.zeros_like(problem.like(name)) for name in problem.learned}
    learning = problem.rates.learning
    rates = {name: problem.no_rate_gradient(name, batch.support_x) for name in learning}
    by_input = [torch.zeros_like(x) for x in (batch.support_x, batch.query_x)]
    for weight, part in parts:
        assert part.gradients is not None
        for name, gradient in part.gradients.items():
            sums = found[name][: len(gradient)] if name in problem.by_step else found[name]
            sums.add_(gradient, alpha=weight)
        for name, by_step in (part.rate_gradients or {}).items():
            rates[name][: len(by_step)].add_(by_step, alpha=weight)
        for sums, gradient in zip(by_input, part.input_gradients or (), strict=False):
            sums.add_(gradient, alpha=weight)
    total.gradients, total.rate_gradients = found, rates
    if problem.wants_inputs:
        total.input_gradients = by_input[0], by_input[1]


def reptile(run: Run, problem: Problem, batch: TaskBatch) -> Outcome:
    """Reptile's, where theta_S = theta_0 - sum eta_k g_k: each g_k, summed over tasks, is the
    first-order meta-gradient of an inner loop of k steps with the support for a query. No task's
    own weights are written out."""
    problem = replace(problem, outer=None, first_order=True, wants_inputs=False)
    outcome = run(problem, batch, False)
    x, y, weight = batch.support_x, batch.support_y, batch.support_weight
    support = TaskBatch(x, y, x, y, weight, weight)
    found = {name: torch.zeros_like(problem.like(name)) for name in problem.learned}
    for step in range(problem.inner_steps):
        part = problem.up_to(step)
        part = replace(part, rates=replace(part.rates, learning=frozenset()))
        gradients = run(part, support, True).gradients
        assert gradients is not None
        for name, rates in problem.rates.values.items():
            if name in found:
                found[name] += rates[step] * gradients[name]
    outcome.gradients, outcome.rate_gradients, outcome.finite = found, {}, None
    return outcome
