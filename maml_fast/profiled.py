"""What `maml_fast.profile` gives: where a meta-step's time and memory go, as a table or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maml_fast.recorder import PASSES


@dataclass(frozen=True)
class LayerProfile:
    """A layer of the plan, or several that run as one.

    layers, operations, forms: of each in order, as `Plan` names them.
    milliseconds: by pass, in the order of `recorder.PASSES`; None: not told apart.
    flops: of its products in a meta-step of all tasks, as the plan counts them; 0: of none.
    own_bytes, value_bytes: of backend "cpu", in one thread's memory: what it keeps, as fast
        weights, their adjoint and statistics; and its results' values, cotangents and tangents.
        None elsewhere.
    alive_bytes: of backend "torch", tensors that it made and that were alive at the peak of all
        tensors together. None elsewhere.
    note: what is to be known of it.
    """

    layers: tuple[str, ...]
    operations: tuple[str, ...]
    forms: tuple[str, ...]
    milliseconds: tuple[float, float, float] | None
    flops: int
    own_bytes: int | None = None
    value_bytes: int | None = None
    alive_bytes: int | None = None
    note: str = ""

    @property
    def total(self) -> float:
        """Milliseconds of all passes; 0 where they are not told apart."""
        return sum(self.milliseconds or ())

    @property
    def gflops(self) -> float | None:
        """GFLOP/s; None of what has no products, or no time of its own."""
        return self.flops / self.total / 1e6 if self.flops and self.total else None


@dataclass(frozen=True)
class PartProfile:
    """What is beside the layers: losses, rows in and out, sums over tasks, waiting.

    milliseconds: by pass; outside: of none of them.
    """

    name: str
    milliseconds: tuple[float, float, float]
    outside: float = 0.0
    bytes: int | None = None

    @property
    def total(self) -> float:
        """Milliseconds together."""
        return sum(self.milliseconds) + self.outside


@dataclass(frozen=True)
class Profile:
    """Where the time and the memory of a meta-step go. `print(profile)` shows it.

    total_ms: of `maml(...)` and its gradient while it was measured, the mean of the faster half of
        `repeats`; plain_ms: the same without measuring, in turns with it.
    threads: that took part, each of whose seconds counts 1 / threads of a layer's milliseconds.
    layers: those of the plan in order; parts: what else was told apart; rest_ms: what was not,
        as Python, autograd, and the calls of operations.
    arena_bytes, sum_bytes: of backend "cpu", of each thread, and of the sums over tasks.
    peak_bytes: at most alive that the meta-step made, tensors and the engine's memory.
    notes: what is to be known of these figures.
    """

    backend: str
    about: str
    loss: float
    repeats: int
    total_ms: float
    plain_ms: float
    threads: int
    layers: tuple[LayerProfile, ...]
    parts: tuple[PartProfile, ...]
    arena_bytes: int
    sum_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def rest_ms(self) -> float:
        """What no layer and no part has."""
        told = sum(layer.total for layer in self.layers) + sum(part.total for part in self.parts)
        return max(self.total_ms - told, 0.0)

    @property
    def by_pass(self) -> dict[str, float]:
        """{pass: milliseconds} of layers and parts."""
        told = [layer.milliseconds for layer in self.layers if layer.milliseconds is not None]
        told += [part.milliseconds for part in self.parts]
        return {name: sum(ms[i] for ms in told) for i, name in enumerate(PASSES)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = []
        for layer in self.layers:
            ms = layer.milliseconds
            found = _plain(layer) | {
                "milliseconds": None if ms is None else dict(zip(PASSES, ms, strict=True)),
                "total_ms": None if ms is None else layer.total,
                "share": None if ms is None else self._share(layer.total),
                "gflops": layer.gflops,
            }
            layers.append(found)
        parts = []
        for part in self.parts:
            by_pass = dict(zip(PASSES, part.milliseconds, strict=True))
            found = {"milliseconds": by_pass, "total_ms": part.total}
            parts.append(_plain(part) | found | {"share": self._share(part.total)})
        whole = {"rest_ms": self.rest_ms, "by_pass_ms": self.by_pass}
        return _plain(self) | {"layers": layers, "parts": parts, **whole}

    def _share(self, ms: float) -> float:
        return ms / self.total_ms if self.total_ms else 0.0

    def __str__(self) -> str:
        lines = [
            self.about,
            f"{_number(self.total_ms)} ms a meta-step with its gradient, "
            f"{_number(self.plain_ms)} without measuring; the faster half of {self.repeats}"
            + (f"; {self.threads} threads" if self.threads > 1 else ""),
        ]
        memory = ("own KiB", "values KiB") if self.arena_bytes else ("alive KiB", "")
        rows: list[tuple[str, ...]] = [
            ("layer", "operation", "weights", *PASSES, "ms", "%", "GFLOP/s", *memory)
        ]
        rows += map(self._row_of, self.layers)
        for part in self.parts:
            passes = [_number(ms) if ms else "" for ms in part.milliseconds]
            figures = self._figures(part.total) if part.total else ("", "")
            rows.append((part.name, "", "", *passes, *figures, "", _kib(part.bytes), ""))
        rows.append(("rest", "", "", "", "", "", *self._figures(self.rest_ms), "", "", ""))
        lines += aligned(rows, texts=3)
        if self.arena_bytes:
            lines.append(
                f"memory: {_kib(self.arena_bytes)} KiB a thread, {_kib(self.sum_bytes)} KiB of "
                f"sums over tasks; at most {_kib(self.peak_bytes)} KiB with the results"
            )
        else:
            lines.append(f"memory: at most {_kib(self.peak_bytes)} KiB of tensors alive at once")
        return "\n".join([*lines, *self.notes])

    def _row_of(self, layer: LayerProfile) -> tuple[str, ...]:
        passes = [""] * len(PASSES) if layer.milliseconds is None else layer.milliseconds
        gflops = layer.gflops
        return (
            ", ".join(dict.fromkeys(layer.layers)),
            ", ".join(layer.operations) + (f" ({layer.note})" if layer.note else ""),
            ", ".join(form for form in layer.forms if form),
            *(ms if isinstance(ms, str) else _number(ms) for ms in passes),
            *(("", "") if layer.milliseconds is None else self._figures(layer.total)),
            "" if gflops is None else f"{gflops:.1f}",
            _kib(layer.own_bytes if self.arena_bytes else layer.alive_bytes),
            _kib(layer.value_bytes),
        )

    def _figures(self, ms: float) -> tuple[str, str]:
        return _number(ms), f"{100 * self._share(ms):.1f}"


def aligned(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Lines of a table whose first `texts` columns are texts, and the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _plain(value: Any) -> dict[str, Any]:
    return {
        field.name: list(found) if isinstance(found := getattr(value, field.name), tuple) else found
        for field in dataclasses.fields(value)
    }


def _number(ms: float) -> str:
    """Three digits that count, at least."""
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _kib(count: int | None) -> str:
    return "" if count is None else f"{count / 1024:.1f}"
