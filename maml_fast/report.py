"""The tables of evaluations, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from maml_fast.config_images import ImageConfig, OmniglotConfig
from maml_fast.evaluate import FINN, Evaluation, Paper
from maml_fast.evaluate_images import (
    PAPER_FILTERS,
    PAPER_OMNIGLOT,
    PAPER_RATE,
    ImageEvaluation,
    Reported,
)


def error_table(evaluations: Sequence[Evaluation], paper: Paper | None = FINN) -> Table:
    """Mean squared errors, beside the paper's where that has them; notes where tasks diverged."""
    columns = list(paper.columns) if paper else []
    first = evaluations[0]
    table = Table(title=f"Mean squared error, {first.tasks} tasks, inner rate {first.inner_lr:g}")
    beside = [f"paper: {name}" if name == columns[0] else name for name in columns]
    for heading in ("shots", "steps", "mean, 95%", "median", *beside):
        table.add_column(heading, justify="right")
    notes: list[str] = []
    for evaluation in evaluations:
        for row in evaluation.errors:
            known: list[float | str] = [""] * len(columns)
            if paper is not None and evaluation.shots == paper.shots:
                known = [errors.get(row.steps, "") for errors in paper.columns.values()]
            mean = f"{_number(row.mse)} ± {_number(row.ci95)}"
            if row.diverged:
                mean += f" [{len(notes) + 1}]"
                notes.append(
                    f"[{len(notes) + 1}] diverged on {row.diverged} of {evaluation.tasks} tasks; "
                    f"the others: {_number(row.mse_others)} ± {_number(row.ci95_others)}"
                )
            cells = (evaluation.shots, row.steps, mean, _number(row.median), *known)
            table.add_row(*(Text(str(cell)) for cell in cells))
        table.add_section()
    if paper is not None and paper.note:
        notes.append(paper.note)
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


def accuracy_table(
    config: ImageConfig,
    classes: str,
    evaluations: Sequence[ImageEvaluation],
    chose: bool = False,
) -> Table:
    """Accuracies in percent, beside the paper's where the setting is the paper's.

    `chose` says that the run was validated on these classes, which a note then tells.
    """
    first = evaluations[0]
    turned = " x 4 rotations" if first.rotations else ""
    table = Table(
        title=f"Accuracy in %, {config.ways} ways, {first.tasks} tasks from {first.classes} classes"
        f"{turned} ({classes}), inner rate {first.inner_lr:g}"
    )
    for heading in ("shots", "queries a class", "steps", "mean, 95%", "paper"):
        table.add_column(heading, justify="right")
    notes = ["Query images of a task are classified together (transductive batch norm)."]
    for evaluation in evaluations:
        paper = reported(config, classes, evaluation)
        for row in evaluation.accuracies:
            mean = _percent(row.accuracy, row.ci95)
            if row.diverged:
                mean += " [*]"
                notes.append(f"[*] diverged after {row.steps} steps: {row.diverged} tasks.")
            beside = paper is not None and paper.steps == row.steps
            known = _percent(paper.accuracy, paper.ci95) if paper and beside else ""
            cells = (evaluation.shots, evaluation.query_shots, row.steps, mean, known)
            table.add_row(*(Text(str(cell)) for cell in cells))
        table.add_section()
    if chose:
        notes.append(
            "The training was validated on these classes: they chose best.safetensors and the "
            "number of steps, so its accuracy may be too high; --data gives others."
        )
    if any(reported(config, classes, evaluation) for evaluation in evaluations):
        notes.append(
            "Paper: trained on 1,200 characters; test characters rotated too, and as many queries "
            "a class as shots."
        )
    table.caption = Text("\n".join(notes))
    return table


def reported(config: ImageConfig, classes: str, evaluation: ImageEvaluation) -> Reported | None:
    """The paper's accuracy, where network, training and evaluation are what it describes.

    Which characters are held out, and the numbers of iterations, tasks and query images may differ.
    """
    if not isinstance(config, OmniglotConfig) or classes != "held-out":
        return None
    network = config.model == "fc" or config.filters == PAPER_FILTERS
    recipe = config.recipe({"ways": config.ways, "shots": config.shots})
    trained = (config.inner_lr, config.inner_steps) == (PAPER_RATE, recipe["inner_steps"])
    plain = config.rotations and not config.first_order and not config.learn_inner_lr
    same = (evaluation.shots, evaluation.inner_lr) == (config.shots, PAPER_RATE)
    if not (network and trained and plain and same):
        return None
    return PAPER_OMNIGLOT.get((config.model, config.ways, config.shots))


def paper_accuracy(
    config: ImageConfig, classes: str, evaluation: ImageEvaluation
) -> dict[str, Any] | None:
    """The same as plain values for JSON."""
    paper = reported(config, classes, evaluation)
    return None if paper is None else paper._asdict()


def _percent(accuracy: float, ci95: float) -> str:
    return f"{100 * accuracy:.2f} ± {100 * ci95:.2f}"
