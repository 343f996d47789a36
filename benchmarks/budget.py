"""A run that must end in time: what it leaves out, and how it stops what takes too long."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from benchmarks.cases import named
from benchmarks.implementation import Implementation
from benchmarks.registry import implementation

RESERVE_S = 15.0  # for imports before the budget begins, and for tables, picture and files


class OutOfTime(BaseException):
    """The time is over. No Exception, as compilers wrap those in their own."""


class Budget:
    """The time that a run may take, and what it has learnt of what takes how long.

    What an implementation needs before it can be timed is mostly compiling, and grows with the
    passes that a case's inner steps unroll to; the slowest seen so far tells the next.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self._clock = clock
        seconds = math.inf if minutes is None else 60 * minutes - RESERVE_S
        self._end = clock() + seconds
        self._slowest: dict[str, float] = {}  # seconds a pass, by implementation

    @property
    def left_s(self) -> float:
        return self._end - self._clock()

    def needs(self, measured: Implementation, inner_steps: int) -> float:
        """Seconds that preparing it and its first call may take."""
        a_pass = self._slowest.get(measured.name, measured.seconds_a_pass)
        return a_pass * (inner_steps + 1)

    def note(self, measured: Implementation, inner_steps: int, seconds: float) -> None:
        """It took so long to prepare it and call it once."""
        a_pass = seconds / (inner_steps + 1)
        self._slowest[measured.name] = max(a_pass, self._slowest.get(measured.name, 0.0))

    def refusal(self, measured: Implementation, inner_steps: int, rounds_s: float) -> str | None:
        """Why it is not begun with so much to spend on rounds, or None if there is time."""
        wanted = self.needs(measured, inner_steps) + rounds_s
        if wanted <= self.left_s:
            return None
        return (
            f"for time: it may take {wanted:.0f} s, and of the run's {self.minutes:g} minutes "
            f"{max(0.0, self.left_s):.0f} s are left"
        )

    @contextmanager
    def enforced(self, at_most_s: float = math.inf) -> Iterator[None]:
        """OutOfTime is raised in here when the time is over, or after so many seconds; only between
        Python's instructions.
        """
        limit_s = min(self.left_s, at_most_s)
        if (
            math.isinf(limit_s)
            or not hasattr(signal, "setitimer")
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if limit_s == at_most_s:
                raise OutOfTime(f"for time: not ready within {at_most_s:g} s")
            raise OutOfTime(f"for time: stopped when the run's {self.minutes:g} minutes were over")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, limit_s))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def in_order_of_need(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of case and implementation so that what matters most is measured before the end.

    The cases that a GPU must do well first; in these, as in the others after them, what takes
    seconds goes before what compiles for a minute.
    """
    return sorted(pairs, key=lambda pair: (not named(pair[0]).early, implementation(pair[1]).turn))
