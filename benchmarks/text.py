"""Numbers as people read them."""

from __future__ import annotations

from benchmarks.results import Row


def seconds(value: float) -> str:
    """3.5e-3 is "3.50 ms"."""
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def number(value: float | None, unit: float = 1.0) -> str:
    """1_234.5 in thousands is "1.23"."""
    return "-" if value is None else f"{value / unit:.3g}"


def share(value: float | None) -> str:
    """0.25 is "25%"; small ones keep a digit."""
    if value is None:
        return "-"
    return f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def size(count: int | None) -> str:
    """1_500_000 is "1.5 MB"."""
    return "-" if count is None else f"{count / 1e6:.3g} MB"


def error(row: Row) -> str:
    """The worst tensor's error, and which tensor."""
    if row.worst_error is None:
        return "-"
    name, value = row.worst_error
    return f"{value:.1e} {name}"


def describe(row: Row) -> str:
    """What was found of one implementation on one case, in a line, while the run goes on."""
    found = "right" if row.status == "timed" else f"{row.status}: {row.reason}"
    return f"{found}, error {error(row)}, peak {size(row.peak_bytes)}"
