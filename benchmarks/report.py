"""What a run found, as tables: the lost and the failed like the others."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks import text
from benchmarks.cases import CASES, LONG_FEW_ROWS, LONG_MANY_ROWS, OMNIGLOT_FC
from benchmarks.check import LOOSE
from benchmarks.results import Results, Row

LEFT = ("implementation", "worst error", "note")
RIGHT = ("median", "min", "p20 to p80", "rounds", "peak memory", "GF/s", "of peak", "speed")
COLUMNS = (LEFT[0], *RIGHT, *LEFT[1:])
BUSY = 0.5  # load average before the run from which its times are not to be trusted
EXPLAINED = (
    "Each is held to a float64 gradient before it is timed; the error is ||g - g64|| / ||g64|| of "
    f"the worst tensor. Peers may have {LOOSE:g}; what ours may have is under each table. "
    "Times are of one whole meta-step: loss and gradient of every parameter. GF/s count the "
    "operations of dense fast weights, whatever was done. Of peak: the operations that the chosen "
    "forms of fast weights take, against the multiply-adds that as many threads reach in "
    "registers, measured beside it. Speed: how many times as fast as the fastest peer of the same "
    "run. Peak memory: of one call, above what was in use before, in a process of its own."
)


@dataclass(frozen=True)
class Goal:
    """Peak memory of one of ours as a share of a peer's."""

    case: str
    ours: str
    peer: str
    at_most: float


GOALS = (
    Goal(LONG_FEW_ROWS.name, "functional", "vmap", 1 / 3),
    Goal(LONG_MANY_ROWS.name, "functional", "vmap", 1 / 3),
    *(
        Goal(case.name, backend, "vmap", 1 / 10)
        for backend in ("cpu", "torch")
        for case in CASES
        if case.network is OMNIGLOT_FC and case.T == 512
    ),
)


def show(results: Results, console: Console) -> None:
    """Print everything."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = " ".join(machine["flags"])
    console.print(f"\n{machine['device']}: {machine['cpu']}, {machine['cores']} cores, {flags}")
    console.print(f"{machine['torch_threads']} torch threads, {machine['torch_instructions']}")
    console.print(
        f"Python {machine['python']}, {versions}; commit {machine['commit']}; {machine['date']}"
    )
    if (machine["load_before"] or 0) > BUSY:
        load = machine["load_before"]
        console.print(
            f"OTHER PROGRAMS WERE RUNNING (load {load} before the run): no time here counts"
        )
    console.print(EXPLAINED + "\n")
    for case in results.cases:
        console.print(_case(results, case))
    console.print(_summary(results))
    console.print(_goals(results))


def _case(results: Results, name: str) -> Table:
    title = next((case.title for case in CASES if case.name == name), name)
    held_to = results.references.get(name, "nothing: none was run")
    table = Table(
        title=title, caption=f"held to: {held_to}", title_justify="left", caption_justify="left"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    best_peer = results.best(name, ours=False)
    rows = results.of_case(name)
    for row in sorted(
        rows, key=lambda row: (row.status != "timed", row.median if row.times else 0.0)
    ):
        table.add_row(*_cells(row, best_peer), style="bold" if row.ours else "")
    return table


def _cells(row: Row, best_peer: Row | None) -> list[str]:
    peak = text.size(row.peak_bytes)
    if row.status != "timed":
        return [row.title, row.status, "", "", "", peak, "", "", "", text.error(row), row.reason]
    low, high = row.spread
    notes = [
        "timed once, as a call takes so long" if len(row.times) == 1 else "",
        f"peak memory: {row.peak_reason}" if row.peak_reason else "",
    ]
    return [
        row.title,
        text.seconds(row.median),
        text.seconds(min(row.times)),
        f"{text.seconds(low)} to {text.seconds(high)}",
        str(len(row.times)),
        peak,
        f"{row.gflops:.3g}",
        "-" if row.share is None else f"{row.share:.0%}",
        f"{best_peer.median / row.median:.3g}x" if best_peer else "-",
        text.error(row),
        "; ".join(filter(None, notes)),
    ]


def _summary(results: Results) -> Table:
    table = Table(title="The fastest of ours against the fastest peer", title_justify="left")
    for column in ("case", "ours", "", "peer", "", "speed", ""):
        table.add_column(column)
    for case in results.cases:
        ours, peer = results.best(case, ours=True), results.best(case, ours=False)
        ratio = peer.median / ours.median if ours and peer else None
        table.add_row(
            case,
            *((ours.title, text.seconds(ours.median)) if ours else ("none was timed", "")),
            *((peer.title, text.seconds(peer.median)) if peer else ("none was timed", "")),
            "-" if ratio is None else f"{ratio:.3g}x",
            "no comparison" if ratio is None else "won" if ratio > 1 else "LOST",
        )
    return table


def _goals(results: Results) -> Table:
    table = Table(title="Peak memory, ours as a share of a peer's", title_justify="left")
    for column in ("case", "ours", "", "peer", "", "share", "goal", ""):
        table.add_column(column)
    for goal in GOALS:
        ours, peer = results.find(goal.case, goal.ours), results.find(goal.case, goal.peer)
        peaks = [row.peak_bytes if row and row.status == "timed" else None for row in (ours, peer)]
        share = peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None
        table.add_row(
            goal.case,
            goal.ours,
            text.size(peaks[0]),
            goal.peer,
            text.size(peaks[1]),
            "-" if share is None else f"{share:.3f}",
            f"{goal.at_most:.3f}",
            "not measured" if share is None else "met" if share <= goal.at_most else "MISSED",
        )
    return table
