"""Losses and accuracies of the adapted models step by step, over any backend.

T tasks, S inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from maml_fast import meta_step
from maml_fast.backends.reference import losses_of
from maml_fast.plan import Plan
from maml_fast.problem import Problem, RateTable, TaskBatch
from maml_fast.results import Trajectory
from maml_fast.rows import has_gaps, in_groups


def trajectory(plan: Plan, problem: Problem, batch: TaskBatch) -> Trajectory:
    """See `MAML.trajectory`."""
    if not (problem.weighted_rows and plan.rows_meet and has_gaps(batch)):
        return _of(plan, problem, batch)
    places, parts = [], []
    for tasks, group in in_groups(batch):
        places.append(tasks)
        parts.append(_of(plan, problem, group))
    order = torch.cat(places).argsort()

    def merged(found: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in found if part is not None]
        return torch.cat(there)[order] if there else None

    names = parts[0].adapted
    by_field = {
        field.name: merged([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Trajectory)
        if field.name != "adapted"
    }
    adapted = {name: torch.cat([part.adapted[name] for part in parts])[order] for name in names}
    return Trajectory(**by_field, adapted=adapted)  # type: ignore[arg-type]


def _of(plan: Plan, problem: Problem, batch: TaskBatch) -> Trajectory:
    sets = (
        (batch.support_x, batch.support_y, batch.support_weight),
        (batch.query_x, batch.query_y, batch.query_weight),
    )
    losses: list[list[Tensor]] = [[], []]
    accuracies: list[list[Tensor]] = [[], []]
    for steps in range(problem.inner_steps + 1):
        adapted = meta_step.adapt(plan, _after(problem, steps), batch)
        for i, (x, y, weight) in enumerate(sets):
            outputs = adapted.predict(x)
            losses[i].append(losses_of(problem, outputs, y, weight))
            if problem.loss == "cross_entropy":
                accuracies[i].append(_share_right(outputs, y, weight))
    support, query = (torch.stack(found, 1) for found in losses)
    by_class = [torch.stack(found, 1) if found else None for found in accuracies]
    return Trajectory(support, query, by_class[0], by_class[1], adapted.parameters())


def _after(problem: Problem, steps: int) -> Problem:
    """The problem with so many of its inner steps."""
    rates = {name: values[:steps] for name, values in problem.rates.values.items()}
    table = RateTable(rates, problem.rates.learning)
    return dataclasses.replace(problem, inner_steps=steps, rates=table, step_weights=())


def _share_right(outputs: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """[T]"""
    right = (outputs.argmax(-1) == y).to(outputs)
    if weight is None:
        return right.mean(1)
    return (right * weight).sum(1) / weight.sum(1)
