"""One task at a time, by autograd: what every other backend is held to.

Finn et al. 2017, algorithm 1: theta_{k+1} = theta_k - eta_k * grad L_support(theta_k), or what
another inner rule makes of that gradient; the meta-gradient is that of sum_k w_k L_query(theta_k),
through all the inner steps. Shares no formula with the other backends. Runs any module and any
dtype; costs a graph of all inner steps, a task at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from maml_fast.inner import SGD
from maml_fast.norm_calls import OwnStatistics
from maml_fast.outer import Implicit, Reptile
from maml_fast.problem import Outcome, Problem, TaskBatch, one_loss
from maml_fast.recorder import ADJOINT, ALL_LAYERS, INNER, QUERY, Recorder, during

LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
}


@dataclass
class Rows:
    """One task's support or query rows; rows of weight 0 are left out."""

    x: Tensor
    y: Tensor
    weight: Tensor | None
    counts: Tensor | None  # which rows these are

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weight: Tensor | None) -> Rows:
        if weight is None:
            return cls(x, y, None, None)
        counts = weight != 0
        return cls(x[counts], y[counts], weight[counts], counts)

    def spread(self, prediction: Tensor, rows: int) -> Tensor:
        """Predictions of all rows, 0 for those that are left out."""
        if self.counts is None:
            return prediction
        found = prediction.new_zeros(rows, *prediction.shape[1:])
        found[self.counts] = prediction
        return found


def _predict(problem: Problem, parameters: dict[str, Tensor], x: Tensor, step: int) -> Tensor:
    """With the parameters of an inner step, or of the last that they have values for."""
    for name in problem.by_step:
        values = parameters[name]
        parameters = {**parameters, name: values[min(step, len(values) - 1)]}
    # Buffers are copies, so that a module that counts or keeps running statistics stays as it was.
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    # A copy of the data too: a first layer may work in place.
    with OwnStatistics():
        return functional_call(problem.model, {**parameters, **buffers}, (x.clone(),))


def _loss(problem: Problem, prediction: Tensor, rows: Rows) -> Tensor:
    loss_fn = LOSSES[problem.loss] if isinstance(problem.loss, str) else problem.loss
    if rows.weight is None:
        return one_loss(loss_fn, prediction, rows.y)
    # Any loss that is a mean over rows is the mean of the rows' own.
    pairs = zip(prediction.split(1), rows.y.split(1), strict=True)
    each = [one_loss(loss_fn, z, y) for z, y in pairs]
    return (torch.stack(each) * rows.weight).sum() / rows.weight.sum()


def _leaves(problem: Problem) -> dict[str, Tensor]:
    wanted = {*problem.adapting, *problem.learned}
    return {
        name: tensor.detach().clone().requires_grad_(name in wanted)
        for name, tensor in {**problem.parameters, **problem.by_step}.items()
    }


def _adapt(
    problem: Problem, parameters: dict[str, Tensor], rates: dict[str, list[Tensor]], support: Rows
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Parameters before each inner step of one task and behind the last, and its support losses
    before each step."""
    losses, path = [], [parameters]
    names = problem.adapting
    state = problem.rule.start({name: parameters[name] for name in names})
    for step in range(problem.inner_steps):
        parameters = path[-1]
        loss = _loss(problem, _predict(problem, parameters, support.x, step), support)
        losses.append(loss.detach())
        if not names:
            path.append(parameters)
            continue
        found = torch.autograd.grad(
            loss,
            [parameters[name] for name in names],
            create_graph=not problem.first_order,
            materialize_grads=True,
        )
        moving = {name: parameters[name] for name in names}
        gradients = dict(zip(names, found, strict=True))
        now = {name: rates[name][step] for name in names}
        moved, state = problem.rule.step(moving, gradients, now, state)
        path.append({**parameters, **moved})
    return path, losses


def _rate_leaves(problem: Problem, learn: bool) -> dict[str, list[Tensor]]:
    def leaf(name: str, rate: float | Tensor) -> Tensor:
        like = problem.parameters[name]
        made = torch.as_tensor(rate, dtype=like.dtype, device=like.device).detach().clone()
        return made.requires_grad_(learn and name in problem.rates.learning)

    return {
        name: [leaf(name, rate) for rate in values] for name, values in problem.rates.values.items()
    }


def meta_step(
    problem: Problem, batch: TaskBatch, gradient: bool, recorder: Recorder | None = None
) -> Outcome:
    """The whole meta-step, task by task; see `Outcome`."""
    names, learning = list(problem.learned), sorted(problem.rates.learning)
    whole = {**problem.parameters, **problem.by_step}
    totals = {name: torch.zeros_like(whole[name]) for name in names}
    rate_totals = {name: _zero_rates(problem, name) for name in learning}
    task_losses, support_losses, outputs = [], [], []
    input_gradients: tuple[list[Tensor], list[Tensor]] = [], []
    with torch.enable_grad():
        for chunk in batch.chunks(1):
            task = chunk.map(operator.itemgetter(0))
            theta, rates = _leaves(problem), _rate_leaves(problem, learn=True)
            inputs = [
                x.detach().clone().requires_grad_(problem.wants_inputs)
                for x in (task.support_x, task.query_x)
            ]
            support = Rows.of(inputs[0], task.support_y, task.support_weight)
            query = Rows.of(inputs[1], task.query_y, task.query_weight)
            with during(recorder, INNER, ALL_LAYERS):
                path, losses = _adapt(problem, theta, rates, support)
            with during(recorder, QUERY, ALL_LAYERS):
                prediction = _predict(problem, path[-1], query.x, problem.inner_steps)
                loss = _query_loss(problem, path, prediction, query)
            task_losses.append(loss.detach())
            support_losses.append(losses)
            outputs.append(query.spread(prediction.detach(), len(inputs[1])))
            if not gradient:
                continue
            wanted = [theta[name] for name in names]
            wanted += [rate for name in learning for rate in rates[name]]
            wanted += inputs if problem.wants_inputs else []
            with during(recorder, ADJOINT, ALL_LAYERS):
                if isinstance(problem.outer, Implicit):
                    found = _implicit(problem, theta, path[-1], support, query, wanted)
                elif isinstance(problem.outer, Reptile):
                    found = [(theta[name] - path[-1][name]).detach() for name in names]
                else:
                    found = list(torch.autograd.grad(loss, wanted, materialize_grads=True))
            for name in names:
                totals[name] += found.pop(0)
            for name in learning:
                for step in range(problem.inner_steps):
                    rate_totals[name][step] += found.pop(0)
            for kept, by_x in zip(input_gradients, found, strict=False):
                kept.append(by_x)
    return Outcome(
        task_losses=torch.stack(task_losses),
        support_losses=_by_task(support_losses, batch.support_x),
        query_outputs=torch.stack(outputs),
        gradients=totals if gradient else None,
        rate_gradients=rate_totals if gradient else None,
        input_gradients=(torch.stack(input_gradients[0]), torch.stack(input_gradients[1]))
        if gradient and problem.wants_inputs
        else None,
    )


def _implicit(
    problem: Problem,
    theta: dict[str, Tensor],
    adapted: dict[str, Tensor],
    support: Rows,
    query: Rows,
    wanted: list[Tensor],
) -> list[Tensor]:
    """The derivative of the query loss at the minimum of the support loss and its proximal term,
    with the whole Hessian: x = (H + strength)^-1 q, theta_0's is strength x."""
    assert isinstance(problem.rule, SGD)
    names, strength = problem.adapting, problem.rule.proximal
    if not names:
        judged = _loss(problem, _predict(problem, theta, query.x, problem.inner_steps), query)
        return list(torch.autograd.grad(judged, wanted, materialize_grads=True))
    point = {**theta, **{name: adapted[name].detach().requires_grad_() for name in names}}
    moving = [point[name] for name in names]
    last = problem.inner_steps
    loss = _loss(problem, _predict(problem, point, support.x, last), support)
    gradient = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, moving, create_graph=True, materialize_grads=True)
        ]
    )
    rows = [
        torch.autograd.grad(g, moving, retain_graph=True, materialize_grads=True) for g in gradient
    ]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    judged = _loss(problem, _predict(problem, point, query.x, last), query)
    others = [tensor for tensor in wanted if not any(tensor is theta[name] for name in names)]
    by_query = torch.autograd.grad(judged, moving + others, materialize_grads=True)
    q = torch.cat([part.flatten() for part in by_query[: len(moving)]])
    x = torch.linalg.solve(
        hessian + strength * torch.eye(len(q), dtype=q.dtype, device=q.device), q
    )
    by_support = torch.autograd.grad(gradient @ x, others, materialize_grads=True) if others else ()
    answers = dict(
        zip(
            map(id, others),
            (a - b for a, b in zip(by_query[len(moving) :], by_support, strict=True)),
            strict=True,
        )
    )
    pieces = (strength * x).split([p.numel() for p in moving])
    for name, piece in zip(names, pieces, strict=True):
        answers[id(theta[name])] = piece.view_as(theta[name])
    return [answers[id(tensor)] for tensor in wanted]


def _query_loss(
    problem: Problem, path: list[dict[str, Tensor]], last: Tensor, query: Rows
) -> Tensor:
    """One task's query losses, weighted by step; `last` is the prediction behind the last step."""
    total = _loss(problem, last, query) * problem.query_weight_at(problem.inner_steps)
    for step, parameters in enumerate(path[:-1]):
        if weight := problem.query_weight_at(step):
            prediction = _predict(problem, parameters, query.x, step)
            total = total + _loss(problem, prediction, query) * weight
    return total


def _zero_rates(problem: Problem, name: str) -> Tensor:
    """[S] or [S, *shape]"""
    rates = problem.rates.values[name]
    shape = rates.shape if isinstance(rates, Tensor) else (len(rates),)
    return problem.parameters[name].new_zeros(shape)


def losses_of(problem: Problem, outputs: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """[T], of predictions [T, rows, ...] by any loss."""
    found = []
    for task, output in enumerate(outputs):
        rows = Rows.of(output, y[task], None if weight is None else weight[task])
        found.append(_loss(problem, rows.x, rows))
    return torch.stack(found)


def _by_task(losses: list[list[Tensor]], like: Tensor) -> Tensor:
    """[T][S] scalars -> [T, S]"""
    return torch.stack([torch.stack(row) if row else like.new_empty(0) for row in losses])


class AdaptedByReference:
    """Adapted parameters of each task, kept apart."""

    def __init__(self, problem: Problem, batch: TaskBatch) -> None:
        self.problem = problem
        self.tasks: list[dict[str, Tensor]] = []
        losses_by_task = []
        for chunk in batch.chunks(1):
            task = chunk.map(operator.itemgetter(0))
            support = Rows.of(task.support_x, task.support_y, task.support_weight)
            with torch.enable_grad():
                theta, rates = _leaves(problem), _rate_leaves(problem, learn=False)
                path, losses = _adapt(problem, theta, rates, support)
            losses_by_task.append(losses)
            self.tasks.append({name: tensor.detach() for name, tensor in path[-1].items()})
        self.support_losses = _by_task(losses_by_task, batch.support_x)

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        pairs, last = zip(self.tasks, query_x, strict=True), self.problem.inner_steps
        return torch.stack([_predict(self.problem, task, x, last) for task, x in pairs])

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        step, of_steps = self.problem.inner_steps, self.problem.by_step

        def own(task: dict[str, Tensor], name: str) -> Tensor:
            values = task[name]
            return values[min(step, len(values) - 1)] if name in of_steps else values

        return {
            name: torch.stack([own(task, name) for task in self.tasks]) for name in self.tasks[0]
        }
