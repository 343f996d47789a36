"""One implementation on one case: check it, take its peak memory, time it.

Called through pytest by `session`, with pytest-benchmark for the rounds; no part of the test suite.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import memory
from benchmarks.budget import Budget, OutOfTime
from benchmarks.cases import named
from benchmarks.check import EXACT, Reference, broken, in_double, problem_and_reference, worst
from benchmarks.implementation import Implementation
from benchmarks.problem import Problem
from benchmarks.registry import implementation
from benchmarks.results import Row, Status

LEAST_ROUNDS = 3
MOST_ROUNDS = {"cpu": 300, "cuda": 500}
FEW_TASKS = 8  # what foretells the time of implementations that go task by task


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        device: "cpu" or "cuda".
        seconds: to spend on the rounds of one implementation on one case.
        limit_s: a call that takes longer is timed once, by the call that is checked; one foretold
            to take longer is skipped.
        ready_s: what is not compiled, checked and warm within so long is skipped.
        peak: whether to take peak memory.
        budget: of the whole run.
    """

    device: str
    seconds: float = 2.0
    limit_s: float = 15.0
    ready_s: float = 600.0
    peak: bool = True
    budget: Budget = field(default_factory=lambda: Budget(None))

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


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
        _measure(row, measured, settings, references, benchmark)
    except NotTimed as verdict:
        row.status, row.reason = verdict.status, verdict.reason
    except OutOfTime as over:
        row.status, row.reason = "skipped", str(over)
    finally:
        if settings.gpu:
            _tidy(measured)
    # Not while an exception is handled: it would hold the failed one's tensors.
    if measured.ours and row.status in ("wrong", "failed"):
        pytest.fail(f"{row.status}: {row.reason}", pytrace=False)
    if row.status != "timed":
        pytest.skip(f"{row.status}: {row.reason}")


def _measure(
    row: Row,
    measured: Implementation,
    settings: Settings,
    references: dict[str, str],
    benchmark: BenchmarkFixture,
) -> None:
    budget = settings.budget
    if why := budget.refusal(measured, named(row.case).S, settings.seconds):
        raise NotTimed("skipped", why)
    if settings.gpu and (why := _lost()):
        raise NotTimed("skipped", why)
    with (
        budget.enforced()
    ):  # outside `around`: the right answer and its bounds are at full precision
        problem, reference = problem_and_reference(row.case, settings.device)
    strict = problem.case.network.strict
    references[row.case] = f"{reference.how}; {reference.allowance(strict=strict)}"
    with measured.around():
        with budget.enforced():
            _consider(row, measured, problem, settings)
        with budget.enforced(settings.ready_s):
            run, rounds = _admit(row, measured, problem, reference, settings)
        if rounds:
            benchmark.pedantic(run, rounds=rounds, iterations=1)
        if ceiling := measured.ceiling(problem):
            row.ceiling_flops, row.ceiling_flops_per_second = (
                ceiling.flops,
                ceiling.flops_per_second,
            )
            row.ceiling_bytes, row.ceiling_bytes_per_second = (
                ceiling.bytes,
                ceiling.bytes_per_second,
            )
    row.status, row.reason = "timed", ""


def _consider(row: Row, measured: Implementation, problem: Problem, settings: Settings) -> None:
    """Whether it is begun at all, and on a CPU its peak memory."""
    if why := measured.cannot(problem):
        raise NotTimed("cannot", why)
    _foretell(measured, problem, settings)

    if settings.peak and not settings.gpu:
        # First, so that one the system kills for its memory is not begun here.
        peak = memory.measure(row.case, measured.name, 20 * settings.limit_s)
        row.peak_bytes, row.peak_reason = peak.bytes, peak.reason
        if peak.died:
            raise NotTimed("failed", peak.reason)


def _admit(
    row: Row,
    measured: Implementation,
    problem: Problem,
    reference: Reference,
    settings: Settings,
) -> tuple[Callable[[], Any], int]:
    """What to time, warm, and how many rounds of it; none where a single call is all the timing."""
    failure, start, double = "", time.perf_counter(), None
    try:
        step = measured.prepare(problem)
        run = _complete(step.run, measured, settings)
        if settings.gpu and settings.peak:
            result, peak = memory.on_gpu(run, measured.name)
            row.peak_bytes, row.peak_reason = peak.bytes, peak.reason
        else:
            result, seconds = _timed(run)
        row.first_s = time.perf_counter() - start
        row.errors = reference.errors(*step.read(result))
        del result
        if settings.gpu:
            seconds = _timed(run)[1]  # the first compiled kernels
        if measured.ours and measured.precision == "highest":
            double = in_double(measured, problem, reference)
    except Exception as error:  # whatever a peer may raise is a finding
        failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    settings.budget.note(measured, problem.case.S, time.perf_counter() - start)
    if failure:
        raise NotTimed("failed", failure)
    strict = measured.ours and problem.case.network.strict
    if wrong := broken(row.errors, reference.bounds(strict=strict, precision=measured.precision)):
        raise NotTimed("wrong", wrong)
    if double is not None:
        row.double_error = worst(double)[1]
        if wrong := broken(double, dict.fromkeys(double, EXACT)):
            raise NotTimed("wrong", f"in float64 {wrong}")
    if seconds > settings.limit_s:
        row.times = [seconds]
        return run, 0
    return run, _rounds(run, seconds, settings)


def _foretell(measured: Implementation, problem: Problem, settings: Settings) -> None:
    if not measured.one_by_one or problem.episodes.tasks <= FEW_TASKS:
        return
    run = _complete(measured.prepare(problem.first(FEW_TASKS)).run, measured, settings)
    seconds = min(_timed(run)[1] for _ in range(2)) * problem.episodes.tasks / FEW_TASKS
    if seconds > settings.limit_s:
        raise NotTimed(
            "skipped",
            f"about {seconds:.0f} s a call, to judge by {FEW_TASKS} tasks; "
            f"the limit is {settings.limit_s:.0f} s",
        )


def _rounds(run: Callable[[], Any], seconds: float, settings: Settings) -> int:
    """Warm up for a tenth of the time to spend, and spread the time over rounds."""
    end = time.perf_counter() + settings.seconds / 10
    while seconds < settings.seconds:
        seconds = min(seconds, _timed(run)[1])
        if time.perf_counter() > end:
            break
    most = MOST_ROUNDS[settings.device]
    return min(most, max(LEAST_ROUNDS, math.ceil(settings.seconds / seconds)))


def _lost() -> str | None:
    """Why nothing more can run on the GPU, or None."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        return f"the GPU fails since an earlier implementation ran on it: {first_line}"
    return None


def _tidy(measured: Implementation) -> None:
    """Leave the next one all of the GPU's memory."""
    try:
        measured.release()
        gc.collect()
        torch.cuda.empty_cache()
    except Exception:
        return  # the GPU is lost, and `_lost` tells


def _complete(
    run: Callable[[], Any], measured: Implementation, settings: Settings
) -> Callable[[], Any]:
    """Until the result is there."""
    if not settings.gpu or measured.waits:
        return run

    def synchronised() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return synchronised


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start
