"""A run as a picture: every implementation of each case, timed or not."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import text
from benchmarks.results import Results

ACROSS = 3
OURS, PEER = "#1f5fa8", "#8a8a8a"


def save(results: Results, path: Path) -> None:
    """Write the picture as PNG.

    Points, not bars: the axes are logarithmic and have no zero to start from.
    """
    down = math.ceil(len(results.cases) / ACROSS)
    figure = Figure(figsize=(6 * ACROSS, 2.9 * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, ACROSS, squeeze=False).flatten()
    for axis in axes[len(results.cases) :]:
        axis.axis("off")
    for axis, case in zip(axes, results.cases, strict=False):
        _draw(axis, results, case)
    machine = results.machine
    figure.suptitle(
        f"Milliseconds a meta-step, median and 20th to 80th percentile (blue: maml_fast). "
        f"{machine['device']}, {machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}"
    )
    figure.savefig(path, dpi=110)


def _draw(axis: Axes, results: Results, case: str) -> None:
    rows = results.of_case(case)[::-1]
    timed = [row.median * 1e3 for row in rows if row.times]
    left = min(timed, default=1.0) / 2
    axis.set_title(case, fontsize=10)
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())  # they would run into each other
    axis.set_xlim(left, max(timed, default=1.0) * 6)
    axis.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    for place, row in enumerate(rows):
        if not row.times:
            axis.text(
                left * 1.1, place, f"{row.status}: {row.reason}"[:60], va="center", fontsize=7
            )
            continue
        low, high = (value * 1e3 for value in row.spread)
        colour = OURS if row.ours else PEER
        axis.axhline(place, color="#eeeeee", linewidth=1, zorder=0)
        axis.plot([low, high], [place, place], color=colour, linewidth=3)
        axis.plot(row.median * 1e3, place, "o", color=colour)
        axis.text(high * 1.15, place, text.seconds(row.median), va="center", fontsize=8)
