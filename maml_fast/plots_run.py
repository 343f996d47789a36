"""Curves of a training run, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]  # the lines of history.jsonl


def loss_figure(history: History) -> Figure | None:
    """The training's loss over the iterations; None where there is none yet."""
    x, y = points(history, "loss")
    if not x:
        return None
    figure, axes = _axes("mean query loss")
    axes.plot(x, y, lw=1)
    if min(y) > 0:
        axes.set_yscale("log")
    return figure


def validation_figure(history: History) -> Figure | None:
    """Accuracy on the held-out classes with its 95% band; None where nothing was validated."""
    x, y = points(history, "validation_accuracy")
    if not x:
        return None
    _, ci = points(history, "validation_ci95")
    figure, axes = _axes("validation accuracy in %")
    axes.plot(x, [100 * value for value in y], marker=".", lw=1)
    if len(ci) == len(y):
        low = [100 * (mean - half) for mean, half in zip(y, ci, strict=True)]
        high = [100 * (mean + half) for mean, half in zip(y, ci, strict=True)]
        axes.fill_between(x, low, high, alpha=0.2, lw=0)
    return figure


def rates_figure(history: History) -> Figure | None:
    """The learned inner rates; None where none is learned."""
    known = {"iteration", "loss", "skipped_tasks"}
    names = dict.fromkeys(
        name for line in history if "loss" in line for name in line if name not in known
    )
    if not names:
        return None
    figure, axes = _axes("learned inner rate")
    for name in names:
        axes.plot(*points(history, name), lw=1, label=name)
    axes.legend()
    return figure


def skipped_figure(history: History) -> Figure | None:
    """Tasks left out, by line of the history; None where none was."""
    x, y = points(history, "skipped_tasks")
    if not any(y):
        return None
    figure, axes = _axes("skipped tasks")
    axes.step(x, y, where="mid", lw=1)
    return figure


def points(history: History, name: str) -> tuple[list[int], list[float]]:
    """Iterations, and the figure of that name there."""
    found = [(line["iteration"], line[name]) for line in history if name in line]
    return [x for x, _ in found], [y for _, y in found]


def as_svg(figure: Figure) -> bytes:
    """The drawing; the same figure gives the same bytes."""
    drawn = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "maml_fast", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _axes(what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3, which="both")
    return figure, axes
