"""What the tests on a GPU share: networks and sizes at the edges, and a meta-step beside its graph.

    python -m tests.gpu_cases fused|layers|images   one small meta-step, for compute-sanitizer
    python -m tests.gpu_cases captured KIND         one in the caller's own capture, which must fail

T tasks, N support rows, M query rows, S inner steps, F features of queries and keys, O of values.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import os
import sys
from types import SimpleNamespace

import torch
from torch import nn

from maml_fast import MAML, meta_step, triton_features, triton_plan
from maml_fast.problem import TaskBatch
from tests.networks import Draw, by_graph

# torch before 2.10 asks for it in deterministic mode
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
BOUND = 1e-6
RATE = 0.1
# Of the largest error: at least that of a lesser precision, or nothing was rounded; at most
LESS_EXACT = {"tf32": (1e-5, 2e-2), "bf16": (1e-4, 1e-1)}
PRECISIONS = ("tf32x3", "ieee", *LESS_EXACT)
# Widths, N, M, S: one tile of all; several each way, none of them full; ones, and tiles of 32 rows
NETWORKS = {
    "small": ((3, 17, 9, 4), 5, 7, 2),
    "wide": ((33, 70, 17, 40), 20, 33, 2),
    "tall": ((1, 128, 9, 1), 70, 66, 1),
}
# Each compiles a kernel with all tiles: seconds
FUSED = [(n, p) for n in NETWORKS for p in PRECISIONS if p not in LESS_EXACT or n == "wide"]
KINDS = {  # by which kernels, and in which form
    "fused": ((3, 9, 2), "auto"),
    "factored": ((3, 9, 2), "factored"),
    "dense": ((3, 130, 2), "dense"),
    "images": ((30, 2), "auto"),  # numbers of an image, and features of a prediction
}
IMAGE = 1, 5, 6


def on_device(batch, dtype=torch.float32):
    return TaskBatch(
        *(t.to(DEVICE, dtype if t.is_floating_point() else t.dtype) for t in batch[:4])
    )


def error_of(found, wanted):
    """||found - wanted|| / ||wanted||"""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double().to(found.device)
    return ((found - wanted).norm() / wanted.norm()).item()


class Fused:
    """One network with data, and its meta-step in float64; whatever the tiles and the precision."""

    def __init__(self, name, loss="mse"):
        sizes, rows, query_rows, self.steps = NETWORKS[name]
        draw, tasks = Draw(seed=0), 4
        model, batch = draw.mlp(sizes), draw.batch(loss, tasks, rows, query_rows, sizes)
        exact = MAML(model, loss, RATE, self.steps, backend="reference")(*batch)
        gradients = by_graph(model, batch, loss, RATE, self.steps)[1]
        single = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch[:4]))
        plain = by_graph(copy.deepcopy(model).float(), single, loss, RATE, self.steps)[1]
        self.bounds = {n: max(BOUND, 2 * error_of(plain[n], g)) for n, g in gradients.items()}
        self.wanted = {n: g * tasks for n, g in gradients.items()}
        for name in ("task_losses", "support_losses", "query_outputs"):
            self.wanted[name] = getattr(exact, name).detach()
            self.bounds[name] = 5e-6  # sums of few numbers, which cancel as they like
        self.batch = on_device(batch)
        own = copy.deepcopy(model).to(DEVICE, torch.float32)
        self.maml = MAML(own, loss, RATE, self.steps, backend="triton", cuda_graphs=False)
        counts = SimpleNamespace(rows=rows, query_rows=query_rows)
        self.tiles = triton_plan.candidates(counts)

    def errors(self, tiles, precision):
        """By tensor, of a launch with these tiles."""
        planned, problem = self.maml._prepare(self.batch, self.steps)
        assert planned.plan.triton.kernels == "fused"
        triton = dataclasses.replace(planned.plan.triton, tiles=tiles, precision=precision)
        plan = dataclasses.replace(planned.plan, triton=triton, programs={})
        with torch.no_grad():
            outcome = meta_step.run(plan, problem, self.batch, True)
        found = dict(outcome.gradients)
        found |= {n: getattr(outcome, n) for n in self.wanted if n not in found}
        return {name: error_of(found[name], tensor) for name, tensor in self.wanted.items()}


fused = functools.cache(Fused)


def attend_shapes():
    """T, N, M, rows, F, O of launches, at least one for each tiling that `default_config` gives.

    Its rule asks for rows, for O, for the keys, and whether F and O are multiples of 16; here the
    adjoint has M + 2 N keys.
    """
    if not triton_features.installed():
        return []
    from maml_fast.kernels.attend import Sizes, default_config

    found = {}
    for rows, (n, m), f, o in itertools.product(
        (5, 20, 40),
        ((2, 3), (13, 14)),
        (20, 48),
        (1, 9, 16, 18, 32, 33, 64, 70, 128, 130, 256, 300),
    ):
        config = default_config(Sizes(2, rows, f, o, m + 2 * n))
        found.setdefault((config, f % 16 == o % 16 == 0), (2, n, m, rows, f, o))
    return list(found.values())


class Twins:
    """A meta-step that may become a graph, and the same one that may not."""

    def __init__(self, kind, rate=RATE, steps=2, loss="mse", **options):
        sizes, fast_weights = KINDS[kind]
        self.kind, self.draw, self.sizes, self.loss = kind, Draw(seed=1), sizes, loss
        self.model = self.network().to(DEVICE, torch.float32)
        options |= dict(backend="triton", fast_weights=fast_weights)
        self.graphed, self.plain = (
            MAML(self.model, loss, rate, steps, cuda_graphs=graphs, **options)
            for graphs in (True, False)
        )

    def network(self):
        if self.kind != "images":
            return self.draw.mlp(self.sizes)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 17, 3, stride=2, padding=1),
            nn.GroupNorm(1, 17),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(17 * 2, self.sizes[-1]),
        )
        return self.draw.initialise(model.double())

    def batch(self, tasks=5, rows=4, query_rows=3):
        batch = self.draw.batch(self.loss, tasks, rows, query_rows, self.sizes)
        if self.kind == "images":
            x, q = (t.unflatten(2, IMAGE) for t in (batch.support_x, batch.query_x))
            batch = batch._replace(support_x=x, query_x=q)
        return on_device(batch)

    def new_parameters(self):
        """Another set, as tensors; the model does not have it yet."""
        other = self.network().to(DEVICE, torch.float32)
        return dict(other.named_parameters())

    def put(self, parameters):
        for name, parameter in parameters.items():
            module, _, own = name.rpartition(".")
            setattr(self.model.get_submodule(module), own, parameter)

    def check(self, batch=None):
        """Both of them on the same data; returns the result and the gradients of the graphed."""
        batch = batch or self.batch()
        plan = self.graphed.plan(batch.support_x, batch.query_x)
        assert plan.triton.kernels == ("fused" if self.kind == "fused" else "layers")
        result, gradients = self.graphed.value_and_grad(*batch)
        found, wanted = (vars(result) | gradients, self.values_of_plain(batch))
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert error_of(found[name], tensor) <= BOUND, name
        return result, gradients

    def values_of_plain(self, batch):
        result, gradients = self.plain.value_and_grad(*batch)
        return vars(result) | gradients

    def graphs(self):
        """How many there are."""
        plans = [planned.plan for planned in self.graphed._planner._plans.values()]
        steps = [step for plan in plans for step in plan.programs.values()]
        return sum(len(step.graphs._captured) for step in steps)


def needs_memory(gigabytes):
    """Why a test of so much memory cannot run here; empty if it can."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    return f"needs {gigabytes} GB of free memory, there are {free:.0f}" * (free < gigabytes)


def main(what, kind="fused"):
    """As a program: small, and in few launches."""
    kinds = {"layers": "factored", "images": "images"}
    twins = Twins(kinds.get(what, kind))
    batch = twins.batch(tasks=3)
    if what != "captured":
        twins.values_of_plain(batch)
        torch.cuda.synchronize()
        return
    for _ in range(3):
        twins.check(batch)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        twins.graphed.value_and_grad(*batch)


if __name__ == "__main__":
    from maml_fast.backends import tuning

    tuning.quickest = lambda key, candidates, run: candidates[0]
    main(*sys.argv[1:])
