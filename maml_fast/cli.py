"""The command `maml-fast`: train a model by MAML, and evaluate what was trained."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

try:
    from cyclopts import App, Parameter
    from cyclopts.exceptions import CycloptsError

    from maml_fast.cli_evaluate import evaluate
    from maml_fast.cli_options import Begin, option_sources
    from maml_fast.cli_profile import profile_app
    from maml_fast.cli_report import report
    from maml_fast.config import TrainConfig
    from maml_fast.config_images import FolderConfig, OmniglotConfig
    from maml_fast.config_sinusoid import SinusoidConfig
    from maml_fast.memory import refused_bytes
    from maml_fast.ranks import label
    from maml_fast.train import train
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("cyclopts", "rich", "safetensors", "filelock"):
        raise
    print(f'maml-fast: {missing} is missing; try: pip install "maml_fast[train]"', file=sys.stderr)
    raise SystemExit(2) from None


def _shown(default: object) -> str | None:
    """A default as it would be written; nothing where an option is left out."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or None
    if isinstance(default, float):
        return f"{default:.4g}"
    return None if default is None else str(default)


app = App(
    name="maml-fast",
    help="Fast, exact MAML meta-learning.",
    version=lambda: version("maml_fast"),
    config=option_sources,
    # Lists are written --shots 5 10 20.
    default_parameter=Parameter(consume_multiple=1, negative_iterable=(), show_default=_shown),
)
train_app = App(name="train", help="Meta-train a model.")
app.command(train_app)
app.command(evaluate)
app.command(profile_app)
app.command(report)


@app.command
def features(*, markdown: bool = False) -> None:
    """Show what each backend runs of the MAML family; found out by running it, in a few seconds.

    Parameters
    ----------
    markdown
        As a table in Markdown.
    """
    from rich.console import Console
    from rich.table import Table

    from maml_fast.features import all_found, as_markdown, reasons

    found = all_found()
    if markdown:
        print(as_markdown(found))
        return
    console = Console()
    names = list(dict.fromkeys(one.backend for one in found))
    table = Table("", *names)
    for feature in dict.fromkeys(one.feature for one in found):
        marks = ["yes" if one.runs else "-" for one in found if one.feature == feature]
        table.add_row(feature, *marks)
    console.print(table)
    for line in reasons(found):
        console.print(line, highlight=False)


SINUSOID, OMNIGLOT, FOLDER = SinusoidConfig(), OmniglotConfig(), FolderConfig()
AS_USUAL = Begin()


@train_app.command(name="sinusoid")
def train_sinusoid(
    config: Annotated[SinusoidConfig, Parameter(name="*")] = SINUSOID,
    *,
    begin: Annotated[Begin, Parameter(name="*")] = AS_USUAL,
) -> int:
    """Meta-train on sinusoid regression; the defaults are the MAML paper's.

    With --method cavia they are the CAVIA paper's (Zintgraf et al. 2019).

    Ctrl-C, or SIGTERM, saves a checkpoint and stops; --resume goes on to the same bits.
    """
    return _train(config, begin)


@train_app.command(name="omniglot")
def train_omniglot(
    config: Annotated[OmniglotConfig, Parameter(name="*")] = OMNIGLOT,
    *,
    begin: Annotated[Begin, Parameter(name="*")] = AS_USUAL,
) -> int:
    """Meta-train on Omniglot; the defaults are the MAML paper's, for 5 ways and 1 shot.

    From 20 ways on they are the paper's for 20 ways: 16 tasks, 5 steps in training and evaluation.
    With more shots there are as many query drawings. The loss is the mean over a task's rows, so
    that the original code's rates 0.4 (5 ways) and 0.1 (20 ways) are both 2.0 here.

    Validation, with the best checkpoint kept, is on held-out characters. Ctrl-C, or
    SIGTERM, saves a checkpoint and stops; --resume goes on to the same bits.
    """
    return _train(config, begin)


@train_app.command(name="images")
def train_images(
    config: Annotated[FolderConfig, Parameter(name="*")] = FOLDER,
    *,
    begin: Annotated[Begin, Parameter(name="*")] = AS_USUAL,
) -> int:
    """Meta-train on a folder of class sub-folders of images: --data FOLDER.

    The defaults are the MAML paper's for miniImageNet, 5 ways and 1 shot; from 5 shots on there
    are 2 tasks. The loss is the mean over a task's rows, so that the original code's rate 0.01 is
    0.01 ways here, 0.05, and its limit of 10 for the gradient is 10 shots / (query shots * ways).

    Validation, with the best checkpoint kept, is on held-out classes. Ctrl-C, or
    SIGTERM, saves a checkpoint and stops; --resume goes on to the same bits.
    """
    return _train(config, begin)


def _train(config: TrainConfig, begin: Begin) -> int:
    result = train(
        config,
        resume=begin.resume,
        overwrite=begin.overwrite,
        previous=begin.previous,
        announce=(lambda line: None) if config.quiet else lambda line: print(line, file=sys.stderr),
    )
    # SIGTERM is how a scheduler asks, and done as asked is no failure. Ctrl-C is told as shells
    # report a process ended by that signal.
    status = 0 if result.stopped_by in (0, signal.SIGTERM) else 128 + result.stopped_by
    if label():  # the first rank says it
        return status
    where = shlex.quote(str(result.checkpoint))
    if result.skipped:
        print(f"skipped {result.skipped:,} tasks whose loss or gradient was not finite")
    if result.stopped_by:
        folder = shlex.quote(str(config.output))
        print(
            f"stopped after iteration {result.iteration} of {config.iterations}, saved in {where}"
        )
        print(f"go on with: maml-fast train {config.kind} --resume --output {folder}")
        return status
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    print(f"trained {result.iteration} iterations{loss}, saved in {where}")
    if result.best is not None:
        where = shlex.quote(str(result.best.checkpoint))
        print(
            f"best in validation: {result.best.accuracy:.2%} at iteration "
            f"{result.best.iteration}, saved in {where}"
        )
    print(f"evaluate with: maml-fast evaluate {where}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 after an error, told in one line."""
    try:
        result = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except KeyboardInterrupt:
        print("maml-fast: interrupted; a run's last checkpoint stands", file=sys.stderr)
        return 130
    except (CycloptsError, ValueError, FloatingPointError, OSError) as error:
        message = " ".join(str(error).split())
        rank = "" if message.startswith("rank ") else label()
        print(f"maml-fast: {rank}{message}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        refused = refused_bytes(error)
        if refused is None:
            raise
        what = " ".join(str(error).split()) or "no more is had"
        if refused:
            what = f"{refused:,} bytes were wanted at once"
        advice = "less is needed with fewer tasks or smaller images"
        print(f"maml-fast: out of memory: {what}; {advice}", file=sys.stderr)
        return 2
    return result or 0
