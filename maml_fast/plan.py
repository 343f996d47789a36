"""What would run: the backend, each layer's operation and form of weights, FLOPs and bytes.

T tasks, N support rows, M query rows, S inner steps, I/O features of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from maml_fast import cpu_features, cpu_plan, memory, triton_features, triton_plan
from maml_fast.cost import choose_form, still_cost
from maml_fast.errors import UnavailableBackendError, UnsupportedModelError
from maml_fast.inner import SGD
from maml_fast.layers import Asked, LayerPlan, Layers, Shapes, centred_by, plan_layers
from maml_fast.ops import BatchNorm, Weighted
from maml_fast.ops.norm import runs_on_statistics
from maml_fast.outer import Reptile
from maml_fast.recorder import Recorder
from maml_fast.refusals import batching_refusals

BACKENDS = ("auto", "triton", "cpu", "torch", "functional", "reference")
PLANNED = ("triton", "cpu", "torch")  # that run a chain of operations with fast weights in forms
FAST_WEIGHTS = ("auto", "factored", "dense")

# What a pass may keep at once; more tasks than fit are taken in several passes. On a CPU small
# passes stay near the cache; functional keeps the parameters of every step, and bounds them.
# On a GPU so much that its kernels are long beside their launches, and still no function of the
# GPU's memory: the passes decide how the sum over tasks is rounded.
CPU_PASS_BYTES = {"torch": 24 << 20, "functional": 32 << 20, "triton": 24 << 20}
GPU_PASS_BYTES = 2 << 30
GPU_SHARE = 0.5  # of the memory at hand, which a pass takes at most


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
    body: list[LayerPlan] = field(
        default_factory=list
    )  # below all that adapts, see `layers.Layers`
    moving: list[str] = field(default_factory=list)  # parameters of `layers` that adapt or learn
    refusals: list[str] = field(default_factory=list)
    forward_mode: bool = True  # how functional takes Hessian-vector products
    halved: bool = False  # whether `chunk_size` was halved when memory ran out
    cpu: cpu_plan.CpuPlan | None = None
    triton: triton_plan.TritonPlan | None = None
    # Of the compiled backends, prepared
    programs: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    # What tells times of a meta-step that is measured; see `maml_fast.profile`
    recorder: Recorder | None = field(default=None, repr=False, compare=False)
    batch_norms: str = ""  # what the model's batch norms do, for people
    centred_by: str = ""  # see `layers.centred_by`; the data are handed over less their mean

    @property
    def rows_meet(self) -> bool:
        """Whether a task's rows may see each other in the model, as in batch norm."""
        layers = (*self.body, *self.layers)
        norms = any(isinstance(layer.link.op, BatchNorm) for layer in layers)
        return self.backend not in PLANNED or norms

    @property
    def flops(self) -> int:
        """Of products, all tasks, one meta-step; 0 if the model is not planned."""
        return self.shapes.tasks * sum(layer.cost.flops for layer in self.layers if layer.cost)

    @property
    def bytes(self) -> int:
        """That must move, all tasks, one meta-step: the data once, and weights of each task's own
        in forms that have them in memory. 0 if the model is not planned."""
        if not self.layers:
            return 0
        shapes = self.shapes
        data = sum(math.prod(rows) for rows in (shapes.support, shapes.query))
        weights = sum(layer.cost.weight_bytes for layer in self.layers if layer.cost)
        if self.triton is not None and self.triton.kernels == "fused":
            weights = 0  # they stay in the caches
        return shapes.tasks * (data * shapes.dtype.itemsize + weights)

    @property
    def reptile_by_steps(self) -> bool:
        """Whether Reptile's gradient is the sum of what the inner steps take."""
        plain = self.asked.rule == SGD() and isinstance(self.asked.outer, Reptile)
        return plain and self.backend in ("cpu", "torch")

    @property
    def loops(self) -> str:
        """For people, where more inner loops run than the one that figures are given for."""
        if self.backend in ("cpu", "triton") and self.asked.step_weights:
            count = sum(weight != 0 for weight in self.asked.step_weights)
            return (
                f"losses of {count} steps, each of an inner loop of its own; figures of the longest"
            )
        if self.reptile_by_steps:
            return "Reptile by first-order inner loops of all lengths; figures of MAML's one"
        return ""

    @property
    def takes_all(self) -> bool:
        """Whether a pass takes all tasks, as the backend's memory does not grow with them."""
        return _takes_all(self.backend, self.triton)

    @property
    def reads_memory(self) -> bool:
        """Whether the backend reads no more of a parameter than its memory, and makes the loss NaN
        where a class is out of range: it records nothing, and puts nothing into the model."""
        return self.backend == "cpu" or (self.triton is not None and self.triton.kernels == "fused")

    def __str__(self) -> str:
        shapes = self.shapes
        lines = [
            f"backend {self.backend}: {self.reason}",
            f"{shapes.tasks} tasks, {self.chunk_size} a pass; {shapes.support[0]} support and "
            f"{shapes.query[0]} query rows; {self.asked.inner_steps} inner steps; "
            f"{str(shapes.dtype).removeprefix('torch.')} on {shapes.device}",
        ]
        if self.layers or self.body:
            rows = [("layer", "operation", "row", "weights", "MFLOP a task", "KiB a task")]
            for layer in (*self.body, *self.layers):
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
            lines.append(
                f"{self.flops / 1e9:.3f} GFLOP a meta-step in linear layers and convolutions"
            )
        if self.loops:
            lines.append(self.loops)
        if self.batch_norms:
            lines.append(self.batch_norms)
        if self.centred_by:
            lines.append(
                "the data less their mean over a task's rows, which the batch norm "
                f"'{self.centred_by}' takes away in any case: that spares digits"
            )
        if self.cpu is not None:
            lines.append(self.cpu.describe(doubles=shapes.dtype == torch.float64))
        if self.triton is not None:
            lines.append(self.triton.describe())
        if self.refusals:
            lines.append("cannot be planned:")
            lines += [f"  {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    asked: Asked,
    shapes: Shapes,
    output: tuple[int, ...],
    refusals: Sequence[str] = (),
    broken: Mapping[str, str] | None = None,
) -> Plan:
    """Choose the backend and each layer's form. `refusals` are reasons against all planned
    backends that are known already, `broken` reasons against one, by its name.

    Raises UnavailableBackendError for a backend that this installation lacks, and
    UnsupportedModelError where an explicit backend cannot run the model, naming layer and reason.
    """
    _check_available(asked.backend)
    backend, reason = asked.backend, "as asked"
    parts = Layers([], [])
    refusals = list(refusals)
    if backend in ("auto", *PLANNED) and not refusals:
        parts, refusals = plan_layers(model, asked, shapes)
    merged = parts
    if parts.body and not asked.wants_inputs:
        merged, _ = plan_layers(model, asked, shapes, with_body=False)
    parts_of = {
        "triton": merged,
        "cpu": Layers([], [*parts.body, *parts.above]),
    }
    not_by = {
        name: [broken[name]]
        if broken and name in broken
        else compiled.refusals(parts_of[name], asked, shapes)
        for name, compiled in (("triton", triton_plan), ("cpu", cpu_plan))
        if backend in ("auto", name)
    }
    refusals += not_by.get(backend, [])
    if backend in PLANNED and refusals:
        raise UnsupportedModelError(
            f"backend {backend!r} cannot run this model: " + "; ".join(refusals)
        )
    if backend == "auto":
        backend, reason = _choose(not_by, shapes)
        if refusals:
            backend, reason = "functional", "the planned backends cannot run this model (below)"
    cpu = triton = None
    parts = parts_of.get(backend, parts)
    layers, adapting = parts.above, parts.moving(asked)
    if backend == "triton":
        layers, triton = triton_plan.plan_for_triton(layers, asked, shapes, adapting)
    elif backend == "cpu":
        layers, cpu = cpu_plan.plan_for_cpu(parts, asked, shapes, adapting)
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
    chunk_size = shapes.tasks
    if not _takes_all(backend, triton):
        chunk_size = _chunk_size(model, backend, layers, shapes, asked.inner_steps)
        if triton is not None and triton.wave:
            chunk_size = min(chunk_size, triton.wave)
        passes = math.ceil(shapes.tasks / chunk_size)
        chunk_size = math.ceil(shapes.tasks / passes)  # of about one size
        chunk_size = min(chunk_size, asked.chunk_size or chunk_size)
    return Plan(
        backend,
        reason,
        asked,
        shapes,
        output,
        chunk_size,
        layers,
        parts.body,
        adapting,
        refusals,
        cpu=cpu,
        triton=triton,
        batch_norms=_batch_norms(model, [*parts.body, *layers]),
        centred_by=centred_by(layers) if backend in PLANNED else "",
    )


def _takes_all(backend: str, triton: triton_plan.TritonPlan | None) -> bool:
    return backend in ("reference", "cpu") or (triton is not None and triton.kernels == "fused")


def _batch_norms(model: nn.Module, layers: Sequence[LayerPlan]) -> str:
    """What is to be known of batch norm, if the model has any."""
    planned = any(isinstance(layer.link.op, BatchNorm) for layer in layers)
    if not planned and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return ""
    text = (
        "batch norm by the statistics of a task's own rows, support and query each by theirs "
        "(transductive)"
    )
    if any(runs_on_statistics(module) for module in model.modules()):
        return text + "; running statistics are neither read nor updated"
    return text


def _check_available(backend: str) -> None:
    if backend == "cpu":
        cpu_features.extension()
    if backend == "triton" and (missing := triton_features.why_unavailable()):
        raise UnavailableBackendError(f"backend 'triton' cannot run here: {missing}")


def _choose(not_by: Mapping[str, Sequence[str]], shapes: Shapes) -> tuple[str, str]:
    """The fastest planned backend for the data's device, and why."""
    name = "triton" if shapes.device.type == "cuda" else "cpu"
    if not_by[name]:
        return "torch", f"{name} cannot: {not_by[name][0]}"
    return name, "plans every layer"


def _with_form(layer: LayerPlan, asked: Asked, shapes: Shapes) -> LayerPlan:
    """The form that suits backend "torch"."""
    if layer.still and layer.form in ("", "dense"):
        return replace(layer, form="still", cost=still_cost(layer.use) if layer.use else None)
    if layer.use is None:
        return layer
    form, cost = choose_form(layer.use, asked.fast_weights, shapes.dtype.itemsize)
    return replace(layer, form=form, cost=cost)


def _chunk_size(
    model: nn.Module, backend: str, layers: list[LayerPlan], shapes: Shapes, inner_steps: int
) -> int:
    """Tasks a pass. A function of sizes alone, so that the same call gives the same bits, unless a
    GPU has too little memory at hand: then half as many, or a quarter, and so on."""
    if backend == "functional":
        copies = inner_steps + 4  # of the parameters: each step's, a gradient, the adjoint's
        kept = copies * sum(p.numel() for p in model.parameters())
    else:
        kept = sum(_kept_by(layer, shapes, inner_steps) for layer in layers if not layer.prelude)
        kept *= 3 if backend == "triton" else 1  # cotangents, tangents, factors beside each other
    budget = CPU_PASS_BYTES[backend]
    if shapes.device.type == "cuda":
        budget = GPU_PASS_BYTES
        most = max(1, int(memory.at_hand(shapes.device) * GPU_SHARE))
        while budget > most:
            budget //= 2
    return max(1, budget // max(1, kept * shapes.dtype.itemsize))


def _kept_by(layer: LayerPlan, shapes: Shapes, inner_steps: int) -> int:
    """Numbers that a planned layer keeps for one task: its results, and dense weights."""
    rows = shapes.support[0] * inner_steps + shapes.query[0]
    op, after = layer.link.op, layer.link.op.out_features(layer.features)
    kept = rows * math.prod(after) * (1 if isinstance(op, Weighted) else layer.positions)
    if layer.form == "dense" and layer.use is not None:
        kept += (inner_steps + 1) * layer.use.area
    return kept
