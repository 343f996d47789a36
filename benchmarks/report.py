"""What a run found, as tables: the lost and the failed like the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import text
from benchmarks.cases import CASES, CONV4_FIVE_STEPS, LONG_FEW_ROWS, LONG_MANY_ROWS
from benchmarks.check import REDUCED
from benchmarks.networks import OMNIGLOT_FC
from benchmarks.results import Results, Row

LEFT = ("implementation", "worst error", "note")
MEMORY = "peak memory"
SLOW_START_S = 1.0  # from which a note says what preparing took, on a GPU
BUSY = 0.5  # load average before the run from which its times are not to be trusted
EXPLAINED = (
    "Each is held to a float64 gradient before it is timed; the error is ||g - g64|| / ||g64|| of "
    "the worst tensor. What it may be is under each table. "
    "Times are of one whole meta-step: loss and gradient of every parameter. Speed: how many times "
    "as fast as the fastest peer of the same run. Peak memory: of one call, above what was in use "
)
ON_CPU = (
    "before, in a process of its own. GF/s count the operations of dense fast weights, whatever "
    "was done. Of peak: the operations that the chosen forms of fast weights take, against the "
    "multiply-adds that as many threads reach in registers, measured beside it."
)
ON_GPU = (
    "before. A round begins and ends with the GPU idle, as a user's call that waits for its result "
    "does. TF/s dense count the operations of dense fast weights, whatever was done; TF/s done "
    "those of the plan's forms, GB/s the bytes that the plan must move. Of floor: the least time "
    "that the plan's operations or bytes take at the data sheet's peak (float32 multiply-adds, "
    "TF32 or bfloat16, by precision), against the median; for one without a plan, the case's "
    "lowest floor. Precisions "
    + " and ".join(f"{name} may have errors of {bound:g}" for name, bound in REDUCED.items())
    + "; they are not compared with peers."
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
    Goal(CONV4_FIVE_STEPS.name, "cpu", "loop", 1 / 4),
)


def show(results: Results, console: Console) -> None:
    """Print everything."""
    machine = results.machine
    on = ON_GPU if results.on_gpu else ON_CPU
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = " ".join(machine["flags"])
    console.print(f"\n{machine['device']}: {machine['cpu']}, {machine['cores']} cores, {flags}")
    console.print(f"{machine['torch_threads']} torch threads, {machine['torch_instructions']}")
    console.print(
        f"Python {machine['python']}, {versions}; commit {machine['commit']}; {machine['date']}"
    )
    if results.on_gpu:
        console.print(_gpu(machine["gpu"]))
    if (machine["load_before"] or 0) > BUSY:
        load = machine["load_before"]
        console.print(
            f"OTHER PROGRAMS WERE RUNNING (load {load} before the run): no time here counts"
        )
    if minutes := machine.get("minutes"):
        skipped = sum(row.status == "skipped" for row in results.rows)
        console.print(
            f"The run had {minutes:g} minutes: {skipped} of {len(results.rows)} rows were skipped, "
            "each with why, and rounds were short"
        )
    console.print(EXPLAINED + on + "\n")
    for case in results.cases:
        console.print(case_table(results, case))
    console.print(summary(results))
    console.print(goals(results))


def _gpu(gpu: dict[str, Any]) -> str:
    """Driver, clocks and power before and after the run, and what floors count with."""
    lines = [f"CUDA {gpu['cuda']}, {gpu['multiprocessors']} multiprocessors"]
    for when in ("before", "after"):
        state = ", ".join(f"{name} {value}" for name, value in gpu.get(when, {}).items())
        lines.append(f"{when} the run: {state or 'not asked'}")
    if peak := gpu.get("peak"):
        lines.append(
            f"at most {peak['highest'] / 1e12:.4g} TF/s in float32, {peak['high'] / 1e12:.4g} in "
            f"TF32, {peak['medium'] / 1e12:.4g} in bfloat16, {peak['bytes_per_second'] / 1e12:.3g} "
            "TB/s, by its data sheet"
        )
    else:
        lines.append("no floors: this GPU is not in the table of benchmarks/gpu.py")
    return "\n".join(lines)


def case_table(results: Results, name: str) -> Table:
    title = next((case.title for case in CASES if case.name == name), name)
    held_to = results.references.get(name, "nothing: none was run")
    caption = f"held to: {held_to}"
    if results.on_gpu and (lowest := results.lowest_floor(name)) and lowest.floor:
        caption += f"\nfloor: {text.seconds(lowest.floor)}, by the plan of {lowest.title}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = _columns(results, name)
    for column in (LEFT[0], *columns, *LEFT[1:]):
        table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    rows = results.of_case(name)
    for row in sorted(
        rows, key=lambda row: (row.status != "timed", row.median if row.times else 0.0)
    ):
        table.add_row(*_cells(results, row, columns), style="bold" if row.ours else "")
    return table


Columns = dict[str, Callable[[Row], str]]  # by heading, what is said of a timed row


def _columns(results: Results, case: str) -> Columns:
    best_peer = results.best(case, ours=False)

    def speed(row: Row) -> str:
        if best_peer is None or row.precision != "highest":
            return "-"
        return f"{best_peer.median / row.median:.3g}x"

    rounds: Columns = {"rounds": lambda row: str(len(row.times)), MEMORY: _memory}
    if not results.on_gpu:
        return {
            "median": lambda row: text.seconds(row.median),
            "min": lambda row: text.seconds(min(row.times)),
            "p20 to p80": lambda row: " to ".join(map(text.seconds, row.spread)),
            **rounds,
            "GF/s": lambda row: text.number(row.gflops),
            "of peak": lambda row: text.share(row.share),
            "speed": speed,
        }
    return {
        "p50": lambda row: text.seconds(row.median),
        "p20": lambda row: text.seconds(row.spread[0]),
        "p80": lambda row: text.seconds(row.spread[1]),
        **rounds,
        "TF/s dense": lambda row: text.number(row.gflops, 1e3),
        "TF/s done": lambda row: text.number(row.gflops_done, 1e3),
        "GB/s": lambda row: text.number(row.gbytes),
        "of floor": lambda row: text.share(results.share_of_floor(row)),
        "speed": speed,
    }


def _memory(row: Row) -> str:
    return text.size(row.peak_bytes)


def _cells(results: Results, row: Row, columns: Columns) -> list[str]:
    if row.status != "timed":
        # the status stands where the first time would
        middle = [_memory(row) if heading == MEMORY else "" for heading in columns]
        return [row.title, row.status, *middle[1:], text.error(row), row.reason]
    started = row.first_s if results.on_gpu and row.first_s is not None else 0.0
    notes = [
        "timed once, as a call takes so long" if len(row.times) == 1 else "",
        f"ready after {started:.0f} s" if started >= SLOW_START_S else "",
        f"peak memory: {row.peak_reason}" if row.peak_reason else "",
        "" if row.double_error is None else f"in float64 {row.double_error:.1e}",
    ]
    return [
        row.title,
        *(say(row) for say in columns.values()),
        text.error(row),
        "; ".join(filter(None, notes)),
    ]


def summary(results: Results) -> Table:
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


def goals(results: Results) -> Table:
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
