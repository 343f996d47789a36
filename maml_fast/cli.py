"""The command `maml-fast`: train on the sinusoid, and evaluate what was trained."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

try:
    from cyclopts import App, Argument, ArgumentCollection, Parameter
    from cyclopts.config import Dict
    from cyclopts.exceptions import CycloptsError
    from rich.console import Console

    from maml_fast.checkpoint import load_checkpoint, write_atomically
    from maml_fast.config import ConfigError, TrainConfig
    from maml_fast.evaluate import (
        DEFAULT_SEED,
        PAPER_MAML,
        PAPER_PRETRAINED,
        PAPER_SHOTS,
        Evaluation,
        evaluate_sinusoid,
        fit_sinusoid,
    )
    from maml_fast.progress import cpu_threads
    from maml_fast.report import error_table
    from maml_fast.run import load_trained
    from maml_fast.train import CHECKPOINT, train
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("cyclopts", "rich", "safetensors"):
        raise
    print(f'maml-fast: {missing} is missing; try: pip install "maml_fast[train]"', file=sys.stderr)
    raise SystemExit(2) from None

app = App(
    name="maml-fast",
    help="Fast, exact MAML meta-learning.",
    version=lambda: version("maml_fast"),
    # Lists are written --shots 5 10 20.
    default_parameter=Parameter(consume_multiple=1, negative_iterable=()),
)
train_app = App(name="train", help="Meta-train a model.")
app.command(train_app)

PAPER_CONFIG = TrainConfig()


@train_app.command(name="sinusoid")
def train_sinusoid(
    config: Annotated[TrainConfig, Parameter(name="*")] = PAPER_CONFIG,
    *,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Meta-train on sinusoid regression; the defaults are the MAML paper's.

    Ctrl-C saves a checkpoint and stops.

    Parameters
    ----------
    config_file
        TOML file with any of these options as keys, as in `inner_steps = 5`; flags beat it.
    resume
        Go on with the run in the output folder, with its options.
    overwrite
        Delete the run in the output folder.
    """
    result = train(config, resume=resume, overwrite=overwrite)
    where = shlex.quote(str(result.checkpoint))
    if result.stopped_by:
        folder = shlex.quote(str(config.output))
        print(
            f"stopped after iteration {result.iteration} of {config.iterations}, saved in {where}"
        )
        print(f"go on with: maml-fast train sinusoid --resume --output {folder}")
        return 128 + result.stopped_by  # as shells report a process ended by that signal
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    print(f"trained {result.iteration} iterations{loss}, saved in {where}")
    print(f"evaluate with: maml-fast evaluate {where}")
    return 0


@app.command
def evaluate(
    checkpoint: Path,
    /,
    *,
    shots: tuple[int, ...] = (PAPER_SHOTS,),
    steps: tuple[int, ...] = (0, 1, 5, 10),
    tasks: int = 600,
    query_shots: int = 100,
    inner_lr: float | None = None,
    seed: int = DEFAULT_SEED,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    json_path: Annotated[str | None, Parameter(name="--json", allow_leading_hyphen=True)] = None,
    plot_dir: Path | None = None,
) -> int:
    """Measure the error of a trained model on new tasks, beside the MAML paper's.

    Parameters
    ----------
    checkpoint
        File that training wrote.
    shots
        Support points per task; several are evaluated one after the other.
    steps
        Numbers of gradient steps to measure after.
    tasks
        Tasks to average over.
    query_shots
        Points per task that the error is measured on.
    inner_lr
        Rate of the gradient steps; the training's, learned or not, if left out.
    seed
        Seed of the tasks.
    backend
        What computes the gradient steps.
    device
        Torch device.
    threads
        CPU threads; torch's own choice if left out.
    json_path
        Write the numbers to this file too; "-" is the standard output.
    plot_dir
        Draw adaptation.png and fits.png in this folder.
    """
    plots = _plots() if plot_dir is not None else None
    trained = load_trained(checkpoint, device)
    rate = trained.inner_lr if inner_lr is None else inner_lr

    def run(shots: int, steps: Sequence[int]) -> Evaluation:
        return evaluate_sinusoid(
            trained.model,
            rate,
            shots=shots,
            steps=steps,
            tasks=tasks,
            query_shots=query_shots,
            seed=seed,
            backend=backend,
        )

    with cpu_threads(threads):
        evaluations = [run(count, steps) for count in shots]
        Console(stderr=json_path == "-").print(error_table(evaluations))
        if json_path is not None:
            document = {
                "checkpoint": str(checkpoint),
                "iteration": trained.iteration,
                "config": trained.config.to_dict(),
                "paper": {"shots": PAPER_SHOTS, "maml": PAPER_MAML, "pretrained": PAPER_PRETRAINED},
                "evaluations": [evaluation.to_dict() for evaluation in evaluations],
            }
            _write_json(document, json_path)
        if plots is not None and plot_dir is not None:
            every_step = range(max(*steps, 1) + 1)
            curves = plots.adaptation_figure([run(count, every_step) for count in shots])
            plots.save_png(curves, plot_dir / "adaptation.png")
            fits = fit_sinusoid(trained.model, rate, shots=shots[0], seed=seed, backend=backend)
            plots.save_png(plots.fits_figure(fits), plot_dir / "fits.png")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 after an error, told in one line."""
    try:
        result = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except KeyboardInterrupt:
        print("maml-fast: interrupted; the last checkpoint stands", file=sys.stderr)
        return 130
    except (CycloptsError, ValueError, FloatingPointError, OSError) as error:
        print("maml-fast:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return result or 0


def _option_sources(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what no flag sets: from --config, then with --resume from the run's checkpoint."""
    by_name = {argument.name: argument for argument in arguments}
    for argument in arguments:
        _refuse_fractions(argument)
    if "--resume" not in by_name:
        return

    def fill(values: dict[str, Any], source: str) -> None:
        TrainConfig.from_dict(values, source)  # strict about keys and types, as Dict is not
        values = {name: value for name, value in values.items() if value is not None}
        Dict(values, source=source, use_commands_as_keys=False)(app, commands, arguments)

    if by_name["--config"].tokens:
        path = Path(by_name["--config"].tokens[0].value)
        fill(_read_toml(path), source=str(path))
    if by_name["--resume"].tokens:
        tokens = by_name["--output"].tokens
        output = tokens[0].value if tokens else str(PAPER_CONFIG.output)
        path = Path(output) / CHECKPOINT
        fill(load_checkpoint(path).config | {"output": output}, source=str(path))


app.config = _option_sources


def _refuse_fractions(argument: Argument) -> None:
    """Cyclopts rounds --tasks 2.5 to 2; an error is wanted."""
    if argument.hint in (int, int | None, tuple[int, ...]):
        for token in argument.tokens:
            if "." in token.value:
                raise ConfigError(f"{token.keyword} is {token.value}; wanted is a whole number")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: no valid TOML: {error}") from None


def _plots() -> ModuleType:
    """The module that draws; imported late, because matplotlib takes its time."""
    try:
        from maml_fast import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError('matplotlib is missing; try: pip install "maml_fast[train]"') from None
    return plots


def _write_json(document: dict[str, Any], path: str) -> None:
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), text.encode())
