"""Figures of an evaluation on images: accuracy by steps, and a task with a model's answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from maml_fast.config_images import ImageConfig
from maml_fast.evaluate_images import Answers, ImageEvaluation
from maml_fast.plots import save_png
from maml_fast.report import reported

__all__ = ["accuracy_figure", "answers_figure", "save_png"]

RIGHT, WRONG, GIVEN = "tab:green", "tab:red", "tab:gray"
ROWS = 6  # of images of a class that a picture shows at most


def accuracy_figure(
    config: ImageConfig, classes: str, evaluations: Sequence[ImageEvaluation]
) -> Figure:
    """Accuracy against gradient steps, a line with its 95% band for each number of shots."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for evaluation in evaluations:
        found = evaluation.accuracies
        steps = [row.steps for row in found]
        label = _count(evaluation.shots, "shot")
        (line,) = axes.plot(steps, [100 * row.accuracy for row in found], marker=".", label=label)
        low = [100 * (row.accuracy - row.ci95) for row in found]
        high = [100 * (row.accuracy + row.ci95) for row in found]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
        paper = reported(config, classes, evaluation)
        if paper is not None:
            axes.errorbar(
                [paper.steps],
                [100 * paper.accuracy],
                yerr=[100 * paper.ci95],
                marker="x",
                linestyle="none",
                color=line.get_color(),
                label=f"Finn et al. 2017, {label}",
            )
    chance = 100 / config.ways
    axes.axhline(chance, color="black", linestyle=":", lw=1, label=f"chance, {chance:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("accuracy in %")
    first = evaluations[0]
    axes.set_title(f"{config.ways} ways, {first.tasks} tasks of new images, 95% intervals")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def answers_figure(answers: Answers, invert: bool) -> Figure:
    """A task's classes in columns: above the support images, below query images with the answers.

    A frame and a sign say whether an answer is right, and a number which class was answered.
    `invert` shows 1 as dark, as ink.
    """
    ways = int(answers.support_y.max()) + 1
    support = [answers.support_x[answers.support_y == way] for way in range(ways)]
    query = [answers.query_x[answers.query_y == way] for way in range(ways)]
    answered = [answers.predicted[answers.query_y == way].tolist() for way in range(ways)]
    shots, judged = (min(len(images[0]), ROWS) for images in (support, query))
    figure = Figure(figsize=(1.1 * ways + 0.6, 1.25 * (shots + judged) + 0.6), layout="constrained")
    panels = figure.subplots(shots + judged, ways, squeeze=False)
    for way in range(ways):
        for row in range(shots):
            _show(panels[row, way], support[way][row], invert, GIVEN)
        for row in range(judged):
            axes, answer = panels[shots + row, way], answered[way][row]
            right = answer == way
            _show(axes, query[way][row], invert, RIGHT if right else WRONG)
            said = f"class {answer + 1}" if answer >= 0 else "none"
            axes.set_xlabel(f"{'✓' if right else '✗'} {said}", fontsize=8, labelpad=1)
        panels[0, way].set_title(f"class {way + 1}", fontsize=9)
    panels[0, 0].set_ylabel("support", fontsize=9)
    panels[shots, 0].set_ylabel("query", fontsize=9)
    hits, rows = int((answers.predicted == answers.query_y).sum()), len(answers.query_y)
    figure.suptitle(
        f"{hits} of {rows} query images right after {_count(answers.steps, 'step')}"
        + (f", {judged * ways} are shown" if judged * ways < rows else ""),
        fontsize=10,
    )
    return figure


def _show(axes: Axes, image: Tensor, invert: bool, frame: str) -> None:
    """An image [C, H, W] of 0 to 1 in a coloured frame."""
    pixels = np.asarray(image.double()).transpose(1, 2, 0)
    if invert:
        pixels = 1 - pixels
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
