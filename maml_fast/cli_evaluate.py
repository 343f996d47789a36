"""The command `maml-fast evaluate`, for each kind of run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from maml_fast.checkpoint import write_atomically
from maml_fast.config import ConfigError, check_rate
from maml_fast.config_images import ImageConfig
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.evaluate import (
    CAVIA_SHOTS,
    PAPER_SHOTS,
    Evaluation,
    evaluate_sinusoid,
    fit_sinusoid,
    paper_for,
)
from maml_fast.evaluate_images import ImageEvaluation, answer_task, evaluate_images
from maml_fast.image_data import chose_checkpoint, evaluation_images, query_shots_for
from maml_fast.kinds import TrainedModel, load_trained
from maml_fast.measure import DEFAULT_SEED
from maml_fast.progress import cpu_threads
from maml_fast.report import accuracy_table, error_table, paper_accuracy

Classes = Literal["held-out", "train", "all"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to measure, and where to write it.

    Attributes:
        shots: Support points per task, or images per class; several are evaluated one after the
            other. If left out, 5 for a sinusoid (10 with cavia), and the training's for images.
        steps: Numbers of gradient steps to measure after. If left out, 0, 1, 5 and 10 for a
            sinusoid; for images 0, 1, the training's and its evaluation's.
        tasks: Tasks to average over.
        query_shots: Points per task, or images per class, that are judged. If left out, 100 for a
            sinusoid; for images 15, or as many as each class has.
        inner_lr: Rate of the gradient steps; the training's, learned or not, if left out.
        seed: Seed of the tasks.
        backend: What computes the gradient steps.
        device: Torch device.
        threads: CPU threads; torch's own choice if left out.
        json_path: Write the numbers to this file too; "-" is the standard output.
        plot_dir: Draw adaptation.png in this folder, and fits.png or episode.png.
        data: Images to evaluate on, if not those of the training: archives or folders, as there.
        classes: Of the images, the classes that the model was not trained on, those that it was
            trained on, or all.
        rotations: Count each class four times, rotated by 0, 90, 180, 270 degrees.
    """

    shots: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    tasks: int = 600
    query_shots: int | None = None
    inner_lr: float | None = None
    seed: int = DEFAULT_SEED
    backend: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    json_path: Annotated[str | None, Parameter(name="--json", allow_leading_hyphen=True)] = None
    plot_dir: Path | None = None
    data: tuple[Path, ...] = ()
    classes: Classes = "held-out"
    rotations: bool = False


DEFAULTS = EvaluateOptions()


def evaluate(
    checkpoint: Path,
    /,
    options: Annotated[EvaluateOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Measure a trained model on new tasks, beside the numbers of the method's paper.

    For a sinusoid it is the mean squared error, for images the accuracy. The checkpoint says
    which.

    Parameters
    ----------
    checkpoint
        File that training wrote.
    """
    if options.plot_dir is not None:
        plots("plots")  # missing libraries are told before the work, not after
    trained = load_trained(checkpoint, options.device)
    with cpu_threads(options.threads):
        if isinstance(trained.config, ImageConfig):
            _evaluate_images(checkpoint, trained, trained.config, options)
        else:
            assert isinstance(trained.config, SinusoidConfig)
            _evaluate_sinusoid(checkpoint, trained, trained.config, options)
    return 0


def _evaluate_sinusoid(
    checkpoint: Path, trained: TrainedModel, config: SinusoidConfig, options: EvaluateOptions
) -> None:
    for name in ("data", "classes", "rotations"):
        if getattr(options, name) != getattr(DEFAULTS, name):
            raise ConfigError(f"{name} is for runs on images; {checkpoint} is a sinusoid's")
    rate = _rate(trained, options)
    wanted = options.shots or (PAPER_SHOTS if config.method == "maml" else CAVIA_SHOTS,)
    steps = options.steps or (0, 1, 5, 10)

    def run(shots: int, steps: Sequence[int]) -> Evaluation:
        return evaluate_sinusoid(
            trained.model,
            rate,
            shots=shots,
            steps=steps,
            tasks=options.tasks,
            query_shots=100 if options.query_shots is None else options.query_shots,
            seed=options.seed,
            backend=options.backend,
            inner_params=config.inner_params,
        )

    evaluations = [run(count, steps) for count in wanted]
    paper = paper_for(config, rate)
    document = {
        "paper": None if paper is None else paper.to_dict(),
        "evaluations": [found.to_dict() for found in evaluations],
    }
    _write(error_table(evaluations, paper), document, checkpoint, trained, options)
    if options.plot_dir is not None:
        draw = plots("plots")
        curves = draw.adaptation_figure([run(count, _every(steps)) for count in wanted], paper)
        draw.save_png(curves, options.plot_dir / "adaptation.png")
        fits = fit_sinusoid(
            trained.model,
            rate,
            shots=wanted[0],
            seed=options.seed,
            backend=options.backend,
            inner_params=config.inner_params,
        )
        draw.save_png(draw.fits_figure(fits), options.plot_dir / "fits.png")


def _evaluate_images(
    checkpoint: Path, trained: TrainedModel, config: ImageConfig, options: EvaluateOptions
) -> None:
    rate = _rate(trained, options)
    images = evaluation_images(config, trained.data, options.data, options.classes)
    wanted = options.shots or (config.shots,)
    steps = options.steps or tuple(sorted({0, 1, config.inner_steps, config.evaluation_steps}))

    def judged(shots: int) -> int:
        asked = options.query_shots
        return query_shots_for(images, shots) if asked is None else asked

    def run(shots: int, steps: Sequence[int]) -> ImageEvaluation:
        return evaluate_images(
            trained.model,
            rate,
            images,
            ways=config.ways,
            shots=shots,
            query_shots=judged(shots),
            steps=steps,
            tasks=options.tasks,
            rotations=options.rotations,
            seed=options.seed,
            backend=options.backend,
        )

    evaluations = [run(count, steps) for count in wanted]
    chose = chose_checkpoint(trained.data, images)
    document = {
        "classes": {
            "which": options.classes,
            "names": list(images.names),
            "chose_checkpoint": chose,
        },
        "paper": [paper_accuracy(config, options.classes, found) for found in evaluations],
        "evaluations": [found.to_dict() for found in evaluations],
    }
    table = accuracy_table(config, options.classes, evaluations, chose)
    _write(table, document, checkpoint, trained, options)
    if options.plot_dir is not None:
        draw = plots("plots_images")
        every = [run(count, _every(steps)) for count in wanted]
        curves = draw.accuracy_figure(config, options.classes, every)
        draw.save_png(curves, options.plot_dir / "adaptation.png")
        answers = answer_task(
            trained.model,
            rate,
            images,
            ways=config.ways,
            shots=wanted[0],
            query_shots=judged(wanted[0]),
            steps=max(steps),
            rotations=options.rotations,
            seed=options.seed,
            backend=options.backend,
        )
        figure = draw.answers_figure(answers, invert=images.invert)
        draw.save_png(figure, options.plot_dir / "episode.png")


def plots(name: str) -> ModuleType:
    """A module that draws; imported late, because matplotlib takes its time."""
    try:
        return importlib.import_module(f"maml_fast.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError('matplotlib is missing; try: pip install "maml_fast[train]"') from None


def _rate(trained: TrainedModel, options: EvaluateOptions) -> float:
    if options.inner_lr is None:
        return trained.inner_lr
    check_rate("inner_lr", options.inner_lr, positive=False)  # as in training
    return options.inner_lr


def _every(steps: Sequence[int]) -> range:
    return range(max(*steps, 1) + 1)


def _write(
    table: Table,
    document: dict[str, Any],
    checkpoint: Path,
    trained: TrainedModel,
    options: EvaluateOptions,
) -> None:
    """The table to the terminal and, where asked for, the numbers as JSON."""
    path = options.json_path
    Console(stderr=path == "-").print(table)
    if path is None:
        return
    about = {
        "checkpoint": str(checkpoint),
        "iteration": trained.iteration,
        "config": trained.config.to_dict(),
    }
    text = json.dumps(about | document, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), text.encode())
