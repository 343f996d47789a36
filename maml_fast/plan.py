"""What would run: the backend, each layer's operation and form of weights, FLOPs and bytes.

T tasks, N support rows, M query rows, S inner steps, I/O features of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from maml_fast import cpu_features
from maml_fast.errors import UnavailableBackendError, UnsupportedModelError
from maml_fast.losses import LOSSES
from maml_fast.ops import Features, Linear, MergeRows, SplitRows
from maml_fast.problem import Loss
from maml_fast.trace import Link, batching_refusals, trace

BACKENDS = ("auto", "triton", "cpu", "torch", "functional", "reference")
FAST_WEIGHTS = ("auto", "factored", "dense")

# The cost model's machine. One task's dense weights, or its Gram blocks, are multiplied at these
# shares of the speed of one large product over all tasks' rows, and a byte of per-task weights
# costs as much as this many FLOPs of the large product. Fitted to eager torch on two AVX-512 cores:
# over 60 cases of 16 to 256 features, 1 to 40 rows, 1 and 5 steps, the form chosen was on average
# 0.3% slower than the better one.
DENSE_SHARE = 0.2
GRAM_SHARE = 0.07
FLOPS_PER_BYTE = 4.0
# What a pass may keep at once; more tasks than fit are taken in several passes. On a CPU small
# passes stay near the cache; functional keeps the parameters of every step, and bounds them.
CPU_PASS_BYTES = {"torch": 12 << 20, "functional": 32 << 20}
GPU_PASS_SHARE = 0.25


@dataclass(frozen=True)
class Shapes:
    """What a plan depends on beside the model: one task's rows, and how many tasks."""

    tasks: int
    support: tuple[int, ...]  # [N, *features]
    query: tuple[int, ...]  # [M, *features]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of per-task weights of one task's whole meta-step in one layer."""

    shared_flops: int  # in large products over all tasks' rows
    small_flops: int  # in products of one task's matrices
    small_share: float  # of the large product's speed that those reach
    weight_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.shared_flops + self.small_flops

    @property
    def time(self) -> float:
        """In FLOPs of the large product."""
        small = self.small_flops / self.small_share
        return self.shared_flops + small + self.weight_bytes * FLOPS_PER_BYTE


@dataclass(frozen=True)
class LayerPlan:
    """One operation of the chain, in order."""

    link: Link
    features: Features  # of a row that enters
    positions: int  # rows of the operation for a row of the data
    prelude: bool  # runs once, before anything that adapts
    form: str  # "factored", "dense", "shared", or "" for operations without weights
    cost: Cost | None = None


@dataclass
class Plan:
    """What would run for data of these shapes. `print(plan)` shows it."""

    backend: str
    reason: str
    shapes: Shapes
    inner_steps: int
    output: tuple[int, ...]  # [M, *features] of a prediction
    chunk_size: int
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of linear layers, all tasks, one meta-step; 0 if the model is not planned."""
        return self.shapes.tasks * sum(layer.cost.flops for layer in self.layers if layer.cost)

    def __str__(self) -> str:
        shapes = self.shapes
        lines = [
            f"backend {self.backend}: {self.reason}",
            f"{shapes.tasks} tasks, {self.chunk_size} a pass; {shapes.support[0]} support and "
            f"{shapes.query[0]} query rows; {self.inner_steps} inner steps; "
            f"{str(shapes.dtype).removeprefix('torch.')} on {shapes.device}",
        ]
        if self.layers:
            rows = [("layer", "operation", "row", "weights", "MFLOP a task", "KiB a task")]
            for layer in self.layers:
                cost = layer.cost
                rows.append(
                    (
                        layer.link.name,
                        str(layer.link.op),
                        str(list(layer.features)),
                        ("once, " if layer.prelude else "") + (layer.form or "none"),
                        f"{cost.flops / 1e6:.3f}" if cost else "",
                        f"{cost.weight_bytes / 1024:.1f}" if cost else "",
                    )
                )
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
            lines.append(f"{self.flops / 1e9:.3f} GFLOP a meta-step in linear layers")
        if self.refusals:
            lines.append("cannot be planned:")
            lines += [f"  {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    loss: Loss,
    backend: str,
    fast_weights: str,
    chunk_size: int | None,
    shapes: Shapes,
    inner_steps: int,
    first_order: bool,
    output: tuple[int, ...],
    adapting: Collection[str],
) -> Plan:
    """Choose the backend and each layer's form.

    Raises UnavailableBackendError for a backend that this installation lacks, and
    UnsupportedModelError where an explicit backend cannot run the model, naming layer and reason.
    """
    if backend == "cpu":
        raise UnavailableBackendError(
            cpu_features.why_missing()
            if not cpu_features.available()
            else "backend 'cpu' has no meta-step in this version; take 'torch'"
        )
    if backend == "triton":
        raise UnavailableBackendError("backend 'triton' is not in this version; take 'torch'")
    layers: list[LayerPlan] = []
    refusals: list[str] = []
    if backend in ("auto", "torch"):
        layers, refusals = _plan_layers(
            model, loss, fast_weights, shapes, inner_steps, first_order, adapting
        )
        if backend == "torch" and refusals:
            raise UnsupportedModelError(
                "backend 'torch' cannot run this model: " + "; ".join(refusals)
            )
    if backend == "auto":
        backend = "functional" if refusals else "torch"
        reason = (
            "the fastest that runs this model; torch cannot (below)"
            if refusals
            else "the fastest that runs this model"
        )
    else:
        reason = "as asked"
    if backend != "torch":
        layers = []
        if fast_weights != "auto":
            raise UnsupportedModelError(
                f"fast_weights={fast_weights!r} is a choice of the planned backends; backend "
                f"{backend!r} has none to make" + (": " + "; ".join(refusals) if refusals else "")
            )
    if backend == "functional" and (unbatched := batching_refusals(model)):
        raise UnsupportedModelError(
            f"backend 'functional' cannot run this model: {'; '.join(unbatched)}; or take "
            "backend='reference', which runs any module one task at a time"
        )
    if chunk_size is None:
        chunk_size = _chunk_size(model, backend, layers, shapes, inner_steps)
    return Plan(
        backend,
        reason,
        shapes,
        inner_steps,
        output,
        min(chunk_size, shapes.tasks),
        layers,
        refusals,
    )


def _plan_layers(
    model: nn.Module,
    loss: Loss,
    fast_weights: str,
    shapes: Shapes,
    inner_steps: int,
    first_order: bool,
    adapting: Collection[str],
) -> tuple[list[LayerPlan], list[str]]:
    chain = trace(model)
    refusals = list(chain.refusals)
    if not isinstance(loss, str):
        refusals.append(f"loss is a callable; planned are {', '.join(LOSSES)}")
    if shapes.dtype not in (torch.float32, torch.float64):
        refusals.append(f"the data are {shapes.dtype}; planned are float32 and float64")
    if refusals:
        return [], refusals
    layers: list[LayerPlan] = []
    features: Features = shapes.support[1:]
    prelude, first = True, True
    for link in chain.links:
        try:
            after = link.op.out_features(features)
        except ValueError as reason:
            return [], [f"layer '{link.name}' ({link.op}): {reason}"]
        if not isinstance(link.op, Linear):
            layers.append(LayerPlan(link, features, 1, prelude, ""))
            features = after
            continue
        adapts = link.op.weight in adapting or link.op.bias in adapting
        positions = math.prod(features[:-1])
        form, cost = "shared", None
        before = prelude
        if adapts:
            form, cost = _choose_form(
                link.op, fast_weights, shapes, positions, inner_steps, first_order, first
            )
            prelude, first = False, False
        plan = LayerPlan(link, features, positions, prelude, form, cost)
        if len(features) > 1:
            merge, split = Link(link.name, MergeRows()), Link(link.name, SplitRows(features[:-1]))
            layers.append(LayerPlan(merge, features, 1, before, ""))
            layers.append(plan)
            layers.append(LayerPlan(split, after[-1:], positions, prelude, ""))
        else:
            layers.append(plan)
        features = after
    return layers, []


def _choose_form(
    op: Linear,
    fast_weights: str,
    shapes: Shapes,
    positions: int,
    inner_steps: int,
    first_order: bool,
    first: bool,
) -> tuple[str, Cost]:
    rows, query_rows = shapes.support[0] * positions, shapes.query[0] * positions
    itemsize = shapes.dtype.itemsize
    costs = {
        "factored": _factored_cost(op, rows, query_rows, inner_steps, first_order, first),
        "dense": _dense_cost(op, rows, query_rows, inner_steps, first_order, first, itemsize),
    }
    if fast_weights == "auto":
        # A Gram block of so thin a layer costs many times the layer.
        thin = op.in_features <= 4 or op.out_features_ <= 8
        form = "dense" if thin else min(costs, key=lambda form: costs[form].time)
    else:
        form = fast_weights
    return form, costs[form]


def _dense_cost(
    op: Linear,
    rows: int,
    query_rows: int,
    inner_steps: int,
    first_order: bool,
    first: bool,
    itemsize: int,
) -> Cost:
    """Passes over rows with shared weights at step 0 and with a task's own from then on."""
    area = op.in_features * op.out_features_
    down = 0 if first else 1  # whether a cotangent goes further down
    passes = [rows] * inner_steps + [query_rows]
    shared = 2 * area * passes[0] * (1 + down)
    small = sum(2 * area * n * (1 + down) for n in passes[1:])
    small += sum(2 * area * n for n in passes)  # outer products: updates, and the adjoint's first
    # weights are read by each pass, written by each update; the adjoint's first write
    traffic = len(passes[1:]) * (1 + down) + 2 * inner_steps + 1
    if not first_order:
        small += inner_steps * 2 * area * rows * (4 * down + 2)
        traffic += inner_steps * (3 + 5 * down)
    return Cost(shared, small, DENSE_SHARE, traffic * area * itemsize)


def _factored_cost(
    op: Linear, rows: int, query_rows: int, inner_steps: int, first_order: bool, first: bool
) -> Cost:
    """Shared products over all rows, and Gram blocks: rank * (I + O) a row, in and out."""
    area = op.in_features * op.out_features_
    ends = op.in_features + op.out_features_
    down = 0 if first else 1
    all_rows = inner_steps * rows + query_rows
    if first:
        passes, tangents = rows + query_rows, 0
        gradient_rows = query_rows + (0 if first_order else rows)
        small = 2 * (rows + query_rows) * rows * op.in_features if inner_steps else 0
        for step in range(inner_steps + 1):
            n = rows if step < inner_steps else query_rows
            small += 2 * n * step * rows * op.out_features_
        if not first_order:
            small += inner_steps * 2 * rows * (rows + query_rows) * op.out_features_
    else:
        passes, tangents = 2 * all_rows, 0 if first_order else 2 * inner_steps * rows
        gradient_rows = query_rows + (0 if first_order else 2 * inner_steps * rows)
        small = 0
        for step in range(inner_steps + 1):
            n = rows if step < inner_steps else query_rows
            small += 4 * n * step * rows * ends
            if step < inner_steps and not first_order:
                adjoint = query_rows + 2 * (inner_steps - 1 - step) * rows
                small += 4 * rows * (adjoint + step * rows) * ends
    shared = 2 * area * (passes + tangents * down + gradient_rows)
    return Cost(shared, small, GRAM_SHARE)


def _chunk_size(
    model: nn.Module, backend: str, layers: list[LayerPlan], shapes: Shapes, inner_steps: int
) -> int:
    """Tasks a pass. A function of sizes alone, so that the same call gives the same bits."""
    if backend == "reference":
        return shapes.tasks
    if backend == "functional":
        copies = inner_steps + 4  # of the parameters: each step's, a gradient, the adjoint's
        kept = copies * sum(p.numel() for p in model.parameters())
    else:
        kept = sum(_kept_by(layer, shapes, inner_steps) for layer in layers)
    if shapes.device.type == "cuda":
        memory = torch.cuda.get_device_properties(shapes.device).total_memory
        budget = int(memory * GPU_PASS_SHARE)
    else:
        budget = CPU_PASS_BYTES[backend]
    return max(1, budget // max(1, kept * shapes.dtype.itemsize))


def _kept_by(layer: LayerPlan, shapes: Shapes, inner_steps: int) -> int:
    """Numbers that a planned layer keeps for one task: rows of each step, and dense weights."""
    rows = shapes.support[0] * inner_steps + shapes.query[0]
    op, kept = layer.link.op, rows * layer.positions * math.prod(layer.features)
    if layer.form == "dense" and isinstance(op, Linear):
        kept += (inner_steps + 1) * op.in_features * op.out_features_
    return kept
