"""The table of an evaluation, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from maml_fast.evaluate import PAPER_MAML, PAPER_PRETRAINED, PAPER_SHOTS, Evaluation


def error_table(evaluations: Sequence[Evaluation]) -> Table:
    """Mean squared errors, beside the paper's where that has them; notes where tasks diverged."""
    first = evaluations[0]
    table = Table(title=f"Mean squared error, {first.tasks} tasks, inner rate {first.inner_lr:g}")
    for heading in ("shots", "steps", "mean, 95%", "median", "paper: MAML", "pretrained"):
        table.add_column(heading, justify="right")
    notes: list[str] = []
    for evaluation in evaluations:
        for row in evaluation.errors:
            known = evaluation.shots == PAPER_SHOTS and row.steps in PAPER_MAML
            paper = (PAPER_MAML[row.steps], PAPER_PRETRAINED[row.steps]) if known else ("", "")
            mean = f"{_number(row.mse)} ± {_number(row.ci95)}"
            if row.diverged:
                mean += f" [{len(notes) + 1}]"
                notes.append(
                    f"[{len(notes) + 1}] diverged on {row.diverged} of {evaluation.tasks} tasks; "
                    f"the others: {_number(row.mse_others)} ± {_number(row.ci95_others)}"
                )
            cells = (evaluation.shots, row.steps, mean, _number(row.median), *paper)
            table.add_row(*(Text(str(cell)) for cell in cells))
        table.add_section()
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"
