"""A loss or gradient that is not finite is reported with its tasks, and never passed on."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from maml_fast import meta_step
from maml_fast.errors import NonFiniteError
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, TaskBatch

SHOWN = 8


def check_finite(plan: Plan, problem: Problem, batch: TaskBatch, outcome: Outcome) -> None:
    """Raises NonFiniteError naming the tasks whose losses, or whose gradients, are not finite."""
    if outcome.finite:
        return
    found = [outcome.task_losses.detach(), outcome.support_losses.detach()]
    found += (outcome.gradients or {}).values()
    found += (outcome.rate_gradients or {}).values()
    found += outcome.input_gradients or ()
    # One number, one wait for the device. A sum of finite numbers may overflow: look closer then.
    total = torch.stack([tensor.sum() for tensor in found]).sum().item()
    if math.isfinite(total):
        return
    check_losses(outcome.support_losses, outcome.task_losses)
    by_input = zip(("support_x", "query_x"), outcome.input_gradients or (), strict=False)
    rates = {f"rates of {name}": g for name, g in (outcome.rate_gradients or {}).items()}
    gradients = {**(outcome.gradients or {}), **rates, **dict(by_input)}
    bad = [name for name, tensor in gradients.items() if not tensor.isfinite().all()]
    if bad:
        tasks = _bisect(plan, problem, batch, 0)
        raise NonFiniteError(
            f"the meta-gradient of {bad} is not finite though every loss is; it comes from "
            + (_listed(tasks, batch.tasks) if tasks else "the sum over all tasks"),
            tasks,
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


def _bisect(plan: Plan, problem: Problem, batch: TaskBatch, start: int) -> list[int]:
    """Tasks, at most SHOWN of them, whose own gradients are not finite."""
    outcome = meta_step.run(plan, problem, batch, gradient=True)
    found: list[Tensor] = [*(outcome.gradients or {}).values()]
    found += (outcome.rate_gradients or {}).values()
    found += outcome.input_gradients or ()
    if all(tensor.isfinite().all() for tensor in found):
        return []
    if batch.tasks == 1:
        return [start]
    half = batch.tasks // 2
    left = _bisect(plan, problem, batch.map(operator.itemgetter(slice(0, half))), start)
    if len(left) >= SHOWN:
        return left
    right = _bisect(plan, problem, batch.map(operator.itemgetter(slice(half, None))), start + half)
    return (left + right)[:SHOWN]


def _listed(tasks: list[int], total: int) -> str:
    shown = ", ".join(map(str, tasks[:SHOWN])) + (", ..." if len(tasks) > SHOWN else "")
    return f"{len(tasks)} of {total} tasks: {shown}"
