"""`python -m benchmarks.page`: writes docs/benchmarks.md and its pictures from the kept results.

With --check it writes nothing, and fails where they are not what it would write.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import family, large, page_plot, report, scaling, text
from benchmarks.cases import CASES
from benchmarks.results import Results, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE = "benchmarks.md"

HEAD = """# Benchmarks

<!-- Written by python -m benchmarks.page from benchmarks/results/; do not edit. -->

Every case against every peer, the lost ones like the others. The peers, on the same data in the
same run: `torch.compile(vmap(grad))`, `jax.jit(vmap(grad))`, eager `vmap(grad)`, the library
parallel-metalearn, and a loop over tasks by autograd. `make bench` measures anew and
`python -m benchmarks.page` writes this page from what it leaves in `benchmarks/results/`.

"""
NO_GPU = """## GPUs

**There are no GPU results yet.** Nothing is claimed about the speed of backend `triton`.
`make gpu`, on a machine with a GPU, measures there and leaves a file of results from which this
page is written.
"""
CASE_NAMES = [case.name for case in CASES]


@dataclasses.dataclass
class Group:
    """All runs of one machine, of each case the newest; its memory by another if need be."""

    results: Results
    runs: list[tuple[str, Results]]  # by the file's name
    run_of: dict[str, str]  # by case: the file's name

    @property
    def slug(self) -> str:
        device = str(self.results.machine["device"]).lower()
        return "".join(c if c.isalnum() else "-" for c in device)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    files = written(options.results)
    if options.check:
        stale = [
            name
            for name, content in files.items()
            if not (path := options.docs / name).exists()
            or path.read_text(encoding="utf-8") != content
        ]
        if stale:
            print(f"not up to date: {', '.join(stale)}; run: python -m benchmarks.page")
        return 1 if stale else 0
    for name, content in files.items():
        (options.docs / name).parent.mkdir(parents=True, exist_ok=True)
        (options.docs / name).write_text(content, encoding="utf-8")
        print(f"written: {options.docs / name}")
    return 0


def written(folder: Path) -> dict[str, str]:
    """The page and its pictures, by name in the documentation's folder."""
    runs, families, others, more = read(folder)
    files: dict[str, str] = {}
    parts = [HEAD]
    groups = grouped(runs)
    for group in groups:
        files |= {
            f"pictures/{group.slug}-{name}.svg": picture
            for name, picture in page_plot.pictures(group.results).items()
        }
        parts.append(_section(group))
    for name, found in families:
        parts.append(_family(name, found))
    for title, name, found, table in more:
        parts.append(_more(title, name, found["machine"], table))
    if not any(group.results.on_gpu for group in groups):
        parts.append(NO_GPU)
    if others:
        parts.append("## Other results\n\nNot in tables here:\n")
        parts.append("\n".join(f"- `benchmarks/results/{name}`" for name in others) + "\n")
    return {PAGE: "\n".join(parts), **files}


Found = dict[str, Any]


def read(
    folder: Path,
) -> tuple[
    list[tuple[str, Results]],
    list[tuple[str, Found]],
    list[str],
    list[tuple[str, str, Found, Table]],
]:
    """Runs of the benchmarks and of the family, the names of files of another kind, and those that
    are a table as they are: title, name, content, table."""
    runs, families, others, more = [], [], [], []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        content = json.loads(path.read_text(encoding="utf-8"))
        first = (content.get("rows") or [{}])[0] if isinstance(content, dict) else {}
        if "beyond" in first:
            rows = [large.Row(**row) for row in content["rows"]]
            more.append(("Large task batches", name, content, large.table_of(rows)))
        elif "processes" in first:
            steps = [scaling.Row(**row) for row in content["rows"]]
            more.append(("Many processes", name, content, scaling.table_of(steps)))
        elif "implementation" in first:
            runs.append((name, Results.load(path)))
        elif "variant" in first:
            families.append((name, content))
        else:
            others.append(name)
    return runs, families, others, more


def grouped(runs: Sequence[tuple[str, Results]]) -> list[Group]:
    """The runs by machine, those on GPUs first."""
    by_machine: dict[tuple[Any, ...], list[tuple[str, Results]]] = {}
    for name, results in sorted(runs, key=lambda run: run[1].machine["date"], reverse=True):
        machine = results.machine
        key = not results.on_gpu, machine["device"], machine["cpu"], machine["cores"]
        by_machine.setdefault(key, []).append((name, results))
    return [_group(found) for _, found in sorted(by_machine.items(), key=lambda item: item[0])]


def _group(runs: list[tuple[str, Results]]) -> Group:
    newest = runs[0][1]
    cases = list(dict.fromkeys(case for _, results in runs for case in results.cases))
    cases.sort(key=lambda case: CASE_NAMES.index(case) if case in CASE_NAMES else len(CASE_NAMES))
    rows, references, run_of = [], {}, {}
    for case in cases:
        name, results = next(
            (run for run in runs if any(row.times for row in run[1].of_case(case))),
            next(run for run in runs if case in run[1].cases),
        )
        run_of[case] = name
        references[case] = results.references.get(case, "nothing: none was run")
        rows += [_with_memory(row, runs) for row in results.of_case(case)]
    return Group(Results(newest.machine, references, rows), runs, run_of)


def _with_memory(row: Row, runs: Sequence[tuple[str, Results]]) -> Row:
    """With the peak memory of another run, if its own did not take it."""
    if row.peak_bytes is not None or row.status != "timed":
        return row
    for name, results in runs:
        other = results.find(row.case, row.implementation)
        if other is not None and other.peak_bytes is not None:
            reason = f"taken in {name}"
            return dataclasses.replace(row, peak_bytes=other.peak_bytes, peak_reason=reason)
    return row


def _section(group: Group) -> str:
    results = group.results
    machine = results.machine
    title = "GPU" if results.on_gpu else "CPU"
    out = [f"## {title}: {machine['device']}, {machine['cpu']}, {machine['cores']} cores\n"]
    for name, run in group.runs:
        cases = [case for case, of in group.run_of.items() if of == name]
        told = run.machine
        versions = ", ".join(f"{what} {version}" for what, version in told["versions"].items())
        out.append(
            f"- `{name}`: {_when(told)}, {told['torch_threads']} threads, "
            f"{told['torch_instructions']}, load before the run {told['load_before']}; "
            f"Python {told['python']}, {versions}. "
            + (f"Times below of {len(cases)} cases." if cases else "Times below: of none.")
        )
    out.append(
        "\n" + report.EXPLAINED + (report.ON_GPU if results.on_gpu else report.ON_CPU) + " What an "
        "implementation said when it could not run is of the commit that was measured.\n"
    )
    out.append("### The fastest of ours against the fastest peer\n")
    out.append(markdown(report.summary(results)))
    out.append(_lost(results))
    for name, what in page_plot.TITLES.items():
        out.append(f"![{what}](pictures/{group.slug}-{name}.svg)\n\n*{what}.*\n")
    out.append("### Peak memory\n")
    out.append(markdown(report.goals(results)))
    for case in results.cases:
        table = report.case_table(results, case)
        out.append(f"### {case}\n")
        out.append(f"{str(table.title).partition(': ')[2]}. From `{group.run_of[case]}`.\n")
        out.append(markdown(table))
        caption = str(table.caption).replace("\n", "  \n")
        out.append(f"{caption[:1].upper()}{caption[1:]}.\n")
    return "\n".join(out)


def _when(machine: dict[str, Any]) -> str:
    day = machine["date"][:16].replace("T", " ")
    return f"{day} UTC, commit `{machine['commit'][:10]}`"


def _lost(results: Results) -> str:
    """What is slower than a peer: whole cases, and single backends of ours."""
    cases, backends = [], []
    for case in results.cases:
        ours, peer = results.best(case, ours=True), results.best(case, ours=False)
        if ours is None or peer is None:
            continue
        if ours.median > peer.median:
            cases.append(
                f"- **{case}**: {ours.title} takes {text.seconds(ours.median)}, {peer.title} "
                f"{text.seconds(peer.median)}"
            )
        slower = [
            f"{row.title} {row.median / peer.median:.3g}x as long"
            for row in results.of_case(case)
            if row.ours and row.times and row is not ours and row.median > peer.median
        ]
        if slower:
            backends.append(f"- {case}, against {peer.title}: {'; '.join(slower)}")
    out = ["### Lost\n", "Cases where a peer is faster than everything of ours:\n"]
    out += cases or ["- none"]
    out += ["\nBackends of ours that a peer beats where another of ours does not lose:\n"]
    out += backends or ["- none"]
    return "\n".join(out) + "\n"


def _family(name: str, found: dict[str, Any]) -> str:
    machine = found["machine"]
    out = [
        f"## The MAML family: {machine['device']}, {machine['cpu']}, {machine['cores']} cores\n",
        f"From `{name}`: {_when(machine)}, load before the run {machine['load_before']}. All "
        "variants in one run, in turns, by backend `auto`. The loop is backend `reference`, "
        "foretold from a few tasks; the error is of the worst tensor in float64, against that "
        "loop.\n",
    ]
    rows = [family.Row(**row) for row in found["rows"]]
    for table in family.tables(rows):
        out.append(f"### {str(table.title).partition(':')[0]}: the family\n")
        out.append(markdown(table))
    return "\n".join(out)


def _more(title: str, name: str, machine: Found, table: Table) -> str:
    return "\n".join(
        [
            f"## {title}: {machine['device']}, {machine['cpu']}, {machine['cores']} cores\n",
            f"From `{name}`: {_when(machine)}, load before the run {machine['load_before']}.\n",
            markdown(table),
        ]
    )


def markdown(table: Table) -> str:
    """A table of the reports."""
    columns = [
        [str(column.header), *(str(cell) for cell in column.cells)] for column in table.columns
    ]
    head, *rows = zip(*columns, strict=True)
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = [_line(head), _line(marks), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
