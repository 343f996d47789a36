"""`python -m benchmarks.large`: the sinusoid's meta-step from a thousand tasks to a million.

For each number of tasks a process of its own: the gradient is held to that of backend "torch", to
1e-9 in float64, and has to have the same bits whatever `chunk_size` says; then it is timed, and the
peak of the memory is taken that a meta-step needs beside its data and results. Eager vmap, up to as
many tasks as it has memory for, shows what grows otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, memory
from benchmarks.cases import named
from benchmarks.check import EXACT, relative
from benchmarks.peers.vmap_grad import meta_loss
from maml_fast import MAML
from maml_fast.models import sinusoid_mlp
from maml_fast.tasks import Episodes, SinusoidTasks

TASKS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
MOST_BY_VMAP = 30_000
CASE = named("sinusoid-T1000-S1")  # but for the tasks
SHOTS, RATE = 10, CASE.network.inner_lr
CHUNKS = (1, 999, 4096)  # asked for, beside none
RESULTS = Path(__file__).resolve().parent / "results" / "large"
TITLES = {"ours": "maml_fast, backend cpu", "vmap": "eager vmap(grad)"}
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One implementation with so many tasks, on as many threads as torch has.

    median: seconds a meta-step. error: of the worst tensor, beside float64. results: bytes of what
    ours returns. beyond: bytes of the peak above data and results; None if the system tells none.
    """

    implementation: str
    tasks: int
    median: float
    error: float
    results: int
    beyond: int | None

    @property
    def microseconds(self) -> float:
        return self.median / self.tasks * 1e6


def measure(implementation: str, tasks: int, rounds: int) -> Row:
    """Check, then measure.

    Raises:
        ValueError: the gradient is wrong, or depends on the chunk.
    """
    model, data = sinusoid_mlp(seed=0), SinusoidTasks(seed=0).sample(tasks, SHOTS, SHOTS)
    maml = MAML(model, "mse", RATE)
    step = _ours(maml, data) if implementation == "ours" else _vmap(model, data)
    found = step()  # plans, and touches its memory
    if implementation == "ours":
        _check_chunks(maml, data, found)
    error = _error(model, data, found)
    times = [_timed(step) for _ in range(rounds)]
    with torch.no_grad():
        out = maml(*data)
    kept = (out.task_losses, out.support_losses, out.query_outputs)
    results = sum(tensor.nbytes for tensor in kept) if implementation == "ours" else 0
    del out, kept
    peak = memory.resident(step).bytes
    beyond = None if peak is None else max(0, peak - results)
    cpu = maml.plan(data.support_x, data.query_x).cpu
    if implementation == "ours" and cpu is not None and beyond is not None:
        beyond += cpu.arena_bytes * torch.get_num_threads()  # kept from call to call
    return Row(implementation, tasks, statistics.median(times), error, results, beyond)


def _ours(maml: MAML, data: Episodes) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        maml.zero_grad(set_to_none=True)
        maml(*data).loss.backward()
        return {n: p.grad for n, p in maml.model.named_parameters() if p.grad is not None}

    return step


def _vmap(model: nn.Module, data: Episodes) -> Callable[[], dict[str, Tensor]]:
    theta, mean_loss = dict(model.named_parameters()), meta_loss(CASE, model)

    def step() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        mean_loss(theta, *data).backward()
        return {name: p.grad for name, p in theta.items() if p.grad is not None}

    return step


def _check_chunks(maml: MAML, data: Episodes, wanted: dict[str, Tensor]) -> None:
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    for chunk_size in CHUNKS:
        maml.chunk_size = chunk_size
        for name, gradient in _ours(maml, data)().items():
            if not torch.equal(gradient, wanted[name]):
                raise ValueError(f"with chunk_size {chunk_size} the gradient of {name} is another")
    maml.chunk_size = None


def _error(model: nn.Module, data: Episodes, found: dict[str, Tensor]) -> float:
    """Of the float32 gradient, among so many rows some of which lie within rounding of a ReLU's
    kink; ours has to be exact in float64."""
    model, double = copy.deepcopy(model).double(), Episodes(*(part.double() for part in data))
    right, ours = (
        {n: g.clone() for n, g in _ours(MAML(model, "mse", RATE, backend=name), double)().items()}
        for name in ("torch", "auto")
    )
    largest = max(tensor.norm().item() for tensor in right.values())

    def worst(gradients: dict[str, Tensor], bound: float) -> float:
        error = max(relative(gradients[name], tensor, largest) for name, tensor in right.items())
        if not error <= bound:
            raise ValueError(f"the gradient of {len(data.support_x)} tasks is off by {error:.1e}")
        return error

    worst(ours, EXACT)
    return worst(found, CASE.network.loose)


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_apart(implementation: str, tasks: int, rounds: int) -> Row:
    """The same in a process of its own, whose allocator gives memory back."""
    command = [sys.executable, "-m", "benchmarks.large", "--only", implementation]
    command += ["--tasks", str(tasks), "--rounds", str(rounds)]
    environment = {**os.environ, **memory.ENVIRONMENT}
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        raise ValueError(f"{TITLES[implementation]} with {tasks} tasks: {reason}")
    return Row(**json.loads(child.stdout.splitlines()[-1]))


def table_of(rows: list[Row]) -> Table:
    table = Table("")
    for name in ("tasks", "time", "us a task", "beside data and results", "worst error"):
        table.add_column(name, justify="right")
    for row in rows:
        beyond = "-" if row.beyond is None else f"{row.beyond / 1e6:.1f} MB"
        table.add_row(
            TITLES[row.implementation],
            f"{row.tasks:,}",
            f"{row.median * 1e3:.1f} ms",
            f"{row.microseconds:.2f}",
            beyond,
            f"{row.error:.0e}",
        )
    return table


def plot(rows: list[Row], described: dict[str, object], path: Path) -> None:
    """Time a task, and memory, against the number of tasks."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for implementation, colour in (("vmap", "#8a8a8a"), ("ours", "#1f5fa8")):
        own = [row for row in rows if row.implementation == implementation]
        tasks = [row.tasks for row in own]
        label = TITLES[implementation]
        left.plot(tasks, [row.microseconds for row in own], "o-", color=colour, label=label)
        known = [row for row in own if row.beyond is not None]
        megabytes = [max((row.beyond or 0) / 1e6, 0.1) for row in known]
        right.plot([row.tasks for row in known], megabytes, "o-", color=colour)
    left.set_ylabel("microseconds a task")
    left.set_ylim(bottom=0)
    left.legend()
    right.set_ylabel("MB beside data and results")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("tasks in one meta-step")
        axis.grid(color="#eeeeee")
    figure.suptitle(
        f"Sinusoid, one inner step, loss and gradient. {described['cpu']}, {described['cores']} "
        f"cores, {str(described['date'])[:10]}"
    )
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    """Exit with 1 if a gradient was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(TITLES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(asdict(measure(options.only, options.tasks[0], options.rounds))))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    described = machine.describe("cpu")
    try:
        rows = [
            measure_apart(implementation, tasks, options.rounds)
            for implementation in TITLES
            for tasks in options.tasks
            if implementation == "ours" or tasks <= MOST_BY_VMAP
        ]
    except ValueError as error:
        console.print(error)
        return 1
    console.print(table_of(rows))
    path = machine.save(options.out, described, rows=[asdict(row) for row in rows])
    plot(rows, described, path.with_suffix(".png"))
    console.print(f"written: {path} and {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
