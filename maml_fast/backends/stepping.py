"""One chunk of tasks through a backend that works in pieces: inner steps, query, adjoint.

    theta_{k+1} = theta_k - eta_k * g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1
    lam = w_S grad L_query(theta_S)
    lam = lam - H_k (eta_k * lam),  then lam = lam + w_k grad L_query(theta_k)   k = S-1 .. 0
    dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
and the meta-gradient is lam, summed over tasks (Finn et al. 2017, equation 1, differentiated). Of
the query losses' weights w_k all but the last are 0 unless the user says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maml_fast.outer import Implicit
from maml_fast.problem import AdaptedTasks, Outcome, Problem, Stepper


def drive(stepper: Stepper, problem: Problem, gradient: bool) -> Outcome:
    """The whole meta-step."""
    last = problem.inner_steps
    path, support_losses, traces = _descend(stepper, last, gradient or problem.step_weights)
    weight = problem.query_weight_at(last)
    losses, outputs, adjoint = stepper.query(path[last], weight, gradient, None)
    outcome = Outcome(_scaled(losses, weight), _by_step(support_losses, outputs), outputs)
    if gradient and isinstance(problem.outer, Implicit):
        adjoint, outcome.residuals = stepper.solve(path[last], adjoint)
        traces.clear()
    for step in reversed(range(last if problem.outer is None or not gradient else 0)):
        if gradient:
            adjoint = stepper.pull_back(adjoint, traces.pop(), step)
        if weight := problem.query_weight_at(step):
            losses, _, adjoint = stepper.query(path[step], weight, gradient, adjoint)
            outcome.task_losses = outcome.task_losses + _scaled(losses, weight)
    if gradient:
        stepper.finish(adjoint, outcome)
    return outcome


def adapt(stepper: Stepper, inner_steps: int, like: Tensor) -> AdaptedTasks:
    """The inner loop alone; `like` has a task an entry."""
    path, support_losses, _ = _descend(stepper, inner_steps, keeps=False)
    return stepper.adapted(path[inner_steps], _by_step(support_losses, like))


def _descend(
    stepper: Stepper, inner_steps: int, keeps: object
) -> tuple[dict[int, Any], list[Tensor], list[Any]]:
    """Fast weights by step, the last at least; and of each step the losses [T] and its trace."""
    fast = stepper.start()
    path = {0: fast}
    traces, support_losses = [], []
    for step in range(inner_steps):
        losses, fast, trace = stepper.inner_step(fast, step)
        support_losses.append(losses)
        if keeps:
            traces.append(trace)
        else:
            path.clear()
        path[step + 1] = fast
    return path, support_losses, traces


def _scaled(losses: Tensor, weight: float) -> Tensor:
    return losses if weight == 1 else losses * weight


def _by_step(losses: list[Tensor], like: Tensor) -> Tensor:
    """[S] tensors of [T] -> [T, S]"""
    return torch.stack(losses, 1) if losses else like.new_empty(len(like), 0)
