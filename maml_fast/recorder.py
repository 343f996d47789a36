"""What a measured meta-step leaves: seconds by layer and pass, told by the backends as they run.

A recorder hangs in a plan (`Plan.recorder`) while `maml_fast.profile` measures; elsewhere there is
none, and backends ask for it once a meta-step. Times are laps of one clock: each ends where the
next begins, so that none is lost between two. On a GPU a lap is the time between two CUDA events.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

PASSES = INNER, QUERY, ADJOINT = "inner steps", "query", "adjoint"
OUTSIDE = ""  # of none of the passes

# What is measured beside layers
LOSS, ROWS, START = "loss", "rows in and out", "start of a call"
SUMS, WAITING = "sums over tasks", "waiting for threads"
BETWEEN, ALL_LAYERS = "between layers", "all layers"

Key = tuple[int, ...] | str  # numbers of layers, of the body first; or what is beside them
S = TypeVar("S")

# The rules of stages and losses that are timed, where an object has them
RULES = (
    *("forward", "backward", "tangent", "tangent_backward", "descend", "add_query", "turn"),
    *("pull_back", "add_rate_gradients", "gradient_sums", "gradients", "value", "cotangent"),
)


class Recorder:
    """The laps of one meta-step, or of several, whose times add up.

    seconds: {(key, pass): s}, once `finish` was called.
    own_bytes, value_bytes: {key: bytes} of one thread's memory, of backend "cpu"
    elsewhere: layers of which the layers beside them do some work, of backend "cpu"
    threads, arena_bytes, sum_bytes: the engine's, of backend "cpu"; 0 elsewhere
    other_arena_bytes: of its other programs in the same call, together
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[tuple[Key, str], float] = defaultdict(float)
        self.own_bytes: dict[Key, int] = {}
        self.value_bytes: dict[Key, int] = {}
        self.elsewhere: set[Key] = set()
        self.threads = self.arena_bytes = self.sum_bytes = self.other_arena_bytes = 0
        self.current: Key | None = None  # whose rule is running
        self.phase, self.depth = OUTSIDE, 0
        self.thread = threading.get_ident()
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[Any, tuple[Key, str] | None]] = []
        self._last = 0.0
        self._calls: list[tuple[Any, int, Sequence[int], Any]] = []

    def begin(self) -> None:
        """What comes next is measured from here on."""
        if self._on_gpu:
            self._events.append((_event(), None))
        else:
            self._last = time.perf_counter()

    def lap(self, key: Key) -> None:
        """What came since the last lap was of `key`, in this pass."""
        if self._on_gpu:
            self._events.append((_event(), (key, self.phase)))
            return
        now = time.perf_counter()
        self.seconds[key, self.phase] += now - self._last
        self._last = now

    def add_engine(self, prepared: Any, tasks: int, layers: Sequence[int], found: Any) -> None:
        """What `prepared.measure` of `_cpu` found, to be read later. layers: the plan's numbers of
        those that the engine has."""
        self._calls.append((prepared, tasks, layers, found))

    def finish(self) -> None:
        """Add up what was found; the events of a GPU must have happened."""
        arenas: dict[int, int] = {}
        for prepared, tasks, layers, found in self._calls:
            sizes = prepared.sizes(tasks)
            arenas[id(prepared)] = sizes["arena_bytes"]
            self._read(layers, prepared.parts(), found, sizes)
        self.other_arena_bytes = sum(arenas.values()) - self.arena_bytes
        self._calls.clear()
        before = None
        for event, cell in self._events:
            if cell is not None and before is not None:
                self.seconds[cell] += before.elapsed_time(event) / 1e3
            before = event
        self._events.clear()

    def _read(
        self,
        layers: Sequence[int],
        parts: Sequence[Mapping[str, Any]],
        found: Mapping[str, Any],
        sizes: Mapping[str, Any],
    ) -> None:
        """Threads share the wall clock, so each thread's second counts 1 / threads."""
        keys = engine_keys(layers, parts)
        phases, threads = (*PASSES, OUTSIDE), max(found["threads"], 1)
        spent = 0.0
        for key, cells in zip(keys, found["cells"], strict=True):
            for phase, seconds in zip(phases, cells, strict=True):
                if key is not None and seconds:
                    self.seconds[key, phase] += seconds / threads
                    spent += seconds / threads
        self.seconds[WAITING, OUTSIDE] += max(found["tiles"] - spent, 0.0)
        self.seconds[SUMS, OUTSIDE] += found["sums"]
        sum_bytes = sizes["chunks"] * sizes["partial_bytes"]
        if sizes["arena_bytes"] < self.arena_bytes:
            return  # a shorter inner loop of the same call
        self.threads, self.arena_bytes, self.sum_bytes = threads, sizes["arena_bytes"], sum_bytes
        self.own_bytes, self.value_bytes = {}, {}
        for key, part in zip(keys, parts, strict=True):
            name = "workspace" if key is None else key
            if part["elsewhere"]:
                self.elsewhere.add(name)
            self.own_bytes[name] = self.own_bytes.get(name, 0) + part["own"]
            self.value_bytes[name] = self.value_bytes.get(name, 0) + part["values"]


def engine_keys(layers: Sequence[int], parts: Sequence[Mapping[str, Any]]) -> list[Key | None]:
    """What each of `_cpu.Prepared.parts` is of; None of the shared workspace."""
    beside: list[Key | None] = [ROWS, LOSS, START, None]  # csrc/profile.h, Beside
    stages = parts[len(beside) :]
    return beside + [
        tuple(layers[part["first"] : part["first"] + part["layers"]]) for part in stages
    ]


@contextmanager
def during(recorder: Recorder | None, phase: str, rest: Key = BETWEEN) -> Iterator[None]:
    """Within, laps are of this pass; what is left behind the last one is of `rest`."""
    if recorder is None or recorder.thread != threading.get_ident():
        yield
        return
    if not recorder.depth:
        recorder.begin()
    before, recorder.phase = recorder.phase, phase
    recorder.depth += 1
    try:
        yield
        recorder.lap(rest)
    finally:
        recorder.phase = before
        recorder.depth -= 1


def watched(stage: S, key: Key, recorder: Recorder | None) -> S:
    """The stage, or its like whose rules are timed as `key`."""
    if recorder is None or recorder.thread != threading.get_ident():
        return stage
    found = copy.copy(stage)  # an operation is the plan's own, and other calls use it
    for name in RULES:
        if (rule := getattr(found, name, None)) is not None:
            vars(found)[name] = _timed(rule, key, recorder)
    return found


def _timed(rule: Callable[..., Any], key: Key, recorder: Recorder) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        before, recorder.current = recorder.current, key
        result = rule(*arguments)
        recorder.lap(key)
        recorder.current = before
        return result

    return run


def measured(stepper: S, recorder: Recorder | None, rest: Key) -> S:
    """The stepper, or its like whose passes are timed; what is of no layer is of `rest`."""
    return stepper if recorder is None else cast(S, _MeasuredStepper(stepper, recorder, rest))


class _MeasuredStepper:
    """A `problem.Stepper`."""

    def __init__(self, stepper: Any, recorder: Recorder, rest: Key) -> None:
        self._stepper, self._recorder, self._rest = stepper, recorder, rest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stepper, name)

    def inner_step(self, *arguments: Any) -> Any:
        with during(self._recorder, INNER, self._rest):
            return self._stepper.inner_step(*arguments)

    def query(self, *arguments: Any) -> Any:
        with during(self._recorder, QUERY, self._rest):
            return self._stepper.query(*arguments)

    def pull_back(self, *arguments: Any) -> Any:
        with during(self._recorder, ADJOINT, self._rest):
            return self._stepper.pull_back(*arguments)

    def solve(self, *arguments: Any) -> Any:
        with during(self._recorder, ADJOINT, self._rest):
            return self._stepper.solve(*arguments)

    def finish(self, *arguments: Any) -> None:
        with during(self._recorder, ADJOINT, self._rest):
            self._stepper.finish(*arguments)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
