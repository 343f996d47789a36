"""What evaluations share: predictions of adapted models, and a mean's confidence interval.

Dimensions: T tasks, N support rows and M query rows per task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maml_fast import MAML, NonFiniteError

DEFAULT_SEED = 2017  # of evaluations' tasks; see run.TASK_SEEDS


def adapted_outputs(
    maml: MAML, support_x: Tensor, support_y: Tensor, x: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The K tasks whose adaptation by `steps` steps does not overflow, and their predictions.

    Returns:
        Numbers of tasks [K], and predictions [K, M, ...] at their x [T, M, ...], some of which may
        be NaN or infinite even so; both are empty where every task overflows.
    """
    kept = torch.arange(len(x), device=x.device)
    while len(kept):
        try:
            adapted = maml.adapt(support_x[kept], support_y[kept], inner_steps=steps)
            return kept, adapted(x[kept])
        except NonFiniteError as error:
            if not error.tasks:
                raise
            sound = torch.ones_like(kept, dtype=torch.bool)
            sound[error.tasks] = False
            kept = kept[sound]
    return kept, x.new_empty(0)


def mean_and_ci95(values: Tensor) -> tuple[float, float]:
    """The mean of values [T], and 1.96 of its standard errors; infinite where they are not finite
    or fewer than two."""
    if len(values) < 2 or not values.isfinite().all():
        return math.inf, math.inf
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def check_steps(steps: Sequence[int]) -> None:
    """Numbers of gradient steps to measure after: at least one number."""
    if not steps or any(step < 0 for step in steps):
        raise ValueError(f"steps is {tuple(steps)}; wanted are whole numbers of at least 0")


def check_tasks(tasks: int) -> None:
    """A number of tasks that has a confidence interval."""
    if tasks < 2:
        raise ValueError(f"tasks is {tasks}; wanted are at least 2, for a confidence interval")
