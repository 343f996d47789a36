"""One implementation on one case: check it, take its peak memory, time it.

Called through pytest by `session`, with pytest-benchmark for the rounds; no part of the test suite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import memory
from benchmarks.cases import named
from benchmarks.check import broken, problem_and_reference
from benchmarks.implementation import Implementation
from benchmarks.problem import Problem
from benchmarks.registry import implementation
from benchmarks.results import Row, Status

LEAST_ROUNDS, MOST_ROUNDS = 3, 300
FEW_TASKS = 8  # what foretells the time of implementations that go task by task


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        device: "cpu" or "cuda".
        seconds: to spend on the rounds of one implementation on one case.
        limit_s: a call that takes longer is timed once; one foretold to take longer is skipped.
        peak: whether to take peak memory, in a process of its own.
    """

    device: str
    seconds: float = 2.0
    limit_s: float = 15.0
    peak: bool = True


class NotTimed(Exception):
    """Why an implementation is not timed on a case."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def test_meta_step(
    case: str,
    name: str,
    settings: Settings,
    references: dict[str, str],
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
) -> None:
    measured = implementation(name)
    row = Row.of(named(case), measured)
    record_property("row", row)
    try:
        run, rounds = _admit(row, measured, settings, references)
    except NotTimed as verdict:
        row.status, row.reason = verdict.status, verdict.reason
        if measured.ours and verdict.status in ("wrong", "failed"):
            pytest.fail(f"{verdict.status}: {verdict.reason}", pytrace=False)
        pytest.skip(f"{verdict.status}: {verdict.reason}")
    benchmark.pedantic(run, rounds=rounds, iterations=1)
    if ceiling := measured.ceiling(problem_and_reference(case, settings.device)[0]):
        row.ceiling_flops, row.ceiling_flops_per_second = ceiling
    row.status, row.reason = "timed", ""


def _admit(
    row: Row, measured: Implementation, settings: Settings, references: dict[str, str]
) -> tuple[Callable[[], Any], int]:
    """What to time, warm, and how many rounds of it."""
    problem, reference = problem_and_reference(row.case, settings.device)
    strict = problem.case.network.strict
    references[row.case] = f"{reference.how}; {reference.allowance(strict=strict)}"
    if why := measured.cannot(problem):
        raise NotTimed("cannot", why)
    _foretell(measured, problem, settings)

    if settings.peak:
        # First, so that one the system kills for its memory is not begun here.
        peak = memory.measure(row.case, measured.name, settings.device, 20 * settings.limit_s)
        row.peak_bytes, row.peak_reason = peak.bytes, peak.reason
        if peak.died:
            raise NotTimed("failed", peak.reason)

    try:
        step = measured.prepare(problem)
        run = _synchronised(step.run) if settings.device == "cuda" else step.run
        result, seconds = _timed(run)
        row.errors = reference.errors(*step.read(result))
    except Exception as error:  # whatever a peer may raise is a finding
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise NotTimed("failed", f"{type(error).__name__}: {first_line}") from error
    if wrong := broken(row.errors, reference.bounds(strict=measured.ours and strict)):
        raise NotTimed("wrong", wrong)
    return run, _rounds(run, seconds, settings)


def _foretell(measured: Implementation, problem: Problem, settings: Settings) -> None:
    if not measured.one_by_one or problem.episodes.tasks <= FEW_TASKS:
        return
    step = measured.prepare(problem.first(FEW_TASKS))
    seconds = min(_timed(step.run)[1] for _ in range(2)) * problem.episodes.tasks / FEW_TASKS
    if seconds > settings.limit_s:
        raise NotTimed(
            "skipped",
            f"about {seconds:.0f} s a call, to judge by {FEW_TASKS} tasks; "
            f"the limit is {settings.limit_s:.0f} s",
        )


def _rounds(run: Callable[[], Any], seconds: float, settings: Settings) -> int:
    """Warm up for a tenth of the time to spend, and spread the time over rounds."""
    if seconds > settings.limit_s:
        return 1
    end = time.perf_counter() + settings.seconds / 10
    while seconds < settings.seconds:
        seconds = min(seconds, _timed(run)[1])
        if time.perf_counter() > end:
            break
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, math.ceil(settings.seconds / seconds)))


def _synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    def synchronised() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return synchronised


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start
