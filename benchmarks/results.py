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
    double_error: float | None = None  # the worst in float64, on a few tasks of some networks
    peak_bytes: int | None = None
    peak_reason: str = ""
    times: list[float] = field(default_factory=list)
    ceiling_flops: int | None = None  # see `implementation.Ceiling`
    ceiling_flops_per_second: float | None = None
    ceiling_bytes: int | None = None
    ceiling_bytes_per_second: float | None = None
    precision: str = "highest"  # of float32 products
    first_s: float | None = None  # to prepare it, compiling included, and to call it once

    @classmethod
    def of(cls, case: Case, implementation: Implementation) -> Row:
        return cls(
            case.name,
            implementation.name,
            implementation.title,
            implementation.ours,
            case.flops,
            precision=implementation.precision,
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
    def floor(self) -> float | None:
        """Seconds that the operations and bytes of its plan take at least, where that is known."""
        least = [
            amount / speed
            for amount, speed in (
                (self.ceiling_flops, self.ceiling_flops_per_second),
                (self.ceiling_bytes, self.ceiling_bytes_per_second),
            )
            if amount is not None and speed is not None
        ]
        return max(least, default=None)

    @property
    def gflops_done(self) -> float | None:
        """Thousand million operations a second, by those of its plan."""
        return None if self.ceiling_flops is None else self.ceiling_flops / self.median / 1e9

    @property
    def gbytes(self) -> float | None:
        """Thousand million bytes a second, by those that its plan must move."""
        return None if self.ceiling_bytes is None else self.ceiling_bytes / self.median / 1e9

    @property
    def worst_error(self) -> tuple[str, float] | None:
        return worst(self.errors) if self.errors else None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.times:
            low, high = self.spread
            found["seconds"] = {
                "median": self.median,
                "p50": self.median,
                "min": min(self.times),
                "p20": low,
                "p80": high,
            }
            found["gflops"] = self.gflops
            found["share_of_peak"] = self.share
            found["gflops_done"] = self.gflops_done
            found["gbytes_per_second"] = self.gbytes
            found["floor_seconds"] = self.floor
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
        machine: versions, commit, processor, threads, GPU (see `machine.describe`), and the
            "minutes" that the run was given.
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

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.machine

    def _exact(self, case: str) -> list[Row]:
        return [
            row
            for row in self.of_case(case)
            if row.status == "timed" and row.precision == "highest"
        ]

    def best(self, case: str, *, ours: bool) -> Row | None:
        """The fastest of ours, or of the peers, that was timed on the case at full precision."""
        timed = [row for row in self._exact(case) if row.ours == ours]
        return min(timed, key=lambda row: row.median, default=None)

    def lowest_floor(self, case: str) -> Row | None:
        """Whose plan takes the least time on the case at full precision, where any is known."""
        floors = [(row.floor, i, row) for i, row in enumerate(self._exact(case)) if row.floor]
        return min(floors)[-1] if floors else None

    def share_of_floor(self, row: Row) -> float | None:
        """The floor of its plan, or the case's for one without a plan, as a part of its time."""
        if row.status != "timed":
            return None
        floor = row.floor
        if floor is None and row.precision == "highest" and (lowest := self.lowest_floor(row.case)):
            floor = lowest.floor
        return None if floor is None else floor / row.median

    def save(self, path: Path) -> None:
        content = {
            "machine": self.machine,
            "references": self.references,
            "rows": [
                row.to_json() | {"share_of_floor": self.share_of_floor(row)} for row in self.rows
            ],
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
