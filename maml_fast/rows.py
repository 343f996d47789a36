"""Rows that count by weights: those of weight 0 change nothing, whatever they hold.

T tasks, N support rows, M query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from maml_fast.problem import Outcome, TaskBatch


def blank_targets(batch: TaskBatch) -> TaskBatch:
    """The batch with targets of 0 in rows of weight 0, which may hold a class that there is not."""
    return batch._replace(
        support_y=_blank(batch.support_y, batch.support_weight),
        query_y=_blank(batch.query_y, batch.query_weight),
    )


def blank_inputs(batch: TaskBatch) -> TaskBatch:
    """The same of the inputs, which may hold NaN: a row of the task that counts stands for them, as
    zeros may be no input for the model."""
    return batch._replace(
        support_x=_repeated(batch.support_x, batch.support_weight),
        query_x=_repeated(batch.query_x, batch.query_weight),
    )


def _blank(rows: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None or rows is None:
        return rows
    counts = (weight != 0).view(*weight.shape, *(1,) * (rows.dim() - 2))
    return torch.where(counts, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def _repeated(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Rows [T, N, ...] with the first that counts in place of those that do not."""
    if weight is None:
        return rows
    counts = weight != 0
    first = counts.to(torch.uint8).argmax(1, keepdim=True)
    places = torch.where(counts, torch.arange(rows.shape[1], device=rows.device), first)
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), places]


def has_gaps(batch: TaskBatch) -> bool:
    """Whether some rows have weight 0."""
    weights = (batch.support_weight, batch.query_weight)
    return any(weight is not None and bool((weight == 0).any()) for weight in weights)


def in_groups(batch: TaskBatch) -> Iterator[tuple[Tensor, TaskBatch]]:
    """The same tasks by how many rows count, with those rows alone: for models in which rows see
    each other, as in batch norm. Yields the tasks' places, and the batch of them."""
    counts = [
        torch.full((batch.tasks,), x.shape[1], device=x.device)
        if weight is None
        else (weight != 0).sum(1)
        for x, weight in (
            (batch.support_x, batch.support_weight),
            (batch.query_x, batch.query_weight),
        )
    ]
    kinds, kind_of = torch.stack(counts, 1).unique(dim=0, return_inverse=True)
    for kind, (rows, query_rows) in enumerate(kinds.tolist()):
        tasks = (kind_of == kind).nonzero().flatten()
        part = batch.map(lambda tensor, tasks=tasks: tensor[tasks])  # type: ignore[misc]
        support = _front(part.support_weight, rows)
        query = _front(part.query_weight, query_rows)
        yield (
            tasks,
            TaskBatch(
                support(part.support_x),
                support(part.support_y),
                query(part.query_x),
                query(part.query_y),
                None if part.support_weight is None else support(part.support_weight),
                None if part.query_weight is None else query(part.query_weight),
            ),
        )


def _front(weight: Tensor | None, count: int) -> Callable[[Tensor], Tensor]:
    """Takes the rows that count out of [T, rows, ...], of which every task has so many."""
    if weight is None:
        return lambda rows: rows
    places = (weight == 0).sort(dim=1, stable=True).indices[:, :count]
    tasks = torch.arange(len(weight), device=weight.device).unsqueeze(1)
    return lambda rows: rows[tasks, places]


def spread(outcome: Outcome, tasks: Tensor, whole: TaskBatch) -> Outcome:
    """A group's outcome with its rows where they were, 0 elsewhere."""
    picked = whole.map(lambda tensor: tensor[tasks])

    def back(rows: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return rows
        found = rows.new_zeros(*weight.shape, *rows.shape[2:])
        found[weight != 0] = rows.flatten(0, 1)
        return found

    outcome.query_outputs = back(outcome.query_outputs, picked.query_weight)
    if outcome.input_gradients is not None:
        by_support, by_query = outcome.input_gradients
        outcome.input_gradients = (
            back(by_support, picked.support_weight),
            back(by_query, picked.query_weight),
        )
    return outcome
