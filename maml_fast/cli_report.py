"""The command `maml-fast report`."""

from __future__ import annotations

import shlex
from pathlib import Path

from maml_fast.config import ConfigError


def report(folder: Path, /, *, output: Path | None = None) -> int:
    """Write a report of a training run: one HTML file with curves, configuration and versions.

    Parameters
    ----------
    folder
        The run's output folder; the run may be going on.
    output
        File to write; report.html in the folder if left out.
    """
    try:
        from maml_fast.run_report import write_report  # late: matplotlib takes its time
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in ("matplotlib", "jinja2"):
            raise
        raise ConfigError(f'{missing} is missing; try: pip install "maml_fast[train]"') from None
    print(f"report in {shlex.quote(str(write_report(folder, output)))}")
    return 0
