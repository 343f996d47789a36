"""Runs that are killed by SIGKILL again and again, each time in a process of its own, and go on.

As a program, `python -m tests.killed_runs KIND FOLDER`: it imports everything once and forks, so
that a kill costs milliseconds. It prints a line of JSON about its kills; whatever differs from a
run never stopped is an AssertionError. Threads and fork do not go together: it has one thread.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from maml_fast import progress
from maml_fast.checkpoint import load_checkpoint
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.run_files import RunFiles
from maml_fast.run_images import ImageRun
from maml_fast.train import train
from tests.image_runs import folder_run

SINUSOID = SinusoidConfig(
    iterations=3000,
    tasks=2,
    shots=3,
    query_shots=3,
    hidden=(4, 4),
    learn_inner_lr=True,
    backend="torch",
    threads=1,
    log_every=3,
    checkpoint_every=10,
    output=Path("run"),
)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts what a process does to its files, and kills it at the n-th of that: before it, behind
    it, or, where it writes, in its middle."""

    ACTS = ("fsync", "replace", "link", "unlink")

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        for name in self.ACTS:
            setattr(os, name, self.counted(getattr(os, name)))
        io_open, write = io.open, io.FileIO.write
        killer = self

        class TornFile(io.FileIO):
            """Half of what was to be written, where the process dies in the middle of it."""

            def write(self, data):
                killer.moment(lambda: write(self, data[: len(data) // 2]))
                return write(self, data)

        def opened(file, mode="r", *arguments, **options):
            return (
                TornFile(file, mode) if mode == "wb" else io_open(file, mode, *arguments, **options)
            )

        io.open = opened  # what Path.open calls
        progress.FileIO = TornFile

    def moment(self, last=lambda: None):
        self.seen += 1
        if self.seen == self.at:
            last()
            die()

    def counted(self, act):
        def act_or_die(*arguments, **options):
            self.moment()
            done = act(*arguments, **options)
            self.moment()
            return done

        return act_or_die


def in_child(work) -> int:
    """Run `work` in a fork; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open("log.txt", "a") as log, contextlib.redirect_stderr(log):
            work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    """Wait for its end: False where it was killed. One that failed is an error."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, "the run failed: see above"
    return True


def go_on(config) -> None:
    """What a user does: resume if there is a checkpoint, else begin again."""
    train(config, resume=RunFiles(config.output).checkpoint.exists())


def check_between(config) -> str:
    """What must hold whenever a run is dead; what there is of it."""
    files = RunFiles(config.output)
    if not files.checkpoint.exists():
        assert not files.history.exists()
        return "nothing"
    found = load_checkpoint(files.checkpoint)
    if files.previous.exists():
        assert load_checkpoint(files.previous).iteration <= found.iteration
    return "begun" if found.iteration else "at 0"


def contents(config) -> dict[str, bytes]:
    files = RunFiles(config.output)
    kept = [files.checkpoint, files.history, *([files.best] if files.best.exists() else [])]
    left = [path.name for path in files.folder.iterdir() if path.name.endswith(".tmp")]
    assert not left, f"left over: {left}"
    return {path.name: path.read_bytes() for path in kept}


@contextlib.contextmanager
def inside(folder: Path):
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def whole(config, folder: Path) -> tuple[dict[str, bytes], int]:
    """A run never stopped: its files, and the number of moments at which it could be killed."""
    with inside(folder):

        def work():
            killer = Killer(at=0)
            go_on(config)
            Path("moments").write_text(str(killer.seen))

        assert ended(in_child(work))
        return contents(config), int(Path("moments").read_text())


def killed_in_turn(config, folder: Path, kills: int, reach: int, patience: float) -> Counter:
    """One run killed so many times, at a random moment of its first `reach` or within `patience`
    seconds, then left to its end."""
    wanted, _ = whole(config, folder / "whole")
    draw, found = random.Random(5), Counter()
    with inside(folder / "parts"):
        while found["killed"] < kills:
            if found["killed"] % 2:
                at = draw.randint(1, reach)

                def aimed(at=at):
                    Killer(at)
                    go_on(config)

                alive = ended(in_child(aimed))
            else:
                pid = in_child(lambda: go_on(config))
                time.sleep(draw.uniform(0, patience))
                os.kill(pid, signal.SIGKILL)
                alive = ended(pid)
            assert not alive, "the run came to its end: it must be longer"
            found["killed"] += 1
            found[check_between(config)] += 1
        assert ended(in_child(lambda: go_on(config)))
        assert contents(config) == wanted
    return found


def killed_everywhere(config, folder: Path, stride: int = 1) -> Counter:
    """A run of its own for each moment: killed there, killed again early in the next start, then
    left to its end."""
    wanted, moments = whole(config, folder / "whole")
    found = Counter()
    for at in range(1, moments + 1, stride):
        with inside(folder / str(at)):

            def dies(at=at):
                Killer(at)
                go_on(config)

            assert not ended(in_child(dies)), at
            found["killed"] += 1
            found[check_between(config)] += 1

            def dies_again(at=at):
                Killer(1 + at % 12)
                go_on(config)

            found["killed"] += not ended(in_child(dies_again))
            check_between(config)
            assert ended(in_child(lambda: go_on(config)))
            assert contents(config) == wanted, at
    return found


def improving(run, validate=ImageRun.validate):
    """Validations that are better each time, but for every third."""
    before = run._best_iteration, run._best_accuracy
    found = validate(run)
    if found is not None:
        better = run.iteration / 100, run.iteration
        run._best_accuracy, run._best_iteration = better if run.iteration % 3 else before[::-1]
    return found


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder = folder.resolve()
    if kind == "sinusoid":
        # A start has 15 moments or so before its first iteration.
        found = killed_in_turn(SINUSOID, folder, kills=50, reach=45, patience=0.06)
    elif kind == "everywhere":
        short = dataclasses.replace(SINUSOID, iterations=7, checkpoint_every=4)
        found = killed_everywhere(short, folder)
    else:
        ImageRun.validate = improving
        (folder.parent / "data").mkdir()
        config = folder_run(folder.parent / "data")
        config = dataclasses.replace(
            config, iterations=4, validate_every=1, log_every=2, output=Path("run")
        )
        found = killed_everywhere(config, folder, stride=5)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
