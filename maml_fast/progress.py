"""What surrounds a training loop: loss history, progress bar, stop signals, thread count."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maml_fast.checkpoint import write_atomically


class HistoryLine(NamedTuple):
    """A line of a history, as it is written and as it is read."""

    text: str
    figures: dict[str, Any]


class History:
    """The figures of a run as JSON lines: {"iteration": 100, "loss": 3.2}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def __enter__(self) -> History:
        # Unbuffered: what could not be written is told by the write, and not again by the closing.
        self._file = FileIO(self.path, "a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, iteration: int, **figures: float) -> None:
        """Add a line. Raises an OSError naming the file where the disk is full."""
        if self._file is None:
            raise RuntimeError("History.append() is called outside of its with block")
        rest = (json.dumps({"iteration": iteration, **figures}) + "\n").encode()
        with naming(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Have every line on disk."""
        if self._file is not None:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def keep_until(self, iteration: int) -> None:
        """Drop the lines after `iteration`, which a resumed run writes again, and a torn last one.

        Raises:
            ValueError: a line in between is not of this format.
        """
        found = read_history(self.path)
        kept = [f"{line.text}\n" for line in found if line.figures["iteration"] <= iteration]
        write_atomically(self.path, "".join(kept).encode())


class NoHistory(History):
    """That of a rank which does not write."""

    def __enter__(self) -> History:
        return self

    def append(self, iteration: int, **figures: float) -> None:
        """Nothing."""

    def keep_until(self, iteration: int) -> None:
        """Nothing."""


def read_history(path: Path) -> list[HistoryLine]:
    """The lines of a history, but for a torn last one; none where the file is missing.

    Raises:
        ValueError: a line in between is not of this format.
    """
    found = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            figures = json.loads(line)
            numbers = all(type(value) in (int, float) for value in figures.values())
            if not numbers or type(figures["iteration"]) is not int:
                raise TypeError
            found.append(HistoryLine(line.decode(), figures))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is no loss record") from None
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError names `path`: a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class ProgressLine:
    """A progress bar with loss, speed and a note on stderr, drawn twice a second by the loop.

    Rich's own refresh thread would take the interpreter lock from a loop of short iterations.
    Where stderr is no terminal it is one line at the end, of text alone; not `shown` it is none.
    """

    INTERVAL = 0.5  # seconds

    def __init__(self, done: int, total: int, shown: bool = True) -> None:
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tasks/s{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            speed_estimate_period=10.0,
            disable=not shown,
        )
        self._task = self._bar.add_task(
            "", total=total, completed=done, loss="-", speed="-", note=""
        )
        self._shown, self._shown_at = done, 0.0
        self._notes: dict[str, str] = {}

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        self._shown_at = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def due(self) -> bool:
        """Whether the bar is old enough to draw again."""
        return time.perf_counter() - self._shown_at >= self.INTERVAL

    def note(self, what: str, text: str) -> None:
        """Show "what text" after the speed from the next drawing on, beside notes of others."""
        self._notes[what] = f"  {what} {text}"
        self._bar.update(self._task, note="".join(self._notes.values()))

    def show(self, iteration: int, loss: float | None, tasks: int) -> None:
        """Draw the state after `iteration`; `tasks` is the number of tasks per iteration."""
        now = time.perf_counter()
        if iteration > self._shown:  # else the last drawing's speed stands
            speed = (iteration - self._shown) * tasks / max(now - self._shown_at, 1e-9)
            self._bar.update(self._task, speed=f"{speed:,.0f}")
        text = "-" if loss is None else f"{loss:.4f}"
        self._bar.update(self._task, completed=iteration, loss=text, refresh=True)
        self._shown, self._shown_at = iteration, now


class StopRequest:
    """Set by a signal; `signal` is its number, 0 before."""

    signal = 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within, SIGINT and SIGTERM set the yielded request; a second one acts as it did before.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    for number in previous:
        signal.signal(number, stop)
    try:
        yield request
    finally:
        restore()


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within, torch uses `count` CPU threads; None leaves it as it is."""
    if count is not None and count < 1:
        raise ValueError(f"threads is {count}; wanted is a whole number of at least 1")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
