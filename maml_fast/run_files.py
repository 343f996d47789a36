"""The folder of a run: its files, the lock that keeps it to one process, and what killed ones left.

The lock is the operating system's (`flock`, or what Windows has): it ends with the process that
holds it, however that ends, so the file `run.lock` may stay and means nothing by itself.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from maml_fast.checkpoint import CheckpointError, DamagedError, keep_as, load_checkpoint
from maml_fast.config import ConfigError
from maml_fast.ranks import LAUNCH

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
BEST, BEST_PREVIOUS = "best.safetensors", "best.previous.safetensors"
HISTORY, STARTS, EVENTS, LOCK = "history.jsonl", "starts.jsonl", "tensorboard", "run.lock"

# Of a file system that cannot lock: it says so by one of these.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderInUseError(ConfigError):
    """Another process trains in the output folder."""


class RunFiles:
    """Where the files of the run in `folder` are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.previous = folder / CHECKPOINT, folder / PREVIOUS
        self.best, self.best_previous = folder / BEST, folder / BEST_PREVIOUS
        self.history, self.starts, self.events = folder / HISTORY, folder / STARTS, folder / EVENTS

    @contextmanager
    def locked(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Within, the folder, which is made, is this process's alone, and swept.

        Raises:
            FolderInUseError: another process, or another thread, holds it.
            OSError: it cannot be made or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK
        # A soft lock is a file that a killed process would leave behind.
        lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise FolderInUseError(
                f"output: {self.folder} is in use by {_holder(path)}, which trains in it; wait for "
                f"its end, or take another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from None
            announce(f"{self.folder} cannot be locked: see to it that one process trains in it")
        try:
            with suppress(OSError):  # who holds it is told where that can be
                path.write_text(f"{os.getpid()}\n", encoding="utf-8")
            self.sweep()
            yield
        finally:
            lock.release()

    def sweep(self) -> None:
        """Remove the temporary files of writers that were killed; call it with the lock held."""
        ours = "|".join(map(re.escape, _WRITTEN))
        for path in self.folder.iterdir():
            if re.fullmatch(rf"\.({ours})\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)

    def refuse_existing(self) -> None:
        """Raise a ConfigError where there is a run already."""
        for path in (self.checkpoint, self.previous, self.best, self.history):
            if path.exists():
                there = self.checkpoint.exists() or self.previous.exists()
                resume = "--resume goes on with that run, " if there else ""
                raise ConfigError(f"output: {path} exists already; {resume}--overwrite deletes it")

    def clear(self) -> None:
        """Delete a run: the newest checkpoint before what would be missed if it were resumed."""
        files = [self.previous, self.checkpoint, self.best_previous, self.best]
        events = sorted(self.events.glob("events.out.tfevents.*"))
        for path in [*files, self.history, self.starts, self.folder / LAUNCH, *events]:
            path.unlink(missing_ok=True)

    def best_of(self, wanted: int | None) -> Path:
        """Where the best checkpoint of iteration `wanted` would be found: one of two."""
        if wanted is None or _iteration(self.best) == wanted:
            return self.best
        return self.best_previous if _iteration(self.best_previous) == wanted else self.best

    def put_back_best(self, wanted: int | None) -> None:
        """Make the best checkpoint that of iteration `wanted`, or of none: what an earlier
        checkpoint tells of. Where it is not there, things stay as they are."""
        if wanted is None:
            self.best.unlink(missing_ok=True)
        elif (found := self.best_of(wanted)) != self.best:
            keep_as(found, self.best)

    @contextmanager
    def telling_of_previous(self) -> Iterator[None]:
        """Within, the error of a damaged or missing checkpoint says whether the one before it is
        sound, and how to go on from that."""
        try:
            yield
        except DamagedError as error:
            before = _iteration(self.previous)
            if before is None or str(self.previous) in str(error):
                raise
            raise DamagedError(
                f"{error}; the one before it, {self.previous.name} of iteration {before}, is "
                f"sound: go on from that with --resume --previous"
            ) from None


_WRITTEN = (CHECKPOINT, PREVIOUS, BEST, BEST_PREVIOUS, HISTORY, STARTS, LAUNCH)


def _iteration(path: Path) -> int | None:
    """Of the checkpoint at `path`; None where that is missing or damaged."""
    try:
        return load_checkpoint(path).iteration
    except CheckpointError:
        return None


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        text = ""
    return f"process {text}" if text.isdecimal() else "another process"
