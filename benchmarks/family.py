"""`python -m benchmarks.family`: what the variants of MAML cost beside MAML itself, in one run.

Every variant is first held to backend "reference", a plain loop, in float64 on some of the tasks.
Then all are timed in turns, round after round, so that a slow minute of the machine is everyone's;
that loop is timed on the same tasks that it is compared on, and foretold from there.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.cases import named
from benchmarks.check import EXACT, broken, relative, worst
from benchmarks.problem import Problem, load
from benchmarks.text import seconds
from maml_fast import MAML, inner, presets

CASES = ("omniglot-fc-T512-S1", "omniglot-fc-T128-S5", "conv4-T8-S5")
FEW_TASKS = 8  # that the loop runs, and of convolutional networks fewer
FEW_IMAGES = 2
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RESULTS = Path(__file__).resolve().parent / "results" / "family"

Weights = dict[str, Tensor]  # of rows, by the argument's name


@dataclass
class Row:
    """One variant on one case, in seconds a meta-step; `loop` is foretold from a few tasks."""

    case: str
    variant: str
    backend: str
    why: str
    error: float  # in float64, the worst tensor's
    median: float
    times_maml: float
    loop: float


Make = Callable[[nn.Module, float, int], MAML]  # of a model, inner rate and inner steps


def _maml_with(**options: Any) -> Make:
    return lambda model, rate, steps: MAML(model, "cross_entropy", rate, steps, **options)


def _preset(make: Callable[..., MAML]) -> Make:
    return lambda model, rate, steps: make(
        model, loss="cross_entropy", inner_lr=rate, inner_steps=steps
    )


def _above_body(make: Callable[..., MAML]) -> Make:
    """Of a preset that asks for the head."""
    return lambda model, rate, steps: make(
        model, _head(model), loss="cross_entropy", inner_lr=rate, inner_steps=steps
    )


def _head(model: nn.Module) -> list[str]:
    last = [name for name, _ in model.named_parameters()][-1]
    return [f"{last.rpartition('.')[0]}.*"]


def _mamlpp(model: nn.Module, rate: float, steps: int) -> MAML:
    """Norms with values for each step, if there are norms; losses of all steps, as in its first
    epoch."""
    norms = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for own, p in module.named_parameters()
        if p.requires_grad
    ]
    maml = presets.mamlpp(model, rate, steps, norms, loss="cross_entropy")
    presets.mamlpp_epoch(maml, 0)
    return maml


def _with_learned_rates(model: nn.Module, rate: float, steps: int) -> MAML:
    names = [name for name, _ in model.named_parameters()]
    rates = {name: nn.Parameter(torch.full((steps,), rate)) for name in names}
    return MAML(model, "cross_entropy", rates, steps)


def _with_losses_of_all_steps(model: nn.Module, rate: float, steps: int) -> MAML:
    weights = [1 / steps] * (steps + 1)
    return MAML(model, "cross_entropy", rate, steps, step_weights=weights)


VARIANTS: dict[str, Make] = {
    "MAML": _maml_with(),
    "first order": _preset(presets.fomaml),
    "ANIL": _above_body(presets.anil),
    "BOIL": _above_body(presets.boil),
    "masked rows": _maml_with(),
    "momentum": _maml_with(inner_optimizer=inner.SGD(momentum=0.9)),
    "weight decay": _maml_with(inner_optimizer=inner.SGD(weight_decay=0.01)),
    "learned rates": _with_learned_rates,
    "losses of all steps": _with_losses_of_all_steps,
    "MAML++": _mamlpp,
    "Meta-SGD": _preset(presets.meta_sgd),
    "Reptile": _preset(presets.reptile),
}


def weights_of(variant: str, problem: Problem) -> Weights:
    """Of masked rows: every other task has one support row and one query row less."""
    if variant != "masked rows":
        return {}
    found = {}
    for name in ("support", "query"):
        x = getattr(problem.episodes, f"{name}_x")
        weight = x.new_ones(x.shape[:2])
        weight[::2, -1] = 0
        found[f"{name}_weight"] = weight
    return found


def step(maml: MAML, problem: Problem, weights: Weights) -> dict[str, Tensor]:
    """Gradients by name, and the loss."""
    maml.zero_grad(set_to_none=True)
    loss = maml(*problem.episodes, **weights).loss
    loss.backward()
    found = {name: p.grad for name, p in maml.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


def error_of(variant: str, problem: Problem) -> float:
    """The worst tensor's distance from the loop, as a part of its norm, in float64.

    Raises:
        ValueError: it is beyond EXACT.
    """
    double = _few(problem).double()
    found, wanted = (
        step(_maml(variant, double, backend).double(), double, weights_of(variant, double))
        for backend in ("auto", "reference")
    )
    largest = max(tensor.norm().item() for tensor in wanted.values())
    if found.keys() != wanted.keys():
        raise ValueError(f"{variant}: gradients of {sorted(found)}, wanted of {sorted(wanted)}")
    errors = {name: relative(found[name], tensor, largest) for name, tensor in wanted.items()}
    if wrong := broken(errors, dict.fromkeys(errors, EXACT)):
        raise ValueError(f"{variant}: {wrong}")
    return worst(errors)[1]


def _few(problem: Problem) -> Problem:
    return problem.first(FEW_IMAGES if len(problem.case.network.row) > 1 else FEW_TASKS)


def _maml(variant: str, problem: Problem, backend: str = "auto") -> MAML:
    case, model = problem.case, copy.deepcopy(problem.model)
    maml = VARIANTS[variant](model, case.network.inner_lr, case.S)
    maml.backend = backend
    return maml


def measure(case_name: str, rounds: int) -> list[Row]:
    """All variants on one case; a round runs each of them once."""
    problem = load(named(case_name), torch.device("cpu"))
    mamls = {variant: _maml(variant, problem) for variant in VARIANTS}
    errors = {variant: error_of(variant, problem) for variant in mamls}
    times: dict[str, list[float]] = {variant: [] for variant in mamls}
    weights = {variant: weights_of(variant, problem) for variant in mamls}
    for variant, maml in mamls.items():
        step(maml, problem, weights[variant])  # plans, and touches its memory
    for seed in range(rounds):
        order = list(mamls)
        random.Random(seed).shuffle(order)  # what runs behind one that fills the caches finds none
        for variant in order:
            times[variant].append(_timed(mamls[variant], problem, weights[variant]))
    medians = {variant: statistics.median(found) for variant, found in times.items()}
    few = _few(problem)
    rows = []
    for variant, maml in mamls.items():
        loop, few_weights = _maml(variant, problem, "reference"), weights_of(variant, few)
        a_task = min(_timed(loop, few, few_weights) for _ in range(2)) / few.episodes.tasks
        plan = maml.plan(problem.episodes.support_x, problem.episodes.query_x)
        rows.append(
            Row(
                case_name,
                variant,
                plan.backend,
                plan.reason,
                errors[variant],
                medians[variant],
                medians[variant] / medians["MAML"],
                a_task * problem.case.T,
            )
        )
    return rows


def _timed(maml: MAML, problem: Problem, weights: Weights) -> float:
    start = time.perf_counter()
    step(maml, problem, weights)
    return time.perf_counter() - start


def show(rows: list[Row], console: Console) -> None:
    for table in tables(rows):
        console.print(table)


def tables(rows: list[Row]) -> list[Table]:
    """A table a case."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        table = Table(title=named(case).title)
        for name in ("variant", "backend", "time", "x MAML", "loop, foretold", "float64 error"):
            table.add_column(name, justify="left" if name in ("variant", "backend") else "right")
        for row in rows:
            if row.case == case:
                table.add_row(
                    row.variant,
                    row.backend,
                    seconds(row.median),
                    f"{row.times_maml:.2f}",
                    seconds(row.loop),
                    f"{row.error:.0e}",
                )
        found.append(table)
    return found


def main(arguments: list[str]) -> int:
    """Exit with 1 if a variant was wrong; being slow is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    described = machine.describe("cpu")
    rows: list[Row] = []
    try:
        for case in CASES:
            rows += measure(case, options.rounds)
    except ValueError as error:
        console.print(error)
        return 1
    show(rows, console)
    path = machine.save(options.out, described, rows=[asdict(row) for row in rows])
    console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
