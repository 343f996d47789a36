"""One chunk of tasks through a backend that works in pieces: inner steps, query, adjoint.

    theta_{k+1} = theta_k - eta_k * g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1
    lam = grad L_query(theta_S)
    lam = lam - H_k (eta_k * lam)                                             k = S-1 .. 0
    dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
and the meta-gradient is lam, summed over tasks (Finn et al. 2017, equation 1, differentiated).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maml_fast.problem import AdaptedTasks, Outcome, Stepper


def drive(stepper: Stepper, inner_steps: int, gradient: bool) -> Outcome:
    """The whole meta-step."""
    fast, support_losses, traces = _descend(stepper, inner_steps, gradient)
    task_losses, outputs, adjoint = stepper.query(fast, gradient)
    outcome = Outcome(task_losses, _by_step(support_losses, outputs), outputs)
    if gradient:
        for step in reversed(range(inner_steps)):
            adjoint = stepper.pull_back(adjoint, traces.pop(), step)
        outcome.gradients, outcome.rate_gradients = stepper.gradients(adjoint)
    return outcome


def adapt(stepper: Stepper, inner_steps: int, like: Tensor) -> AdaptedTasks:
    """The inner loop alone; `like` has a task an entry."""
    fast, support_losses, _ = _descend(stepper, inner_steps, keeps_traces=False)
    return stepper.adapted(fast, _by_step(support_losses, like))


def _descend(
    stepper: Stepper, inner_steps: int, keeps_traces: bool
) -> tuple[Any, list[Tensor], list[Any]]:
    """The adapted weights, and of each step the losses [T] and what it leaves."""
    fast = stepper.start()
    traces, support_losses = [], []
    for step in range(inner_steps):
        losses, fast, trace = stepper.inner_step(fast, step)
        support_losses.append(losses)
        if keeps_traces:
            traces.append(trace)
    return fast, support_losses, traces


def _by_step(losses: list[Tensor], like: Tensor) -> Tensor:
    """[S] tensors of [T] -> [T, S]"""
    return torch.stack(losses, 1) if losses else like.new_empty(len(like), 0)
