"""Reptile's meta-gradient, over any backend's inner loop."""

from __future__ import annotations

import torch

from maml_fast.problem import AdaptedTasks, Outcome, Problem


def reptile(problem: Problem, adapted: AdaptedTasks, outcome: Outcome) -> None:
    """Puts the sum over tasks of theta_0 - theta_S into the outcome."""
    moved = adapted.parameters()
    outcome.gradients = {
        name: (problem.parameters[name] - moved[name]).sum(0)
        if name in problem.rates.values
        else torch.zeros_like(problem.like(name))
        for name in problem.learned
    }
    outcome.rate_gradients = {}
