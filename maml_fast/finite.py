"""A loss or gradient that is not finite is reported with its tasks, or left out of the meta-step
with them, and never passed on."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings

import torch
from torch import Tensor

from maml_fast import meta_step
from maml_fast.errors import NonFiniteError, NonFiniteWarning
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, TaskBatch

SHOWN = 8


def check_finite(plan: Plan, problem: Problem, batch: TaskBatch, outcome: Outcome) -> None:
    """Raises NonFiniteError naming the tasks whose losses, or whose gradients, are not finite."""
    if _is_finite(outcome):
        return
    check_losses(outcome.support_losses, outcome.task_losses)
    by_input = zip(("support_x", "query_x"), outcome.input_gradients or (), strict=False)
    rates = {f"rates of {name}": g for name, g in (outcome.rate_gradients or {}).items()}
    gradients = {**(outcome.gradients or {}), **rates, **dict(by_input)}
    bad = [name for name, tensor in gradients.items() if not tensor.isfinite().all()]
    if bad:
        tasks = _bisect(plan, problem, batch, 0, SHOWN)
        raise NonFiniteError(
            f"the meta-gradient of {bad} is not finite though every loss is; it comes from "
            + (_listed(tasks, batch.tasks) if tasks else "the sum over all tasks"),
            tasks,
        )


def without_bad_tasks(plan: Plan, problem: Problem, batch: TaskBatch, outcome: Outcome) -> Outcome:
    """The meta-step of the tasks whose losses and gradients are finite, if `outcome`, that of all
    tasks, is not; the others are its `skipped`, and keep what they had beside the gradients.

    Raises NonFiniteError where no task is left, or no single one is to blame.
    """
    found, kept = outcome, torch.arange(batch.tasks, device=outcome.task_losses.device)
    part = batch
    while not _is_finite(found):
        bad = _bad_tasks(plan, problem, part, found)
        if bad.all() or not bad.any():
            check_finite(plan, problem, batch, outcome)
        kept = kept[~bad]
        part = batch.map(operator.itemgetter(kept))
        found = meta_step.run(plan, problem, part, gradient=found.gradients is not None)
    if part is batch:
        return outcome
    counts = torch.zeros_like(outcome.task_losses, dtype=torch.bool)
    counts[kept] = True

    def among(own: Tensor, all_tasks: Tensor) -> Tensor:
        return all_tasks.index_copy(0, kept, own)

    by_input = None
    if found.input_gradients is not None and outcome.input_gradients is not None:
        support, query = zip(found.input_gradients, outcome.input_gradients, strict=True)
        by_input = (
            among(support[0], torch.zeros_like(support[1])),
            among(query[0], torch.zeros_like(query[1])),
        )
    residuals = found.residuals
    if residuals is not None and outcome.residuals is not None:
        residuals = among(residuals, outcome.residuals)
    return dataclasses.replace(
        found,
        task_losses=among(found.task_losses, outcome.task_losses),
        support_losses=among(found.support_losses, outcome.support_losses),
        query_outputs=among(found.query_outputs, outcome.query_outputs),
        input_gradients=by_input,
        residuals=residuals,
        skipped=(~counts).nonzero().flatten(),
    )


def warn_of(skipped: Tensor, total: int) -> None:
    """Tells of tasks that were left out."""
    warnings.warn(
        f"left out of the meta-step, as a loss or gradient is not finite: "
        f"{_listed(skipped.tolist(), total)}",
        NonFiniteWarning,
        stacklevel=2,
    )


def check_losses(support_losses: Tensor, task_losses: Tensor | None = None) -> None:
    """Raises NonFiniteError naming the tasks whose losses [T, S], [T] are not finite."""
    by_step = [
        (f"the support loss before inner step {step}", losses)
        for step, losses in enumerate(support_losses.unbind(1))
    ]
    query = [] if task_losses is None else [("the query loss", task_losses)]
    for what, losses in by_step + query:
        tasks = (~losses.isfinite()).nonzero().flatten().tolist()
        if tasks:
            raise NonFiniteError(
                f"{what} is not finite in {_listed(tasks, len(losses))}; look for NaN in their "
                "data, or lower inner_lr",
                tasks,
            )


def _gradients(outcome: Outcome) -> list[Tensor]:
    found = [*(outcome.gradients or {}).values(), *(outcome.rate_gradients or {}).values()]
    return [*found, *(outcome.input_gradients or ())]


def _is_finite(outcome: Outcome) -> bool:
    if outcome.finite:
        return True
    found = [outcome.task_losses.detach(), outcome.support_losses.detach(), *_gradients(outcome)]
    # One number, one wait for the device. A sum of finite numbers may overflow: look closer then.
    total = torch.stack([tensor.sum() for tensor in found]).sum().item()
    return math.isfinite(total) or all(bool(tensor.isfinite().all()) for tensor in found)


def _bad_tasks(plan: Plan, problem: Problem, batch: TaskBatch, outcome: Outcome) -> Tensor:
    """Bool [T]: tasks whose losses are not finite; if all are, those whose gradients are not."""
    losses = torch.cat([outcome.task_losses.unsqueeze(1), outcome.support_losses], 1)
    bad = ~losses.isfinite().all(1)
    if not bad.any():
        bad[_bisect(plan, problem, batch, 0, batch.tasks)] = True
    return bad


def _bisect(plan: Plan, problem: Problem, batch: TaskBatch, start: int, most: int) -> list[int]:
    """Tasks, at most so many of them, whose own gradients are not finite."""
    outcome = meta_step.run(plan, problem, batch, gradient=True)
    if all(tensor.isfinite().all() for tensor in _gradients(outcome)):
        return []
    if batch.tasks == 1:
        return [start]
    half = batch.tasks // 2
    first, second = (
        batch.map(operator.itemgetter(part)) for part in (slice(0, half), slice(half, None))
    )
    left = _bisect(plan, problem, first, start, most)
    if len(left) >= most:
        return left
    return left + _bisect(plan, problem, second, start + half, most - len(left))


def _listed(tasks: list[int], total: int) -> str:
    shown = ", ".join(map(str, tasks[:SHOWN])) + (", ..." if len(tasks) > SHOWN else "")
    return f"{len(tasks)} of {total} tasks: {shown}"
