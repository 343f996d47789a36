"""A run of pytest over `timing`, with pytest-benchmark timing the rounds, and what it found."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu, machine, timing
from benchmarks.cases import named
from benchmarks.results import Results, Row
from benchmarks.text import describe
from benchmarks.timing import Settings


class Session:
    """The pytest plugin: which pairs to measure, and their rows as they come."""

    def __init__(self, pairs: Sequence[tuple[str, str]], settings: Settings) -> None:
        self.pairs = pairs
        self._settings = settings
        self._references: dict[str, str] = {}
        self.rows: dict[tuple[str, str], Row] = {}

    @pytest.fixture
    def settings(self) -> Settings:
        return self._settings

    @pytest.fixture
    def references(self) -> dict[str, str]:
        return self._references

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize(
            ("case", "name"), self.pairs, ids=["/".join(pair) for pair in self.pairs]
        )

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        row = _row(report)
        if report.when != "call" or row is None:
            return None
        return report.outcome, ".", describe(row)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if row := _row(report):
            self.rows[row.case, row.implementation] = row


def run(pairs: Sequence[tuple[str, str]], settings: Settings) -> tuple[Results, bool]:
    """Measure the pairs of case and implementation; also whether all of ours were right."""
    session = Session(pairs, settings)
    found = machine.describe(settings.device) | {"minutes": settings.budget.minutes}
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder) / "timings.json"
        exit_code = pytest.main(
            [
                timing.__file__,
                "-v",
                "--no-header",
                "--tb=short",
                "--benchmark-quiet",
                f"--benchmark-json={timings}",
                "--override-ini=addopts=",
                "--override-ini=filterwarnings=ignore",
                "-p",
                "no:cacheprovider",
            ],
            plugins=[session],
        )
        if settings.gpu:
            found["gpu"]["after"] = _state_after()
        # Not written when nothing was timed.
        measured = json.loads(timings.read_text())["benchmarks"] if timings.exists() else []
    for entry in measured:
        row = session.rows[entry["params"]["case"], entry["params"]["name"]]
        row.times = entry["stats"]["data"]
    rows = sorted(
        session.rows.values(), key=lambda row: pairs.index((row.case, row.implementation))
    )
    return Results(found, session._references, rows), exit_code == pytest.ExitCode.OK


def _state_after() -> dict[str, str]:
    try:
        return gpu.state()
    except RuntimeError as error:  # an implementation has broken it
        return {"error": str(error).strip().splitlines()[0]}


def pairs_of(cases: Sequence[str], implementations: Sequence[str]) -> list[tuple[str, str]]:
    """Every implementation on every case, but for cases that are about some of them only."""
    return [
        (case, name)
        for case in cases
        for name in implementations
        if not named(case).only or name in named(case).only
    ]


def _row(report: pytest.TestReport) -> Row | None:
    return next(
        (
            value
            for name, value in report.user_properties
            if name == "row" and isinstance(value, Row)
        ),
        None,
    )
