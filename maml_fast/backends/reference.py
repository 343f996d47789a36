"""One task at a time, by autograd: what every other backend is held to.

Finn et al. 2017, algorithm 1: theta_{k+1} = theta_k - eta_k * grad L_support(theta_k), and the
meta-gradient is that of L_query(theta_S), through all the inner steps. Shares no formula with the
other backends. Runs any module and any dtype; costs a graph of all inner steps, a task at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from maml_fast.norm_calls import OwnStatistics
from maml_fast.problem import Outcome, Problem, TaskBatch, one_loss

LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
}


def _predict(problem: Problem, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    # Buffers are copies, so that a module that counts or keeps running statistics stays as it was.
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    # A copy of the data too: a first layer may work in place.
    with OwnStatistics():
        return functional_call(problem.model, {**parameters, **buffers}, (x.clone(),))


def _leaves(problem: Problem) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone().requires_grad_(name in problem.rates.values)
        for name, tensor in problem.parameters.items()
    }


def _adapt(
    problem: Problem,
    parameters: dict[str, Tensor],
    rates: dict[str, list[Tensor]],
    support_x: Tensor,
    support_y: Tensor,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters after the inner loop of one task, and its support losses before each step."""
    loss_fn = LOSSES[problem.loss] if isinstance(problem.loss, str) else problem.loss
    losses = []
    for step in range(problem.inner_steps):
        loss = one_loss(loss_fn, _predict(problem, parameters, support_x), support_y)
        losses.append(loss.detach())
        names = problem.adapting
        if not names:
            continue
        gradients = torch.autograd.grad(
            loss,
            [parameters[name] for name in names],
            create_graph=not problem.first_order,
            materialize_grads=True,
        )
        updated = dict(parameters)
        for name, gradient in zip(names, gradients, strict=True):
            updated[name] = parameters[name] - rates[name][step] * gradient
        parameters = updated
    return parameters, losses


def _rate_leaves(problem: Problem, learn: bool) -> dict[str, list[Tensor]]:
    return {
        name: [
            torch.tensor(
                rate,
                dtype=problem.parameters[name].dtype,
                device=problem.parameters[name].device,
                requires_grad=learn and name in problem.rates.learning,
            )
            for rate in values
        ]
        for name, values in problem.rates.values.items()
    }


def meta_step(problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
    """The whole meta-step, task by task; see `Outcome`."""
    loss_fn = LOSSES[problem.loss] if isinstance(problem.loss, str) else problem.loss
    names, learning = problem.adapting, sorted(problem.rates.learning)
    totals = {name: torch.zeros_like(problem.parameters[name]) for name in names}
    rate_totals = {
        name: problem.parameters[name].new_zeros(problem.inner_steps) for name in learning
    }
    task_losses, support_losses, outputs = [], [], []
    with torch.enable_grad():
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            theta = _leaves(problem)
            rates = _rate_leaves(problem, learn=True)
            adapted, losses = _adapt(problem, theta, rates, support_x, support_y)
            prediction = _predict(problem, adapted, query_x)
            loss = one_loss(loss_fn, prediction, query_y)
            task_losses.append(loss.detach())
            support_losses.append(losses)
            outputs.append(prediction.detach())
            if not gradient:
                continue
            wanted = [theta[name] for name in names]
            wanted += [rate for name in learning for rate in rates[name]]
            found = list(torch.autograd.grad(loss, wanted, materialize_grads=True))
            for name in names:
                totals[name] += found.pop(0)
            for name in learning:
                for step in range(problem.inner_steps):
                    rate_totals[name][step] += found.pop(0)
    return Outcome(
        task_losses=torch.stack(task_losses),
        support_losses=_by_task(support_losses, batch.support_x),
        query_outputs=torch.stack(outputs),
        gradients=totals if gradient else None,
        rate_gradients=rate_totals if gradient else None,
    )


def _by_task(losses: list[list[Tensor]], like: Tensor) -> Tensor:
    """[T][S] scalars -> [T, S]"""
    return torch.stack([torch.stack(row) if row else like.new_empty(0) for row in losses])


class AdaptedByReference:
    """Adapted parameters of each task, kept apart."""

    def __init__(self, problem: Problem, support_x: Tensor, support_y: Tensor) -> None:
        self.problem = problem
        self.tasks: list[dict[str, Tensor]] = []
        losses_by_task = []
        for x, y in zip(support_x, support_y, strict=True):
            with torch.enable_grad():
                theta, rates = _leaves(problem), _rate_leaves(problem, learn=False)
                adapted, losses = _adapt(problem, theta, rates, x, y)
            losses_by_task.append(losses)
            self.tasks.append({name: tensor.detach() for name, tensor in adapted.items()})
        self.support_losses = _by_task(losses_by_task, support_x)

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        pairs = zip(self.tasks, query_x, strict=True)
        return torch.stack([_predict(self.problem, parameters, x) for parameters, x in pairs])

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        return {name: torch.stack([task[name] for task in self.tasks]) for name in self.tasks[0]}
