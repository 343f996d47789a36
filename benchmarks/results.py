"""What a run found, timed or not, and the file it is kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from benchmarks.cases import Case
from benchmarks.check import Errors, worst
from benchmarks.implementation import Implementation

# timed: right, and measured. wrong: beyond the error it may have, so not timed. failed: it raised.
# cannot: it cannot run here, or not this case. skipped: it could, but would take too long.
Status = Literal["timed", "wrong", "failed", "cannot", "skipped"]


@dataclass
class Row:
    """One implementation on one case. Times are seconds of single calls."""

    case: str
    implementation: str
    title: str
    ours: bool
    flops: int
    status: Status = "failed"
    reason: str = "it raised outside its check: see the output"
    errors: Errors = field(default_factory=dict)
    peak_bytes: int | None = None
    peak_reason: str = ""
    times: list[float] = field(default_factory=list)
    ceiling_flops: int | None = None  # see `implementation.Ceiling`
    ceiling_flops_per_second: float | None = None

    @classmethod
    def of(cls, case: Case, implementation: Implementation) -> Row:
        return cls(
            case.name, implementation.name, implementation.title, implementation.ours, case.flops
        )

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and 80th percentiles."""
        if len(self.times) == 1:
            return self.times[0], self.times[0]
        fifths = quantiles(self.times, n=5, method="inclusive")
        return fifths[0], fifths[-1]

    @property
    def gflops(self) -> float:
        """Thousand million operations a second, by the formula of `Case.flops`."""
        return self.flops / self.median / 1e9

    @property
    def share(self) -> float | None:
        """Of the speed that the processor's multiply-adds reach, by the operations done."""
        if self.ceiling_flops is None or self.ceiling_flops_per_second is None:
            return None
        return self.ceiling_flops / self.median / self.ceiling_flops_per_second

    @property
    def worst_error(self) -> tuple[str, float] | None:
        return worst(self.errors) if self.errors else None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.times:
            low, high = self.spread
            found["seconds"] = {
                "median": self.median,
                "min": min(self.times),
                "p20": low,
                "p80": high,
            }
            found["gflops"] = self.gflops
            found["share_of_peak"] = self.share
        if self.worst_error:
            found["worst_tensor"] = self.worst_error[0]
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Row:
        return cls(
            **{name: value for name, value in found.items() if name in cls.__dataclass_fields__}
        )


@dataclass
class Results:
    """A whole run.

    Attributes:
        machine: versions, commit, processor, threads (see `machine.describe`).
        references: by case, how the right answer was computed.
        rows: in the order they were measured.
    """

    machine: dict[str, Any]
    references: dict[str, str]
    rows: list[Row]

    @property
    def cases(self) -> list[str]:
        """The cases measured, in order."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def of_case(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def find(self, case: str, implementation: str) -> Row | None:
        return next(
            (row for row in self.of_case(case) if row.implementation == implementation), None
        )

    def best(self, case: str, *, ours: bool) -> Row | None:
        """The fastest of ours, or of the peers, that was timed on the case."""
        timed = [row for row in self.of_case(case) if row.status == "timed" and row.ours == ours]
        return min(timed, key=lambda row: row.median, default=None)

    def save(self, path: Path) -> None:
        content = {
            "machine": self.machine,
            "references": self.references,
            "rows": [row.to_json() for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        return cls(
            content["machine"],
            content["references"],
            [Row.from_json(row) for row in content["rows"]],
        )
