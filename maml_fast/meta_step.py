"""The meta-step over any backend: all tasks, pass by pass.

What a pass computes, and in which order: `maml_fast.backends.stepping`, for backends in pieces.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from maml_fast import memory
from maml_fast.backends import cpu, lengths, meta_gradients, reference, stepping, triton
from maml_fast.backends.body import Body
from maml_fast.backends.functional import FunctionalStepper
from maml_fast.backends.planned import PlannedStepper
from maml_fast.errors import MemoryWarning
from maml_fast.losses import LOSSES, WeightedRows
from maml_fast.ops import BatchNorm
from maml_fast.outer import Reptile
from maml_fast.plan import PLANNED, Plan
from maml_fast.problem import AdaptedTasks, Outcome, Problem, Stepper, TaskBatch, fold_steps
from maml_fast.recorder import ADJOINT, ALL_LAYERS, BETWEEN, INNER, QUERY, during, measured
from maml_fast.rows import blank_inputs, has_gaps, in_groups, spread


def run(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """A whole meta-step, `plan.chunk_size` tasks a pass; sums over tasks are taken in order."""
    if not problem.weighted_rows or plan.backend == "reference":
        return _run_passes(plan, problem, batch, gradient)
    if plan.rows_meet and has_gaps(batch):
        return _run_groups(plan, problem, batch, gradient)
    batch = _blank_unless_read_so(plan, batch)
    outcome = _run_passes(plan, problem, batch, gradient)
    if (weight := batch.query_weight) is not None:
        counts = (weight != 0).view(*weight.shape, *(1,) * (outcome.query_outputs.dim() - 2))
        zero = outcome.query_outputs.new_zeros(())
        outcome.query_outputs = torch.where(counts, outcome.query_outputs, zero)
    return outcome


def _blank_unless_read_so(plan: Plan, batch: TaskBatch) -> TaskBatch:
    """C++ takes rows of weight 0 for 0 as it reads them, which spares a copy."""
    return batch if plan.backend == "cpu" else blank_inputs(batch)


def _run_groups(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """The rows that count alone, tasks with as many of them together."""
    total: Outcome | None = None
    for tasks, group in in_groups(batch):
        _check_statistics(plan, tasks, group)
        outcome = spread(_run_passes(plan, problem, group, gradient), tasks, batch)
        if total is None:
            total = outcome
            by_task = {name: _as_many(part, batch.tasks) for name, part in _by_task(outcome)}
        elif gradient:
            _accumulate(total, outcome)
        for name, part in _by_task(outcome):
            by_task[name][tasks] = part
    assert total is not None
    total.task_losses, total.support_losses = by_task["task"], by_task["support"]
    total.query_outputs, total.finite = by_task["outputs"], None
    total.residuals = by_task.get("residuals")
    if total.input_gradients is not None:
        total.input_gradients = by_task["by_support"], by_task["by_query"]
    return total


def _check_statistics(plan: Plan, tasks: Tensor, group: TaskBatch) -> None:
    """A batch norm of single numbers wants two rows that count."""
    layers = (*plan.body, *plan.layers)
    if not any(isinstance(x.link.op, BatchNorm) and math.prod(x.features[1:]) == 1 for x in layers):
        return
    for name, x in (("support_weight", group.support_x), ("query_weight", group.query_x)):
        if x.shape[1] == 1:
            raise ValueError(
                f"{name} leaves one row in task {tasks[0].item()}, which has no variance for the "
                "model's batch norm; wanted are two rows above 0, or more"
            )


def _by_task(outcome: Outcome) -> list[tuple[str, Tensor]]:
    parts = [
        ("task", outcome.task_losses),
        ("support", outcome.support_losses),
        ("outputs", outcome.query_outputs),
    ]
    if outcome.residuals is not None:
        parts.append(("residuals", outcome.residuals))
    if outcome.input_gradients is not None:
        parts += zip(("by_support", "by_query"), outcome.input_gradients, strict=True)
    return parts


def _as_many(part: Tensor, tasks: int) -> Tensor:
    return part.new_empty(tasks, *part.shape[1:])


def _run_passes(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """All passes; where memory runs out, once more by half as many tasks, once in a plan's life."""
    try:
        return _run_each_pass(plan, problem, batch, gradient)
    except (MemoryError, RuntimeError) as error:
        size = min(plan.chunk_size, batch.tasks)
        if plan.halved or size == 1 or plan.takes_all or memory.refused_bytes(error) is None:
            raise
        reason = " ".join(str(error).split())
    # Outside of the handler, which holds what the failed pass had made.
    plan.chunk_size, plan.halved = math.ceil(size / 2), True
    warnings.warn(
        f"out of memory with {size} tasks a pass ({reason}); from now on {plan.chunk_size}. Their "
        "gradients are the same, but summed in another order",
        MemoryWarning,
        stacklevel=2,
    )
    if batch.support_x.device.type == "cuda":
        torch.cuda.empty_cache()
    return _run_each_pass(plan, problem, batch, gradient)


def _run_each_pass(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    outcomes: list[Outcome] = []
    for chunk in batch.chunks(plan.chunk_size):
        outcome = _run_chunk(plan, problem, chunk, gradient)
        if gradient and outcomes:
            _accumulate(outcomes[0], outcome)
        outcomes.append(outcome)
    total = outcomes[0]
    if len(outcomes) > 1:
        total.task_losses = torch.cat([outcome.task_losses for outcome in outcomes])
        total.support_losses = torch.cat([outcome.support_losses for outcome in outcomes])
        total.query_outputs = torch.cat([outcome.query_outputs for outcome in outcomes])
        by_input = [outcome.input_gradients for outcome in outcomes]
        if all(pair is not None for pair in by_input):
            support, query = (torch.cat(parts) for parts in zip(*by_input, strict=True))
            total.input_gradients = support, query
        if total.residuals is not None:
            total.residuals = torch.cat([outcome.residuals for outcome in outcomes])  # type: ignore[misc]
        total.finite = None  # each pass spoke of itself, and sums may overflow
    return total


def _run_chunk(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    if gradient and isinstance(problem.outer, Reptile) and plan.backend != "reference":
        return _run_reptile(plan, problem, batch)
    if plan.backend not in PLANNED:
        return _run_pass(plan, problem, batch, gradient)
    wants_inputs = gradient and (problem.wants_inputs or bool(plan.body))
    above = problem.with_values_of_all_steps().above(plan.moving, wants_inputs)
    if not plan.body:
        return _chosen(problem, _run_pass(plan, above, _less_mean(plan, batch), gradient))
    body = Body(plan.body, problem, plan.recorder)
    with during(plan.recorder, INNER):
        support_x, kept = body.forward(batch.support_x)
    with during(plan.recorder, QUERY):
        query_x, kept_query = body.forward(batch.query_x)
    rows = batch._replace(support_x=support_x, query_x=query_x)
    outcome = _run_pass(plan, above, _less_mean(plan, rows), gradient)
    if not gradient:
        return outcome
    assert outcome.gradients is not None
    assert outcome.input_gradients is not None
    found = dict(outcome.gradients)
    by_support, by_query = outcome.input_gradients
    wanted = problem.wants_inputs
    by_support_x = None
    with during(plan.recorder, ADJOINT):
        by_query_x = body.backward(kept_query, by_query, found, wanted)
        if wanted or (problem.inner_steps and not problem.first_order):
            by_support_x = body.backward(kept, by_support, found, wanted)
    outcome.gradients, outcome.finite = found, None  # the body's were not looked at
    outcome.input_gradients = (by_support_x, by_query_x) if wanted else None  # type: ignore[assignment]
    return _chosen(problem, outcome)


def _run_reptile(plan: Plan, problem: Problem, batch: TaskBatch) -> Outcome:
    if plan.reptile_by_steps:
        return lengths.reptile(partial(_run_chunk, plan), problem, batch)
    batch = blank_inputs(batch)
    adapted = adapt(plan, problem, batch)
    outputs = adapted.predict(batch.query_x)
    if isinstance(problem.loss, str):
        rule = WeightedRows(LOSSES[problem.loss], batch.query_weight)
        losses = rule.value(outputs, batch.query_y)[0]
    else:
        losses = reference.losses_of(problem, outputs, batch.query_y, batch.query_weight)
    outcome = Outcome(losses, adapted.support_losses, outputs)
    meta_gradients.reptile(problem, adapted, outcome)
    return outcome


def _chosen(problem: Problem, outcome: Outcome) -> Outcome:
    """With the gradients of what learns, and of no other parameter."""
    found = outcome.gradients
    if found is not None and (problem.by_step or list(found) != list(problem.learned)):
        outcome.gradients = {
            name: found[name] if name in found else torch.zeros_like(problem.like(name))
            for name in problem.learned
        }
        for name, values in problem.by_step.items():
            outcome.gradients[name] = fold_steps(outcome.gradients[name], values)
    return outcome


def _less_mean(plan: Plan, batch: TaskBatch) -> TaskBatch:
    if not plan.centred_by:
        return batch
    support_x, query_x = _centred(batch.support_x), _centred(batch.query_x)
    return batch._replace(support_x=support_x, query_x=query_x)


def adapt(plan: Plan, problem: Problem, batch: TaskBatch) -> AdaptedTasks:
    """The inner loop alone: the adapted models of all tasks. The query is not looked at."""
    grouped = problem.weighted_rows and plan.backend != "reference" and plan.rows_meet
    if problem.weighted_rows and not grouped:
        batch = _blank_unless_read_so(plan, batch)
    if grouped and has_gaps(batch):
        return _Groups([(tasks, adapt(plan, problem, part)) for tasks, part in in_groups(batch)])
    if plan.backend not in PLANNED:
        return _adapt(plan, problem, batch)
    body = Body(plan.body, problem)
    support_x = body.forward(batch.support_x)[0]
    if plan.centred_by:
        support_x = _centred(support_x)
    rows = batch._replace(support_x=support_x, query_x=support_x)
    above = problem.with_values_of_all_steps().above(plan.moving, False)
    adapted = _adapt(plan, above, rows)
    if not (plan.body or plan.centred_by):
        return adapted
    return _Above(body, bool(plan.centred_by), adapted)


class _Groups:
    """Adapted models of tasks that were taken in groups, each with the tasks' places."""

    def __init__(self, groups: list[tuple[Tensor, AdaptedTasks]]) -> None:
        self._groups = groups
        self.support_losses = self._merged([adapted.support_losses for _, adapted in groups])

    def _merged(self, parts: list[Tensor]) -> Tensor:
        places = torch.cat([tasks for tasks, _ in self._groups])
        return torch.cat(parts)[places.argsort()]

    def predict(self, query_x: Tensor) -> Tensor:
        return self._merged([adapted.predict(query_x[tasks]) for tasks, adapted in self._groups])

    def parameters(self) -> dict[str, Tensor]:
        found = [adapted.parameters() for _, adapted in self._groups]
        return {name: self._merged([part[name] for part in found]) for name in found[0]}


class _Above:
    """Adapted models that get what a body makes of the data, less its mean over a task's rows where
    that is to be."""

    def __init__(self, body: Body, centred: bool, adapted: AdaptedTasks) -> None:
        self._body, self._is_centred = body, centred
        self._adapted, self.support_losses = adapted, adapted.support_losses
        self.parameters = adapted.parameters

    def predict(self, query_x: Tensor) -> Tensor:
        x = self._body.forward(query_x)[0]
        return self._adapted.predict(_centred(x) if self._is_centred else x)


def _centred(x: Tensor) -> Tensor:
    """Rows [T, N, ...] less their mean over N."""
    return x - x.mean(1, keepdim=True)


def _adapt(plan: Plan, problem: Problem, batch: TaskBatch) -> AdaptedTasks:
    if plan.backend == "reference":
        return reference.AdaptedByReference(problem, batch)
    if plan.backend == "cpu":
        return cpu.AdaptedByCpu(plan, problem, batch)
    stepper = _stepper(plan, problem, batch, gradient=False)
    return stepping.adapt(stepper, problem.inner_steps, batch.support_x)


def _run_pass(plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    if plan.backend == "reference":
        return reference.meta_step(problem, batch, gradient, plan.recorder)
    if plan.backend in ("cpu", "triton") and problem.step_weights:
        return lengths.losses_of_steps(partial(_run_pass, plan), problem, batch, gradient)
    if plan.backend == "cpu":
        return cpu.meta_step(problem, batch, plan, gradient)
    if plan.backend == "triton":
        return triton.meta_step(problem, batch, plan, gradient)
    stepper = _stepper(plan, problem, batch, gradient)
    rest = BETWEEN if plan.backend == "torch" else ALL_LAYERS
    return stepping.drive(measured(stepper, plan.recorder, rest), problem, gradient)


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
