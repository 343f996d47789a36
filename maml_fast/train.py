"""Meta-training on the sinusoid: the loop, and what it needs to stop and go on exactly.

Files of a run, in `config.output`: `checkpoint.safetensors`, and `history.jsonl` with a line
{"iteration": i, "loss": mean query loss of the last `log_every` iterations} each `log_every`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maml_fast.config import ConfigError, TrainConfig
from maml_fast.progress import History, ProgressLine, cpu_threads, stop_on_signals
from maml_fast.run import SinusoidRun

CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    checkpoint: Path
    iteration: int
    loss: float | None  # mean query loss of the latest iterations; None if there were none
    stopped_by: int  # number of the signal that ended the run early, or 0


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train from `config`, or with `resume` go on from the checkpoint in `config.output`.

    A resumed run ends with the same bits, and the same history, as one never stopped. SIGINT and
    SIGTERM end the run after the current iteration, with a checkpoint.

    Raises:
        ConfigError: the folder holds a run and neither flag is set; or both are; or a field
            differs that no resumed run may change; or the device cannot be used.
        CheckpointError: the checkpoint to resume from cannot be used.
        NonFiniteError, DivergedError: a loss, or the parameters, became NaN or infinite.
        OSError: the folder cannot be written.
    """
    checkpoint, history = config.output / CHECKPOINT, History(config.output / HISTORY)
    run = SinusoidRun(config)
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted is at most one of them")
    if resume:
        run.restore(checkpoint)
        history.keep_until(run.iteration)
    else:
        _clear(checkpoint, history.path, overwrite)

    def save() -> None:
        history.sync()  # never behind the checkpoint, so that a resumed run's history has no gap
        run.save(checkpoint)

    with (
        stop_on_signals() as stop,
        cpu_threads(config.threads),
        history,
        ProgressLine(run.iteration, config.iterations) as progress,
    ):
        while run.iteration < config.iterations and not stop.signal:
            run.step()
            if run.iteration % config.log_every == 0:
                history.append(run.iteration, run.close_window(), run.learned_rate())
            if run.iteration % config.checkpoint_every == 0:
                save()
            if progress.due():
                progress.show(run.iteration, run.loss(), config.tasks)
        save()
        progress.show(run.iteration, run.loss(), config.tasks)
    stopped_by = stop.signal if run.iteration < config.iterations else 0
    return TrainResult(checkpoint, run.iteration, run.loss(), stopped_by)


def _clear(checkpoint: Path, history: Path, overwrite: bool) -> None:
    found = [path for path in (checkpoint, history) if path.exists()]
    if found and not overwrite:
        raise ConfigError(
            f"output: {found[0]} exists already; --resume goes on with that run, --overwrite "
            f"deletes it"
        )
    for path in found:
        path.unlink()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
