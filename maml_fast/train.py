"""Meta-training: the loop, and what it needs to stop and go on exactly.

Files of a run, in `config.output`: `checkpoint.safetensors`, `checkpoint.previous.safetensors`, the
one before it, and `history.jsonl` with a line {"iteration": i, "loss": mean query loss of the last
`log_every` iterations} each `log_every`, with the rates that are learned, and with
"skipped_tasks": n, be it 0, where on_nonfinite leaves tasks out. A run that validates adds a line
{"iteration": i, "validation_accuracy": a, "validation_ci95": c, "validation_steps": s} for each
validation, and keeps the checkpoint of the best one as `best.safetensors`
(`best.previous.safetensors` is the best before it). Before that it writes the checkpoint too, so
that the two belong together whenever the run is killed. The first checkpoint is of iteration 0, and
written before the history begins: from then on a run that is killed can be resumed. `starts.jsonl`
tells of each start, `run.lock` keeps others out. Under torchrun there is `launch.json` too, by
which processes that it restarts know their run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from maml_fast.checkpoint import CheckpointError, DamagedError, keep_as, load_checkpoint
from maml_fast.config import ConfigError, TrainConfig
from maml_fast.event_files import EventFiles, check_tensorboard
from maml_fast.kinds import make_run
from maml_fast.progress import (
    History,
    NoHistory,
    ProgressLine,
    cpu_threads,
    read_history,
    stop_on_signals,
)
from maml_fast.ranks import Ranks, joined
from maml_fast.run import Run
from maml_fast.run_files import RunFiles
from maml_fast.starts import record_start


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
    skipped: int = 0  # tasks left out of the whole run, see TrainConfig.on_nonfinite


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    previous: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train from `config`, or with `resume` go on from the checkpoint in `config.output`; with
    `previous` too, from the one before it, as where the newest is damaged.

    A resumed run ends with the same bits, and the same history, as one never stopped. SIGINT and
    SIGTERM end the run after the current iteration, with a checkpoint. `announce` is called before
    the first iteration, with what the run trains on, where there is something to say.

    Processes started by torchrun share the tasks (see `maml_fast.ranks`): the same stream of tasks
    and, to rounding, the same run as one process; for so many processes, the same bits each time.
    The first alone writes and announces. Restarted by torchrun, they go on with their run from its
    last checkpoint, whatever the flags.

    Raises:
        ConfigError: the folder holds a run and neither flag is set; or both are; or a field
            differs that no resumed run may change; or the device cannot be used; or the package
            tensorboard is wanted and missing.
        FolderInUseError: another process trains in the folder (a ConfigError too).
        DataError: the data cannot be used.
        CheckpointError: the checkpoint to resume from cannot be used, or the best one is not that
            which it tells of.
        RankError: another process has ended, or does not answer.
        NonFiniteError, DivergedError: a loss, or the parameters, became NaN or infinite.
        OSError: the folder cannot be written.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted is at most one of them")
    if previous and not resume:
        raise ConfigError("previous is set without resume; wanted are both, or neither")
    if config.tensorboard:
        check_tensorboard()
    with joined(config.device) as ranks, ExitStack() as held:
        announce = announce if ranks.first else _nothing
        files = RunFiles(config.output)

        def lock() -> None:
            held.enter_context(files.locked(announce))

        run = _begin(config, files, ranks, lock, resume, overwrite, previous, announce)
        return _train(run, files, announce)


def _nothing(line: str) -> None:
    """What ranks announce that do not print."""


def _begin(
    config: TrainConfig,
    files: RunFiles,
    ranks: Ranks,
    lock: Callable[[], None],
    resume: bool,
    overwrite: bool,
    previous: bool,
    announce: Callable[[str], None],
) -> Run:
    """The run where it begins or goes on, its folder locked and made ready."""
    # A folder that is there is locked before data are loaded; one is not made for a run that fails.
    there = ranks.of_first(files.folder.is_dir)
    if there:
        ranks.of_first(lock)
    elif resume:
        raise DamagedError(f"{files.checkpoint}: no such checkpoint")
    again = ranks.of_first(lambda: ranks.began(config.output))
    if again and not resume:
        resume = ranks.of_first(files.checkpoint.is_file)
    elif not (resume or overwrite):
        ranks.of_first(files.refuse_existing)
    run = make_run(config, ranks)
    if not there:
        ranks.of_first(lock)
        if not overwrite:  # another may have been as quick
            ranks.of_first(files.refuse_existing)
    if resume:
        _restore(run, files, previous, announce)
    else:
        ranks.of_first(files.clear)
    ranks.check_same("configuration and data", run.described())
    if ranks.first:
        ranks.mark(config.output)
    if not resume:
        run.save(files.checkpoint)
    if again:
        announce(f"restarted by torchrun; going on after iteration {run.iteration}")
    return run


def _restore(run: Run, files: RunFiles, previous: bool, announce: Callable[[str], None]) -> None:
    """Put the run, and the files in its folder, where the checkpoint is."""
    ranks = run.ranks
    with files.telling_of_previous():
        run.restore(files.previous if previous else files.checkpoint)
    if ranks.first:
        read_history(files.history)  # what is wrong with it is told before files are moved
    if previous:
        best = run.best()
        wanted = None if best is None else best[0]
        if wanted is not None:
            ranks.of_first(lambda: _has_its_best(run, files.best_of(wanted)))
        ranks.of_first(lambda: files.put_back_best(wanted))
        ranks.of_first(lambda: keep_as(files.previous, files.checkpoint))
    if not ranks.of_first(lambda: _has_its_best(run, files.best)):
        run.save(files.best, files.best_previous)
        announce(f"{files.best} was not there yet, and is written from {files.checkpoint}")
    if ranks.first:
        History(files.history).keep_until(run.iteration)


def _train(run: Run, files: RunFiles, announce: Callable[[str], None]) -> TrainResult:
    """The loop, from where the run stands."""
    config, ranks = run.config, run.ranks
    saved_at = run.iteration
    if line := run.describe():
        announce(line)

    def save() -> None:
        nonlocal saved_at
        # Never behind the checkpoint, so that a resumed run's history has no gap.
        history.sync()
        events.sync()
        # Written once more where the run stands still, it is not its own predecessor.
        run.save(files.checkpoint, files.previous if run.iteration != saved_at else None)
        saved_at = run.iteration

    def log(**figures: float) -> None:
        history.append(run.iteration, **figures)
        events.append(run.iteration, **figures)

    with (
        stop_on_signals() as stop,
        cpu_threads(config.threads),
        (History if ranks.first else NoHistory)(files.history) as history,
        EventFiles(files.events, run.iteration, config.tensorboard and ranks.first) as events,
        ProgressLine(
            run.iteration, config.iterations, shown=ranks.first and not config.quiet
        ) as progress,
    ):
        if ranks.first:
            record_start(files.starts, run.iteration, config.device)
        stopped = ranks.watch(stop)
        while run.iteration < config.iterations and not stopped():
            run.step()
            if run.iteration % config.log_every == 0:
                log(**run.close_window(), **run.learned_rates())
            validated = run.validate()
            if validated is not None:
                log(**validated)
                progress.note("validation", f"{validated['validation_accuracy']:.1%}")
                if run.is_best():
                    save()
                    run.save(files.best, files.best_previous)
            if run.iteration % config.checkpoint_every == 0:
                save()
            if progress.due():
                if run.skipped:
                    progress.note("skipped", f"{run.skipped:,}")
                progress.show(run.iteration, run.loss(), config.tasks)
        save()
        progress.show(run.iteration, run.loss(), config.tasks)
        ranks.wait()  # what the first has written is there for all
    stopped_by = stopped() if run.iteration < config.iterations else 0
    found = run.best()
    best = Best(files.best, *found) if found else None
    return TrainResult(files.checkpoint, run.iteration, run.loss(), stopped_by, best, run.skipped)


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
