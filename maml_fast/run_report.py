"""The report of a training run: one HTML file, with all that it shows inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from maml_fast.checkpoint import Checkpoint, load_checkpoint, write_atomically
from maml_fast.config import kind_of
from maml_fast.plots_run import (
    History,
    as_svg,
    loss_figure,
    points,
    rates_figure,
    skipped_figure,
    validation_figure,
)
from maml_fast.progress import read_history
from maml_fast.run_files import RunFiles
from maml_fast.starts import read_starts

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("run_report.html")
FIGURES = {
    "Loss": loss_figure,
    "Validation": validation_figure,
    "Learned rates": rates_figure,
    "Skipped tasks": skipped_figure,
}


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write the report of the run in `folder`, which may be running, to `path`; report.html there
    if left out. What comes from the run is escaped, and nothing is loaded from elsewhere.

    Raises:
        CheckpointError: the folder has no sound checkpoint.
        ValueError: a line of the history is none.
        OSError: the file cannot be written.
    """
    files = RunFiles(folder)
    with files.telling_of_previous():
        checkpoint = load_checkpoint(files.checkpoint)
    history = [line.figures for line in read_history(files.history)]
    figures = {name: draw(history) for name, draw in FIGURES.items()}
    starts = read_starts(files.starts)
    kind, config = kind_of(checkpoint.config)
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        title=f"{kind}: {folder}",
        summary=_summary(checkpoint, config, history, files),
        figures=[
            (name, base64.b64encode(as_svg(figure)).decode())
            for name, figure in figures.items()
            if figure is not None
        ],
        config=[(name, _shown(value)) for name, value in config.items()],
        starts=starts,
        columns=list(dict.fromkeys(name for start in starts for name in start)),
        version=version("maml_fast"),
    )
    path = folder / REPORT if path is None else path
    write_atomically(path, text.encode())
    return path


def _summary(
    checkpoint: Checkpoint, config: Mapping[str, Any], history: History, files: RunFiles
) -> list[tuple[str, str]]:
    rows = [("trained", f"{checkpoint.iteration:,} of {config.get('iterations', 0):,} iterations")]
    if (losses := points(history, "loss")) and losses[0]:
        rows.append(("latest loss", f"{losses[1][-1]:.4g} at iteration {losses[0][-1]:,}"))
    x, y = points(history, "validation_accuracy")
    if x:
        best = max(range(len(y)), key=y.__getitem__)  # the first, as the best checkpoint is
        rows.append(("best validation", f"{y[best]:.2%} at iteration {x[best]:,}"))
    for name, rate in sorted(checkpoint.groups.get("rates", {}).items()):
        shown = f"{rate.item():.4g}" if rate.numel() == 1 else f"{rate.tolist()}"
        rows.append((f"learned {name}", shown))
    counted = points(history, "skipped_tasks")[1]
    if counted:
        rows.append(("skipped tasks", f"{sum(counted):,}"))
    for part, what in (("training", "classes trained on"), ("held_out", "classes held out")):
        if isinstance(names := checkpoint.data.get(part), list):
            rows.append((what, f"{len(names):,}"))
    return [*rows, ("checkpoint", str(files.checkpoint))]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
