"""`python -m benchmarks.scaling`: a step of training by 1, 2 and 4 processes of one thread each,
beside what it should take on paper (see `scaling_model`).

torchrun starts the processes, which run the steps of a training run as the command line does. The
constants on paper are measured too: parts of a step in one process, collectives in two. The sum of
the ranks' gradients is held to that of one process before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import machine
from benchmarks.cases import Case, named
from benchmarks.scaling_model import Network, Step, line
from benchmarks.text import seconds
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.ranks import Ranks, joined
from maml_fast.run import Run
from maml_fast.tasks import ImageSet, ImageTasks, SinusoidTasks

# All but the last are bound by computing, those of many tasks beside any collective.
LARGER = {
    "omniglot-fc-T2048-S1": replace(named("omniglot-fc-T512-S1"), T=2048),
    "conv4-T128-S1": replace(named("conv4-T32-S1"), T=128),
    "sinusoid-T100000-S1": replace(named("sinusoid-T10000-S1"), T=100_000),
}
CASES = (
    *("omniglot-fc-T512-S1", "conv4-T32-S1", "sinusoid-T10000-S1"),
    *LARGER,
    "sinusoid-T25-S1",
)
PROCESSES = (1, 2, 4)
SEED = 20170309
WAYS, CLASSES, IMAGES = 5, 200, 20
WRONG = 1e-5  # relative, of the gradient
LENGTHS = (4, 1_000, 100_000, 1_000_000)  # of the collectives that are timed
RESULTS = Path(__file__).resolve().parent / "results" / "scaling"
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """A case by so many processes: seconds a step, measured and on paper, and how many times
    faster than one process."""

    case: str
    processes: int
    seconds: float
    predicted: float
    speedup: float
    predicted_speedup: float
    error: float  # of the gradient, relative to that of one process


def make_run(case: Case, ranks: Ranks) -> Run:
    """A run on tasks of the case's sizes: sinusoids, or classes of random pictures."""
    network = case.network
    regression = network.loss == "mse"
    ways = 1 if regression else WAYS
    config = SinusoidConfig(  # of which only what every run has is looked at
        tasks=case.T,
        shots=case.N // ways,
        query_shots=case.M // ways,
        inner_lr=network.inner_lr,
        inner_steps=case.S,
        output=Path(),
    )
    if regression:
        return Run(config, network.build(), network.loss, SinusoidTasks(SEED), ranks)
    model: nn.Module = network.build()
    if len(network.row) == 1:
        model = nn.Sequential(nn.Flatten(), *network.build())
    tasks = ImageTasks(_pictures(), WAYS, rotations=True, seed=SEED)
    return Run(config, model, network.loss, tasks, ranks)


def _pictures() -> ImageSet:
    generator = torch.Generator().manual_seed(SEED)
    count = CLASSES * IMAGES
    pixels = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    starts = torch.arange(0, count + 1, IMAGES)
    return ImageSet(pixels, starts, tuple(f"class{c}" for c in range(CLASSES)), invert=False)


def worker(cases: Sequence[str], budget: float, folder: Path) -> None:
    """What each process does: for each case a gradient, the times of steps and, of the only
    process, those of their parts; of two, the times of collectives. The first writes them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined("cpu") as ranks:
        for name in cases:
            run = make_run(LARGER.get(name) or named(name), ranks)
            run.step()
            if ranks.first:
                gradient = run.parameters.gradient[: run.parameters.flat.numel()].clone()
                torch.save(gradient, folder / f"{name}-{ranks.count}.pt")
            found[name] = {"seconds": timed(run.step, budget, ranks)}
            if ranks.count == 1:
                found[name]["step"] = asdict(parts(run, found[name]["seconds"], budget))
        if ranks.count > 1:
            found["collectives"] = collectives(ranks, budget)
        if ranks.first:
            (folder / f"{ranks.count}.json").write_text(json.dumps(found))


def timed(function: Callable[[], Any], budget: float, ranks: Ranks | None = None) -> float:
    """Median seconds of a call, of so many calls as fit into the budget, 3 at least; of several
    ranks the first counts them."""
    start = time.perf_counter()
    function()
    once = time.perf_counter() - start
    ranks = ranks or Ranks()
    calls = ranks.of_first(lambda: max(3, min(2_000, round(budget / once))))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parts(run: Run, whole: float, budget: float) -> Step:
    """What a step of one process is made of."""
    config = run.config

    def sample(own: slice) -> Any:
        return run.tasks.sample(config.tasks, config.shots, config.query_shots, own)

    def compute(count: int) -> None:
        episodes = sample(slice(0, count))
        run.parameters.zero_grad()
        run.maml(*episodes).loss.backward()

    draw = timed(lambda: sample(slice(0, 0)), budget / 4)
    sizes = sorted({max(1, config.tasks // part) for part in (4, 2, 1)})
    points = []
    for size in sizes:
        compute(size)  # plans
        points.append((size, max(timed(lambda n=size: compute(n), budget / 4) - draw, 0.0)))  # type: ignore[misc]
    fixed, task = line(points)
    rest = max(whole - draw - points[-1][1], 0.0)
    return Step(config.tasks, run.parameters.flat.numel(), draw, fixed, task, rest)


def collectives(ranks: Ranks, budget: float) -> list[tuple[int, float]]:
    """(numbers, seconds) of sums over the ranks."""
    found = []
    for length in LENGTHS:
        numbers = torch.zeros(length)
        found.append((length, timed(lambda x=numbers: dist.all_reduce(x), budget / 4, ranks)))  # type: ignore[misc]
    return found


def launch(processes: int, cases: Sequence[str], budget: float, folder: Path) -> dict[str, Any]:
    """What the first of so many processes found.

    Raises:
        RuntimeError: torchrun failed; with what it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.scaling", "--worker", str(folder), "--seconds", str(budget)]
    command += [word for case in cases for word in ("--case", case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads((folder / f"{processes}.json").read_text())
    return found


def measure(
    cases: Sequence[str], processes: Sequence[int], budget: float, rounds: int, cores: int
) -> tuple[list[Row], dict[str, Any], dict[str, Step]]:
    """Rows, the constants of the network, and the parts of each case's step in one process.

    Raises:
        ValueError: a gradient of several processes is not that of one.
    """
    if processes[0] != 1 or 2 not in processes:
        raise ValueError(f"processes is {list(processes)}; wanted are 1, then 2, and others")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In turns, so that a slow minute of the machine is everyone's.
        found = [
            {count: launch(count, cases, budget, folder) for count in processes}
            for _ in range(rounds)
        ]
        errors = {
            (case, count): _error(folder, case, count) for case in cases for count in processes
        }
    network = _network(found)
    steps = {case: _step(found, case) for case in cases}
    rows = []
    for case in cases:
        took = {n: statistics.median(one[n][case]["seconds"] for one in found) for n in processes}
        paper = {n: steps[case].seconds(n, network, cores) for n in processes}
        for n in processes:
            speedup, on_paper = took[1] / took[n], paper[1] / paper[n]
            error = errors[case, n]
            rows.append(Row(case, n, took[n], paper[n], speedup, on_paper, error))
    return rows, asdict(network), steps


def _error(folder: Path, case: str, count: int) -> float:
    found, wanted = (torch.load(folder / f"{case}-{n}.pt").double() for n in (count, 1))
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= WRONG:
        raise ValueError(f"{case}: the gradient of {count} processes is wrong by {error:.0e}")
    return error


def _network(found: Sequence[dict[int, dict[str, Any]]]) -> Network:
    """From the medians over rounds, by length."""
    rounds = [dict(map(tuple, one[2]["collectives"])) for one in found]
    times = [(n, statistics.median(one[n] for one in rounds)) for n in LENGTHS]
    return Network.fitted(times, 2)


def _step(found: Sequence[dict[int, dict[str, Any]]], case: str) -> Step:
    every = [one[1][case]["step"] for one in found]
    median = {key: statistics.median(one[key] for one in every) for key in every[0]}
    whole = {"tasks": int(median["tasks"]), "parameters": int(median["parameters"])}
    return Step(**{**median, **whole})


def table_of(rows: list[Row]) -> Table:
    table = Table(title="seconds a step, by processes of one thread each")
    for name in ("case", "processes", "measured", "on paper", "x one", "x one, on paper", "error"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(
            row.case,
            str(row.processes),
            seconds(row.seconds),
            seconds(row.predicted),
            f"{row.speedup:.2f}",
            f"{row.predicted_speedup:.2f}",
            f"{row.error:.0e}",
        )
    return table


def main(arguments: list[str]) -> int:
    """Exit with 1 if a gradient was wrong; being slow is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="all if left out")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, metavar="N")
    parser.add_argument("--seconds", type=float, default=4.0, help="of steps, a case and launch")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = options.case or CASES
    if options.worker:
        worker(cases, options.seconds, options.worker)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    described = machine.describe("cpu")
    try:
        rows, network, steps = measure(
            cases, options.processes, options.seconds, options.rounds, described["cores"]
        )
    except ValueError as error:
        console.print(error)
        return 1
    console.print(table_of(rows))
    path = machine.save(
        options.out,
        described,
        network=network,
        steps={case: asdict(step) for case, step in steps.items()},
        rows=[asdict(row) for row in rows],
    )
    console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
