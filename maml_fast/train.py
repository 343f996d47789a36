"""Meta-training: the loop, and what it needs to stop and go on exactly.

Files of a run, in `config.output`: `checkpoint.safetensors`, and `history.jsonl` with a line
{"iteration": i, "loss": mean query loss of the last `log_every` iterations} each `log_every`.
A run that validates adds a line {"iteration": i, "validation_accuracy": a, "validation_ci95": c,
"validation_steps": s} for each validation, and keeps the checkpoint of the best one as
`best.safetensors`. Before that it writes the checkpoint too, so that the two belong together
whenever the run is killed. Under torchrun there is `launch.json` too, by which processes that it
restarts know their run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maml_fast.checkpoint import CheckpointError, load_checkpoint
from maml_fast.config import ConfigError, TrainConfig
from maml_fast.kinds import make_run
from maml_fast.progress import History, NoHistory, ProgressLine, cpu_threads, stop_on_signals
from maml_fast.ranks import LAUNCH, Ranks, joined
from maml_fast.run import Run

CHECKPOINT, BEST, HISTORY = "checkpoint.safetensors", "best.safetensors", "history.jsonl"


@dataclass(frozen=True)
class Best:
    """The best validation of a run."""

    checkpoint: Path
    iteration: int
    accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    checkpoint: Path
    iteration: int
    loss: float | None  # mean query loss of the latest iterations; None if there were none
    stopped_by: int  # number of the signal that ended the run early, or 0
    best: Best | None = None  # of a run that has validated


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train from `config`, or with `resume` go on from the checkpoint in `config.output`.

    A resumed run ends with the same bits, and the same history, as one never stopped. SIGINT and
    SIGTERM end the run after the current iteration, with a checkpoint. `announce` is called before
    the first iteration, with what the run trains on, where there is something to say.

    Processes started by torchrun share the tasks (see `maml_fast.ranks`): the same stream of tasks
    and, to rounding, the same run as one process; for so many processes, the same bits each time.
    The first alone writes and announces. Restarted by torchrun, they go on with their run from its
    last checkpoint, whatever the flags.

    Raises:
        ConfigError: the folder holds a run and neither flag is set; or both are; or a field
            differs that no resumed run may change; or the device cannot be used.
        DataError: the data cannot be used.
        CheckpointError: the checkpoint to resume from cannot be used, or the best one is not that
            which it tells of.
        RankError: another process has ended, or does not answer.
        NonFiniteError, DivergedError: a loss, or the parameters, became NaN or infinite.
        OSError: the folder cannot be written.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted is at most one of them")
    with joined(config.device) as ranks:
        return _train(config, ranks, resume, overwrite, announce if ranks.first else _nothing)


def _nothing(line: str) -> None:
    """What ranks announce that do not print."""


def _train(
    config: TrainConfig,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    announce: Callable[[str], None],
) -> TrainResult:
    checkpoint, best = config.output / CHECKPOINT, config.output / BEST
    history = (History if ranks.first else NoHistory)(config.output / HISTORY)
    again = ranks.of_first(lambda: ranks.began(config.output))
    if again and not resume:
        resume = ranks.of_first(checkpoint.is_file)
    elif not (resume or overwrite):
        ranks.of_first(lambda: _refuse_existing(checkpoint, best, history.path))
    run = make_run(config, ranks)
    if resume:
        run.restore(checkpoint)
        if not ranks.of_first(lambda: _has_its_best(run, best)):
            run.save(best)
            announce(f"{best} was not there yet, and is written from {checkpoint}")
        history.keep_until(run.iteration)
    else:
        ranks.of_first(lambda: _clear(checkpoint, best, history.path, config.output / LAUNCH))
    ranks.check_same("configuration and data", run.described())
    if ranks.first:
        ranks.mark(config.output)
    if again:
        announce(f"restarted by torchrun; going on after iteration {run.iteration}")
    if line := run.describe():
        announce(line)

    def save() -> None:
        history.sync()  # never behind the checkpoint, so that a resumed run's history has no gap
        run.save(checkpoint)

    with (
        stop_on_signals() as stop,
        cpu_threads(config.threads),
        history,
        ProgressLine(run.iteration, config.iterations, shown=ranks.first) as progress,
    ):
        stopped = ranks.watch(stop)
        while run.iteration < config.iterations and not stopped():
            run.step()
            if run.iteration % config.log_every == 0:
                history.append(run.iteration, loss=run.close_window(), **run.learned_rates())
            validated = run.validate()
            if validated is not None:
                history.append(run.iteration, **validated)
                progress.note(f"validation {validated['validation_accuracy']:.1%}")
                if run.is_best():
                    save()
                    run.save(best)
            if run.iteration % config.checkpoint_every == 0:
                save()
            if progress.due():
                progress.show(run.iteration, run.loss(), config.tasks)
        save()
        progress.show(run.iteration, run.loss(), config.tasks)
        ranks.wait()  # what the first has written is there for all
    stopped_by = stopped() if run.iteration < config.iterations else 0
    found = run.best()
    return TrainResult(
        checkpoint, run.iteration, run.loss(), stopped_by, Best(best, *found) if found else None
    )


def _has_its_best(run: Run, path: Path) -> bool:
    """Whether the best checkpoint at `path` is the one that the restored run tells of; False where
    it can be written again, because the run stands just there: it was killed before it wrote it.

    Raises:
        CheckpointError: it is missing or another, as where one of the two files was put back.
    """
    best = run.best()
    wanted = None if best is None else best[0]
    found = load_checkpoint(path).iteration if path.exists() else None
    if found == wanted:
        return True
    if wanted == run.iteration:
        return False
    if found is None:
        raise CheckpointError(f"{path}: no such checkpoint, but the run to resume wrote it")
    known = "has none" if wanted is None else f"has the best at iteration {wanted}"
    raise CheckpointError(
        f"{path}: of iteration {found}, but the run to resume, at iteration {run.iteration}, "
        f"{known}; put back the two files of one time, or begin a new run in another output folder"
    )


def _refuse_existing(*files: Path) -> None:
    found = [path for path in files if path.exists()]
    if found:
        raise ConfigError(
            f"output: {found[0]} exists already; --resume goes on with that run, --overwrite "
            f"deletes it"
        )


def _clear(*files: Path) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    files[0].parent.mkdir(parents=True, exist_ok=True)
