"""`python -m benchmarks`: measure, print the tables, and keep the numbers and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import plot, report, session
from benchmarks.budget import Budget, in_order_of_need
from benchmarks.cases import CASES, choose
from benchmarks.registry import names
from benchmarks.results import Results
from benchmarks.timing import Settings

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str]) -> int:
    """Exit with 1 if one of ours was wrong or failed; being slow is no failure."""
    options = _parser().parse_args(arguments)
    budget = Budget(options.minutes)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if options.show:
        report.show(Results.load(options.show), console)
        return 0
    cases = [
        case
        for case in CASES
        if (case.quick or not options.quick) and (options.device == "cuda" or not case.gpu_only)
    ]
    try:
        pairs = session.pairs_of(
            choose([case.name for case in cases], options.case),
            choose(names(options.device), options.implementation),
        )
    except ValueError as error:
        console.print(error)
        return 2
    if options.minutes is not None:
        pairs = in_order_of_need(pairs)
    results, right = session.run(pairs, _settings(options, budget))
    report.show(results, console)
    options.out.mkdir(parents=True, exist_ok=True)
    device = results.machine["device"].lower().replace(" ", "-")
    path = options.out / f"{device}-{results.machine['date'][:10]}.json"
    results.save(path)
    plot.save(results, path.with_suffix(".png"))
    console.print(f"written: {path} and its .png")
    return 0 if right else 1


def _settings(options: argparse.Namespace, budget: Budget) -> Settings:
    short = {}
    if options.quick:
        short = {"seconds": 0.3, "limit_s": 3.0}
    elif options.minutes is not None:
        short = {"seconds": 0.5, "limit_s": 2.0}
    return Settings(options.device, peak=not options.no_memory, budget=budget, **short)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--case", action="append", default=[], metavar="PATTERN", help="cases, as in 'sinusoid*'"
    )
    parser.add_argument(
        "--implementation",
        action="append",
        default=[],
        metavar="PATTERN",
        help="implementations, as in 'jax'",
    )
    parser.add_argument("--quick", action="store_true", help="a few small cases, short rounds")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="end in so many: what matters most first, with short rounds, and the rest left out",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not take peak memory")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON and PNG go"
    )
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print the tables of an earlier run and stop"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
