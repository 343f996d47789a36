"""Evaluation on new few-shot tasks of images: accuracy after k gradient steps, with intervals.

A task's query rows are classified together: where a network normalises by its batch, a row's
prediction depends on the other rows of its task (transductive), as in the paper.

Dimensions: T tasks, N = ways * shots support rows, M = ways * query_shots query rows per task;
images of C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_fast import MAML
from maml_fast.measure import (
    DEFAULT_SEED,
    adapted_outputs,
    check_steps,
    check_tasks,
    mean_and_ci95,
)
from maml_fast.tasks import ImageSet, ImageTasks

# Tasks are adapted in batches of this many pixels: 33 of 5 ways, 1 + 15 images of 28 x 28.
PIXELS = 2**21


class Reported(NamedTuple):
    """An accuracy that a paper reports, with half its 95% interval, after so many steps."""

    steps: int
    accuracy: float
    ci95: float


# Finn et al. 2017, table 1, Omniglot: by model, ways and shots.
PAPER_OMNIGLOT = {
    ("conv4", 5, 1): Reported(3, 0.987, 0.004),
    ("conv4", 5, 5): Reported(3, 0.999, 0.001),
    ("conv4", 20, 1): Reported(5, 0.958, 0.003),
    ("conv4", 20, 5): Reported(5, 0.989, 0.002),
    ("fc", 5, 1): Reported(3, 0.897, 0.011),
    ("fc", 5, 5): Reported(3, 0.975, 0.006),
}
# All of them: channels of conv4, and the inner rate in this program's convention (config_images).
PAPER_FILTERS, PAPER_RATE = 64, 2.0


@dataclass(frozen=True)
class StepAccuracy:
    """The share of query images classified right after a number of gradient steps."""

    steps: int
    accuracy: float  # mean over all tasks, 0 to 1
    ci95: float  # half the width of the mean's 95% confidence interval
    diverged: int  # number of tasks with predictions that are not finite, which count as wrong


@dataclass(frozen=True)
class ImageEvaluation:
    """Accuracies over `tasks` tasks of `ways` classes out of `classes`."""

    ways: int
    shots: int
    query_shots: int
    tasks: int
    seed: int
    inner_lr: float
    classes: int
    rotations: bool
    accuracies: tuple[StepAccuracy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Answers:
    """One task, and what an adapted model makes of its query images."""

    steps: int
    support_x: Tensor  # [N, C, H, W], 0 to 1
    support_y: Tensor  # [N]
    query_x: Tensor  # [M, C, H, W]
    query_y: Tensor  # [M]
    predicted: Tensor  # [M] classes; -1 where the prediction is not finite


def evaluate_images(
    model: nn.Module,
    inner_lr: float,
    images: ImageSet,
    *,
    ways: int,
    shots: int = 1,
    query_shots: int = 15,
    steps: Sequence[int] = (0, 1, 3),
    tasks: int = 600,
    rotations: bool = False,
    seed: int = DEFAULT_SEED,
    backend: str = "auto",
) -> ImageEvaluation:
    """Adapt `model` to new tasks and count how many of their query images it classifies right.

    The interval is 1.96 standard errors of the mean over tasks. All numbers of steps are measured
    on the same tasks, which depend on the images, the seed and the sizes alone.

    Args:
        model: from [rows, C, H, W] to [rows, ways]; the tasks are drawn on its device.
        inner_lr: rate of the gradient steps, of the mean cross entropy.
        images: the classes that tasks are drawn from.
        ways: classes per task.
        shots: support images per class, all of which every gradient step uses.
        query_shots: query images per class.
        steps: numbers of gradient steps to measure after; 0 is the model as it is.
        tasks: number of tasks, at least 2.
        rotations: count each class four times, rotated by 0, 90, 180 and 270 degrees.
        seed: of the tasks; below 2^31 they are none that a run was trained on.
        backend: of `MAML`.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is wanted.
        DataError: there are too few classes, or a class has too few images.
    """
    maml, sampler = _prepared(model, inner_lr, images, ways, rotations, seed, backend)
    found = accuracies(
        maml, sampler, shots=shots, query_shots=query_shots, steps=steps, tasks=tasks
    )
    classes = len(images.names)
    return ImageEvaluation(
        ways, shots, query_shots, tasks, seed, inner_lr, classes, rotations, found
    )


def accuracies(
    maml: MAML,
    sampler: ImageTasks,
    *,
    shots: int,
    query_shots: int,
    steps: Sequence[int],
    tasks: int,
) -> tuple[StepAccuracy, ...]:
    """What `evaluate_images` measures, with a `MAML` and a stream of tasks that are there."""
    check_steps(steps)
    check_tasks(tasks)
    shares: dict[int, list[Tensor]] = {count: [] for count in steps}
    diverged = dict.fromkeys(steps, 0)
    for size in _batches(tasks, sampler, shots, query_shots):
        support_x, support_y, query_x, query_y = sampler.sample(size, shots, query_shots)
        for count in shares:
            predicted = _predicted(maml, support_x, support_y, query_x, count)
            shares[count].append((predicted == query_y).to(torch.float64).mean(1))
            diverged[count] += int((predicted < 0).any(1).sum())
    return tuple(
        StepAccuracy(count, *mean_and_ci95(torch.cat(shares[count])), diverged[count])
        for count in steps
    )


def answer_task(
    model: nn.Module,
    inner_lr: float,
    images: ImageSet,
    *,
    ways: int,
    shots: int = 1,
    query_shots: int = 15,
    steps: int = 3,
    rotations: bool = False,
    seed: int = DEFAULT_SEED,
    backend: str = "auto",
) -> Answers:
    """One task of a stream of its own, and the predictions for it; arguments as above."""
    check_steps((steps,))
    maml, sampler = _prepared(model, inner_lr, images, ways, rotations, seed, backend)
    episodes = sampler.sample(1, shots, query_shots)
    predicted = _predicted(maml, *episodes[:3], steps)
    support_x, support_y, query_x, query_y = (tensor[0].cpu() for tensor in episodes)
    return Answers(steps, support_x, support_y, query_x, query_y, predicted[0].cpu())


def _prepared(
    model: nn.Module,
    inner_lr: float,
    images: ImageSet,
    ways: int,
    rotations: bool,
    seed: int,
    backend: str,
) -> tuple[MAML, ImageTasks]:
    parameter = next(model.parameters())
    sampler = ImageTasks(
        images,
        ways,
        rotations=rotations,
        seed=seed,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    return MAML(model, loss="cross_entropy", inner_lr=inner_lr, backend=backend), sampler


def _batches(tasks: int, sampler: ImageTasks, shots: int, query_shots: int) -> Iterator[int]:
    """Sizes of batches that add up to `tasks`."""
    pixels = sampler.ways * (shots + query_shots) * sampler.data.images[0].numel()
    size = max(1, PIXELS // pixels)
    for done in range(0, tasks, size):
        yield min(size, tasks - done)


def _predicted(
    maml: MAML, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int
) -> Tensor:
    """Classes [T, M] after `steps` steps; -1 where a prediction is not finite."""
    kept, outputs = adapted_outputs(maml, support_x, support_y, query_x, steps)
    predicted = torch.full(query_x.shape[:2], -1, device=query_x.device)
    if len(kept):
        finite = outputs.isfinite().all(-1)
        predicted[kept] = torch.where(finite, outputs.argmax(-1), -1)
    return predicted
