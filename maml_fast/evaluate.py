"""Evaluation on new sinusoids: error after k gradient steps, with intervals, and fitted curves.

Dimensions: T tasks, N support rows (shots), M query rows per task, G points of a plotted curve.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_fast import MAML
from maml_fast.config_sinusoid import PAPER_CONTEXT, SinusoidConfig
from maml_fast.measure import (
    DEFAULT_SEED,
    adapted_outputs,
    check_steps,
    check_tasks,
    mean_and_ci95,
)
from maml_fast.tasks import SinusoidTasks

# Finn et al. 2017, section 5.1: MSE at 5 shots by number of gradient steps, of MAML and of a
# network pretrained on all tasks at once.
PAPER_SHOTS = 5
PAPER_MAML = {1: 0.67, 5: 0.38, 10: 0.35}
PAPER_PRETRAINED = {1: 2.41, 5: 2.23, 10: 2.19}

# Zintgraf et al. 2019, table 1: MSE with 10 shots, one update and a context of 5 numbers. Quoted
# second-hand: the table itself was not at hand, and the paper's code does not have the number.
CAVIA_SHOTS = 10
PAPER_CAVIA = {1: 0.19}

# No prediction within the targets' range, [-5, 5], has a larger error: above, adaptation diverged.
DIVERGED = (5.0 + 5.0) ** 2


@dataclass(frozen=True)
class StepErrors:
    """Mean squared errors after a number of gradient steps.

    Gradient descent on few points diverges on a task now and then, and then the mean over all
    tasks says little: the others are told apart. Infinite means that an error overflowed.
    """

    steps: int
    mse: float  # mean over all tasks
    ci95: float  # half the width of the mean's 95% confidence interval
    median: float
    diverged: int  # number of tasks with an error above DIVERGED
    mse_others: float  # mean over the others
    ci95_others: float


@dataclass(frozen=True)
class Evaluation:
    """Errors over `tasks` tasks of `shots` support rows and `query_shots` query rows each."""

    shots: int
    tasks: int
    query_shots: int
    seed: int
    inner_lr: float
    errors: tuple[StepErrors, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no infinity: None stands for it."""
        values = dataclasses.asdict(self)
        values["errors"] = [
            {name: value if math.isfinite(value) else None for name, value in row.items()}
            for row in values["errors"]
        ]
        return values


class Paper(NamedTuple):
    """What a paper reports for so many shots: by column, errors by number of gradient steps."""

    source: str
    shots: int
    columns: Mapping[str, Mapping[int, float]]  # the first is of the paper's own method
    note: str = ""  # on the numbers

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        columns = {name.lower(): dict(errors) for name, errors in self.columns.items()}
        return {"shots": self.shots} | columns | ({"note": self.note} if self.note else {})


FINN = Paper("Finn et al. 2017", PAPER_SHOTS, {"MAML": PAPER_MAML, "pretrained": PAPER_PRETRAINED})
ZINTGRAF = Paper(
    "Zintgraf et al. 2019",
    CAVIA_SHOTS,
    {"CAVIA": PAPER_CAVIA},
    "The paper's number is quoted second-hand, not from its table.",
)


def paper_for(config: SinusoidConfig, inner_lr: float) -> Paper | None:
    """The paper whose numbers an evaluation at this rate is put beside. Those of CAVIA are for
    its network and inner loop alone; numbers of iterations and tasks may differ."""
    if config.method == "maml":
        return FINN
    plain = not config.first_order and not config.learn_inner_lr
    shape = PAPER_CONTEXT, (40, 40), "relu"
    network = (config.context_size, config.hidden, config.activation) == shape
    loop = (config.inner_lr, inner_lr, config.inner_steps) == (1.0, 1.0, 1)
    return ZINTGRAF if plain and network and loop and config.shots == CAVIA_SHOTS else None


@dataclass(frozen=True)
class Fits:
    """A few tasks' curves, and what the model makes of them after some numbers of steps."""

    x: Tensor  # [G]
    truth: Tensor  # [T, G]
    support_x: Tensor  # [T, N]
    support_y: Tensor  # [T, N]
    predictions: dict[int, Tensor]  # steps: [T, G]


def evaluate_sinusoid(
    model: nn.Module,
    inner_lr: float = 0.01,
    *,
    shots: int = 5,
    steps: Sequence[int] = (0, 1, 5, 10),
    tasks: int = 600,
    query_shots: int = 100,
    seed: int = DEFAULT_SEED,
    backend: str = "auto",
    inner_params: Sequence[str] | None = None,
) -> Evaluation:
    """Adapt `model` to new tasks and measure its error on other points of them.

    The interval is 1.96 standard errors of the mean over tasks. Curves depend on `seed` and
    `tasks` alone, so that evaluations with different `shots` share them.

    Args:
        model: from [T, N, 1] to [T, N, 1]; the tasks are drawn on its device, in its dtype.
        inner_lr: rate of the gradient steps.
        shots: support rows per task, all of which every gradient step uses.
        steps: numbers of gradient steps to measure after; 0 is the model as it is.
        tasks: number of tasks, at least 2.
        query_shots: query rows per task.
        seed: of the tasks; below 2^31 they are none that a run was trained on.
        backend, inner_params: of `MAML`.

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """
    check_steps(steps)
    check_tasks(tasks)
    sampler = _sampler(model, seed)
    support_x, support_y, query_x, query_y = sampler.sample(tasks, shots, query_shots)
    build = partial(MAML, model, "mse", inner_lr, backend=backend, inner_params=inner_params)
    rows = []
    for count in steps:
        prediction = _adapted(build, support_x, support_y, query_x, count)
        errors = (prediction - query_y).square().mean((1, 2), dtype=torch.float64)  # [T]
        rows.append(_step_errors(count, errors.nan_to_num(nan=math.inf, posinf=math.inf)))
    return Evaluation(shots, tasks, query_shots, seed, inner_lr, tuple(rows))


def fit_sinusoid(
    model: nn.Module,
    inner_lr: float = 0.01,
    *,
    shots: int = 5,
    steps: Sequence[int] = (0, 1, 10),
    tasks: int = 4,
    points: int = 201,
    seed: int = DEFAULT_SEED,
    backend: str = "auto",
    inner_params: Sequence[str] | None = None,
) -> Fits:
    """Curves to plot: the truth and the model's predictions on an even grid over the x range."""
    check_steps(steps)
    sampler = _sampler(model, seed)
    waves = sampler.waves(tasks)
    support_x, support_y, _, _ = sampler.episodes(waves, shots, query_shots=1)
    x = torch.linspace(*sampler.x_range, points, dtype=sampler.dtype, device=sampler.device)
    grid = x.reshape(1, -1, 1).repeat(tasks, 1, 1)  # [T, G, 1]
    build = partial(MAML, model, "mse", inner_lr, backend=backend, inner_params=inner_params)
    predictions = {count: _adapted(build, support_x, support_y, grid, count) for count in steps}
    return Fits(
        x=x.cpu(),
        truth=waves(grid).squeeze(-1).cpu(),
        support_x=support_x.squeeze(-1).cpu(),
        support_y=support_y.squeeze(-1).cpu(),
        predictions={count: y.squeeze(-1).cpu() for count, y in predictions.items()},
    )


def _step_errors(steps: int, errors: Tensor) -> StepErrors:
    others = errors[errors <= DIVERGED]
    return StepErrors(
        steps,
        *mean_and_ci95(errors),
        median=errors.median().item(),
        diverged=len(errors) - len(others),
        mse_others=mean_and_ci95(others)[0],
        ci95_others=mean_and_ci95(others)[1],
    )


@torch.no_grad()
def _adapted(
    build: Callable[..., MAML],
    support_x: Tensor,
    support_y: Tensor,
    x: Tensor,
    steps: int,
) -> Tensor:
    """Predictions at x [T, M, 1] after `steps` steps on the support rows; NaN if they overflow."""
    maml = build(inner_steps=steps)
    if steps == 0:
        return maml.model(x)
    kept, outputs = adapted_outputs(maml, support_x, support_y, x, steps)
    predictions = torch.full_like(x, math.nan)
    if len(kept):
        predictions[kept] = outputs
    return predictions


def _sampler(model: nn.Module, seed: int) -> SinusoidTasks:
    parameter = next(model.parameters())
    return SinusoidTasks(seed, parameter.device, parameter.dtype)
