"""Figures of an evaluation. They are drawn without a display, and without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from maml_fast.checkpoint import write_atomically
from maml_fast.evaluate import DIVERGED, FINN, Evaluation, Fits, Paper

DPI = 120


def adaptation_figure(evaluations: Sequence[Evaluation], paper: Paper | None = FINN) -> Figure:
    """Error against gradient steps, a line with its 95% band for each number of shots.

    Where tasks diverge, a dotted line shows the mean of the others, and the mean of all may leave
    the frame.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for evaluation in evaluations:
        errors = evaluation.errors
        steps = [row.steps for row in errors]
        (line,) = axes.plot(
            steps, [row.mse for row in errors], marker=".", label=f"{evaluation.shots} shots"
        )
        low = [row.mse - row.ci95 for row in errors]
        high = [row.mse + row.ci95 for row in errors]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
        diverged = max(row.diverged for row in errors)
        if diverged:
            label = f"{evaluation.shots} shots without {diverged} diverging of {evaluation.tasks}"
            others = [row.mse_others for row in errors]
            axes.plot(steps, others, linestyle=":", color=line.get_color(), label=label)
    if paper is not None and any(paper.shots == evaluation.shots for evaluation in evaluations):
        label = f"{paper.source}, {paper.shots} shots"
        reported = next(iter(paper.columns.values()))
        axes.plot(
            list(reported),
            list(reported.values()),
            marker="x",
            linestyle="none",
            color="black",
            label=label,
        )
    axes.set_yscale("log")
    shown = [row.mse_others for evaluation in evaluations for row in evaluation.errors]
    axes.set_ylim(top=2 * max(filter(math.isfinite, shown), default=DIVERGED))
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("mean squared error")
    axes.set_title(f"Adaptation to {evaluations[0].tasks} new sinusoids, 95% intervals")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def fits_figure(fits: Fits) -> Figure:
    """One panel a task: the true curve, the support points, and the model before and after."""
    tasks = len(fits.truth)
    columns = min(tasks, 2)
    rows = -(-tasks // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for task, axes in zip(range(tasks), panels, strict=False):
        axes.plot(fits.x, fits.truth[task], color="black", label="truth")
        for count, predictions in fits.predictions.items():
            label = "1 step" if count == 1 else f"{count} steps"
            axes.plot(fits.x, predictions[task], linestyle="--", label=label)
        axes.plot(
            fits.support_x[task], fits.support_y[task], "^", color="tab:purple", label="support"
        )
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[tasks:]:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize="small")
    figure.supxlabel("x")
    figure.supylabel("y")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all; its size in pixels is that in inches times `DPI`.

    Raises:
        OSError: naming the file, where the one before still is.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.getvalue())
