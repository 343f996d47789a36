"""What would run: the backend, each layer's operation and form of weights, FLOPs and bytes.

T tasks, N support rows, M query rows, S inner steps, I/O features of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from maml_fast import cpu_cost, cpu_features
from maml_fast.cost import Cost, LayerUse, choose_form, cost_of
from maml_fast.errors import UnavailableBackendError, UnsupportedModelError
from maml_fast.losses import LOSSES
from maml_fast.ops import Features, Linear, MergeRows, Operation, SplitRows
from maml_fast.trace import Link, batching_refusals, trace

BACKENDS = ("auto", "triton", "cpu", "torch", "functional", "reference")
PLANNED = ("cpu", "torch")  # that run a chain of operations with fast weights in forms
CHOSEN_CPU = ("cpu", "the fastest that plans every layer")
FAST_WEIGHTS = ("auto", "factored", "dense")

# What a pass may keep at once; more tasks than fit are taken in several passes. On a CPU small
# passes stay near the cache; functional keeps the parameters of every step, and bounds them.
CPU_PASS_BYTES = {"torch": 24 << 20, "functional": 32 << 20}
GPU_PASS_SHARE = 0.25


@dataclass(frozen=True)
class Asked:
    """What the user asked for; the options of `MAML` that a plan depends on."""

    loss: str | int  # a name; of a callable, its id
    inner_steps: int
    first_order: bool
    backend: str
    fast_weights: str
    chunk_size: int | None
    instruction_set: str = ""  # of backend "cpu"; "": the highest there is
    layout: str | None = None  # of backend "cpu"; None: chosen by cost


@dataclass(frozen=True)
class Shapes:
    """What a plan depends on beside the model: one task's rows, and how many tasks."""

    tasks: int
    support: tuple[int, ...]  # [N, *features]
    query: tuple[int, ...]  # [M, *features]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LayerPlan:
    """One operation of the chain, in order."""

    link: Link
    features: Features  # of a row that enters
    positions: int  # rows of the operation for a row of the data
    prelude: bool  # runs once, before anything that adapts
    form: str  # "factored", "dense", "shared", or "" for operations without weights
    cost: Cost | None = None
    use: LayerUse | None = None  # of a layer that adapts


@dataclass(frozen=True)
class CpuPlan:
    """How backend "cpu" goes about it (csrc/lanes.h and meta_step.cpp)."""

    instruction_set: str
    layout: str
    tile_tasks: int  # that a thread takes through the meta-step at once
    cycles: float  # predicted, of one core, for all tasks


@dataclass
class Plan:
    """What would run for data of these shapes. `print(plan)` shows it."""

    backend: str
    reason: str
    asked: Asked
    shapes: Shapes
    output: tuple[int, ...]  # [M, *features] of a prediction
    chunk_size: int
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    forward_mode: bool = True  # how functional takes Hessian-vector products
    cpu: CpuPlan | None = None
    programs: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # of "cpu"

    @property
    def flops(self) -> int:
        """Of linear layers, all tasks, one meta-step; 0 if the model is not planned."""
        return self.shapes.tasks * sum(layer.cost.flops for layer in self.layers if layer.cost)

    def __str__(self) -> str:
        shapes = self.shapes
        lines = [
            f"backend {self.backend}: {self.reason}",
            f"{shapes.tasks} tasks, {self.chunk_size} a pass; {shapes.support[0]} support and "
            f"{shapes.query[0]} query rows; {self.asked.inner_steps} inner steps; "
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
    asked: Asked,
    shapes: Shapes,
    output: tuple[int, ...],
    adapting: Collection[str],
    refusals: Sequence[str] = (),
) -> Plan:
    """Choose the backend and each layer's form; `refusals` are reasons against torch known already.

    Raises UnavailableBackendError for a backend that this installation lacks, and
    UnsupportedModelError where an explicit backend cannot run the model, naming layer and reason.
    """
    _check_available(asked.backend)
    backend, reason = asked.backend, "as asked"
    layers: list[LayerPlan] = []
    refusals = list(refusals)
    if backend in ("auto", *PLANNED) and not refusals:
        layers, refusals = _plan_layers(model, asked, shapes, adapting)
    not_by_cpu = _cpu_refusals(layers, shapes) if backend in ("auto", "cpu") else []
    if backend == "cpu":
        refusals += not_by_cpu
    if backend in PLANNED and refusals:
        raise UnsupportedModelError(
            f"backend {backend!r} cannot run this model: " + "; ".join(refusals)
        )
    if backend == "auto":
        backend, reason = ("torch", f"cpu cannot: {not_by_cpu[0]}") if not_by_cpu else CHOSEN_CPU
        if refusals:
            backend, reason = "functional", "the planned backends cannot run this model (below)"
    cpu = None
    if backend == "cpu":
        layers, cpu = _plan_for_cpu(layers, asked, shapes)
    elif backend == "torch":
        layers = [_with_form(layer, asked, shapes) for layer in layers]
    if backend not in PLANNED and asked.fast_weights != "auto":
        raise UnsupportedModelError(
            f"fast_weights={asked.fast_weights!r} is a choice of the planned backends; backend "
            f"{backend!r} has none to make" + (": " + "; ".join(refusals) if refusals else "")
        )
    if backend == "functional" and (unbatched := batching_refusals(model)):
        raise UnsupportedModelError(
            f"backend 'functional' cannot run this model: {'; '.join(unbatched)}; or take "
            "backend='reference', which runs any module one task at a time"
        )
    chunk_size = asked.chunk_size
    if chunk_size is None:
        chunk_size = _chunk_size(model, backend, layers, shapes, asked.inner_steps)
        passes = math.ceil(shapes.tasks / chunk_size)
        chunk_size = math.ceil(shapes.tasks / passes)  # of about one size
    chunk_size = min(chunk_size, shapes.tasks)
    return Plan(
        backend, reason, asked, shapes, output, chunk_size, layers, refusals, cpu=cpu
    )


def _check_available(backend: str) -> None:
    if backend == "cpu":
        cpu_features.extension()
    if backend == "triton":
        raise UnavailableBackendError(
            "backend 'triton' has no meta-step in this version; take 'torch'"
        )


def _cpu_refusals(layers: Sequence[LayerPlan], shapes: Shapes) -> list[str]:
    """Why backend "cpu" cannot run layers that the torch backend can."""
    if shapes.device.type != "cpu":
        return [f"the data are on {shapes.device}; backend 'cpu' wants them on the CPU"]
    if missing := cpu_features.why_missing():
        return [missing]
    return [
        f"layer '{layer.link.name}' ({layer.link.op}): has no C++ operation"
        for layer in layers
        if isinstance(layer.link.op, Operation) and layer.link.op.native is None
    ]


def _with_form(layer: LayerPlan, asked: Asked, shapes: Shapes) -> LayerPlan:
    """The form that suits backend "torch"."""
    if layer.use is None:
        return layer
    form, cost = choose_form(layer.use, asked.fast_weights, shapes.dtype.itemsize)
    return replace(layer, form=form, cost=cost)


def _plan_for_cpu(
    layers: list[LayerPlan], asked: Asked, shapes: Shapes
) -> tuple[list[LayerPlan], CpuPlan]:
    name = asked.instruction_set or cpu_features.instruction_set()
    vector_bytes = cpu_features.engines()[name]
    machine = cpu_cost.Machine(vector_bytes // shapes.dtype.itemsize, vector_bytes)
    uses = [layer.use for layer in layers if layer.use is not None]
    choice = cpu_cost.choose(uses, shapes.tasks, asked.fast_weights, machine, asked.layout)
    forms = iter(choice.forms)
    planned = [
        layer
        if layer.use is None
        else replace(layer, form=(form := next(forms)), cost=cost_of(layer.use, form, shapes.dtype.itemsize))
        for layer in layers
    ]
    cycles = cpu_cost.total_cycles(choice, shapes.tasks, threads=1)
    return planned, CpuPlan(name, choice.layout, choice.tile_tasks, cycles)


def _plan_layers(
    model: nn.Module, asked: Asked, shapes: Shapes, adapting: Collection[str]
) -> tuple[list[LayerPlan], list[str]]:
    chain = trace(model)
    refusals = list(chain.refusals)
    if not isinstance(asked.loss, str):
        refusals.append(f"loss is a callable; planned are {', '.join(LOSSES)}")
    if shapes.dtype not in (torch.float32, torch.float64):
        refusals.append(f"the data are {shapes.dtype}; planned are float32 and float64")
    if refusals:
        return [], refusals
    layers: list[LayerPlan] = []
    features: Features = shapes.support[1:]
    prelude = True
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
        form, use = "shared", None
        before = prelude
        if adapts:
            form = ""  # chosen later, by backend
            use = LayerUse(
                link.op.in_features,
                link.op.out_features_,
                shapes.support[0] * positions,
                shapes.query[0] * positions,
                asked.inner_steps,
                asked.first_order,
                first=prelude,
            )
            prelude = False
        plan = LayerPlan(link, features, positions, prelude, form, use=use)
        if len(features) > 1:
            merge, split = Link(link.name, MergeRows()), Link(link.name, SplitRows(features[:-1]))
            layers.append(LayerPlan(merge, features, 1, before, ""))
            layers.append(plan)
            layers.append(LayerPlan(split, after[-1:], positions, prelude, ""))
        else:
            layers.append(plan)
        features = after
    return layers, []


def _chunk_size(
    model: nn.Module, backend: str, layers: list[LayerPlan], shapes: Shapes, inner_steps: int
) -> int:
    """Tasks a pass. A function of sizes alone, so that the same call gives the same bits."""
    if backend in ("reference", "cpu"):
        return shapes.tasks
    if backend == "functional":
        copies = inner_steps + 4  # of the parameters: each step's, a gradient, the adjoint's
        kept = copies * sum(p.numel() for p in model.parameters())
    else:
        kept = sum(_kept_by(layer, shapes, inner_steps) for layer in layers if not layer.prelude)
    if shapes.device.type == "cuda":
        memory = torch.cuda.get_device_properties(shapes.device).total_memory
        budget = int(memory * GPU_PASS_SHARE)
    else:
        budget = CPU_PASS_BYTES[backend]
    return max(1, budget // max(1, kept * shapes.dtype.itemsize))


def _kept_by(layer: LayerPlan, shapes: Shapes, inner_steps: int) -> int:
    """Numbers that a planned layer keeps for one task: its results, and dense weights."""
    rows = shapes.support[0] * inner_steps + shapes.query[0]
    op, after = layer.link.op, layer.link.op.out_features(layer.features)
    kept = rows * layer.positions * math.prod(after)
    if layer.form == "dense" and isinstance(op, Linear):
        kept += (inner_steps + 1) * op.in_features * op.out_features_
    return kept
