"""How backend "triton" goes about a chain of layers: which kernels, in what precision."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from maml_fast import triton_cost, triton_features
from maml_fast.cost import LayerUse, cost_of
from maml_fast.layers import (
    LOSSES_OF_STEPS,
    WEIGHTED_ROWS,
    Asked,
    LayerPlan,
    Layers,
    Shapes,
    Variant,
)
from maml_fast.ops import (
    AveragePool,
    Conv2d,
    GlobalMean,
    Linear,
    MaxPool,
    MergeRows,
    Norm,
    Operation,
    SplitRows,
)

# Of products, by torch.get_float32_matmul_precision(); see kernels/dots.py
PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}

FUSED_WIDTH = 128  # features of a layer of the fused kernel, at most
# All programs' scratch: within the L2 cache where that leaves a program to each multiprocessor
CACHE_SHARE = 0.7
SCRATCH_BYTES = 4 << 30  # and less than 2^31 numbers, for the kernel's 32-bit offsets
# Features summed at a time and of the result, rows of a weight's gradient, warps: those that spill
# little or nothing
TILES = ((16, 32, 32, 1), (16, 64, 32, 1), (16, 64, 64, 4), (64, 64, 64, 8))

IMAGES = (Conv2d, Norm, MaxPool, AveragePool, GlobalMean)  # of layer kernels alone


@dataclass(frozen=True)
class TritonPlan:
    """kernels: "fused" (kernels/fused.py) or "layers" (kernels/attend.py); why: not the other.

    tiles, programs: of the fused kernel; so many programs share the tasks. seconds: worked out by
    triton_cost.py, for an H200 where there is no GPU.
    """

    kernels: str
    why: str
    precision: str
    device: triton_features.Device
    seconds: float
    tiles: Any = None  # kernels.fused_program.Tiles
    programs: int = 0
    scratch_bytes: int = 0
    wave: int = 0  # tasks of a pass, of networks of images; 0: whatever fits into memory
    tunes: bool = True  # whether other tiles may be tried

    def describe(self) -> str:
        """Lines for people."""
        text = f"{self.kernels} kernels ({self.why}), products in {self.precision}"
        if self.tiles is not None:
            tiles = self.tiles
            text += (
                f"; {self.programs} programs of {tiles.num_warps} warps, tiles of {tiles.rows} "
                f"rows, {tiles.inner} and {tiles.outer} features, "
                f"{self.scratch_bytes / 1024:.0f} KiB of scratch each"
            )
        if self.wave:
            text += f"; at most {self.wave} tasks at a time, for the cache"
        return f"{text}; estimated, not measured: {self.seconds * 1e3:.3g} ms"


def refusals(parts: Layers, asked: Asked, shapes: Shapes) -> list[str]:
    """Why backend "triton" cannot run layers that the torch backend can."""
    if missing := triton_features.why_unavailable():
        return [missing]
    if elsewhere := triton_features.why_not_on(shapes.device):
        return [elsewhere]
    if shapes.dtype != torch.float32:
        instead = "; take backend 'torch'" if shapes.dtype == torch.float64 else ""
        return [f"the data are {shapes.dtype}, and its kernels take float32{instead}"]
    unusual = [words for words in asked.unusual() if words not in (WEIGHTED_ROWS, LOSSES_OF_STEPS)]
    if parts.body:
        unusual.append("layers that learn below all that adapts")
    if unusual:
        return [f"its kernels have not: {', '.join(unusual)}"]
    return [
        f"layer '{layer.link.name}' ({layer.link.op}): has no Triton operation"
        for layer in parts.above
        if isinstance(layer.link.op, Operation) and layer.link.op.native is None
    ]


def plan_for_triton(
    layers: Sequence[LayerPlan], asked: Asked, shapes: Shapes, adapting: Collection[str]
) -> tuple[list[LayerPlan], TritonPlan]:
    """The layers with forms that suit the kernels chosen, and the plan."""
    device = triton_features.device(shapes.device.index)
    precision = PRECISIONS[asked.precision]
    uses = [layer.use for layer in layers if layer.use is not None]
    forms = [triton_cost.choose_form(use, asked.fast_weights) for use in uses]
    numbers, passes = _numbers(layers, shapes), _passes(asked)
    by_layers = triton_cost.layers_seconds(uses, forms, numbers, passes, shapes.tasks)
    plan = TritonPlan("layers", why_not_fused(layers, asked), precision, device, by_layers)
    if any(isinstance(layer.link.op, IMAGES) and not layer.prelude for layer in layers):
        wave = triton_cost.wave(numbers, device.multiprocessors, device.cache_bytes)
        plan = replace(plan, wave=wave)
    if not plan.why:
        fused = _fused(layers, asked, shapes, adapting, replace(plan, kernels="fused"))
        if fused.scratch_bytes > SCRATCH_BYTES:
            plan = replace(plan, why=f"a program of fused ones takes {fused.scratch_bytes} bytes")
        elif fused.seconds <= by_layers:
            plan, forms = fused, ["dense"] * len(uses)
        else:
            plan = replace(plan, why=f"fused is estimated at {fused.seconds * 1e3:.3g} ms")
    by_form = iter(forms)
    planned = []
    for layer in layers:
        if layer.use is not None:
            form = next(by_form)
            layer = replace(layer, form=form, cost=cost_of(layer.use, form, 4))
        planned.append(layer)
    return planned, plan


def _numbers(layers: Sequence[LayerPlan], shapes: Shapes) -> list[int]:
    """Of a task's rows before and behind each layer, norm and pool that runs at each step."""
    rows = max(shapes.support[0], shapes.query[0])
    return [
        rows * (math.prod(layer.features) + math.prod(layer.link.op.out_features(layer.features)))
        for layer in layers
        if not layer.prelude and isinstance(layer.link.op, (Linear, *IMAGES))
    ]


def _passes(asked: Asked) -> int:
    """There and back, of each step, of the query, and of each step's tangents."""
    return 2 * (asked.inner_steps + 1) + (0 if asked.first_order else 2 * asked.inner_steps)


def why_not_fused(layers: Sequence[LayerPlan], asked: Asked) -> str:
    """Why the fused kernel cannot run these layers; empty if it can."""
    if asked.fast_weights == "factored":
        return "fused ones have dense weights"
    if asked.weighted_rows:
        return "fused ones count all rows alike"
    adapting = [layer for layer in layers if not layer.prelude]
    if not adapting:
        return "nothing adapts"
    for layer in adapting:
        op = layer.link.op
        if isinstance(op, IMAGES):
            return f"layer '{layer.link.name}' ({op}) has no fused kernel"
        if isinstance(op, (MergeRows, SplitRows)):
            return f"layer '{layer.link.name}' has more than one position a row"
        if isinstance(op, Linear) and max(op.in_features, op.out_features_) > FUSED_WIDTH:
            return f"layer '{layer.link.name}' is wider than {FUSED_WIDTH}"
    return ""


def _fused(
    layers: Sequence[LayerPlan],
    asked: Asked,
    shapes: Shapes,
    adapting: Collection[str],
    plan: TritonPlan,
) -> TritonPlan:
    """The plan with the tiles that are expected to be quickest."""
    variant = Variant.planned(asked, shapes, adapting)
    network = network_of(layers, variant, {}, 0)
    uses = [
        LayerUse(
            layer.in_features,
            layer.out_features,
            shapes.support[0],
            shapes.query[0],
            asked.inner_steps,
            asked.first_order,
            first=not i,
        )
        for i, layer in enumerate(network.layers)
    ]

    def seconds(tiles: Any) -> float:
        return triton_cost.fused_seconds(
            uses, shapes.tasks, tiles, plan.device.multiprocessors, plan.device.clock
        )

    tiles = min(candidates(network), key=seconds)
    size = 4 * network.program_size
    return replace(
        plan,
        why="a small network",
        seconds=seconds(tiles),
        tiles=tiles,
        programs=programs_for(tiles, size, shapes.tasks, plan.device),
        scratch_bytes=size,
    )


def candidates(network: Any) -> list[Any]:
    """The tiles worth trying, all of which the tests compare with float64 on a GPU."""
    kind = importlib.import_module("maml_fast.kernels.fused_program").Tiles
    rows = 32 if min(network.rows, network.query_rows) > 64 else 16
    found = [kind(rows, *rest) for rest in TILES]
    # One warp has no registers for more rows, or for wide tiles in several columns.
    return [
        tiles
        for tiles in found
        if tiles.num_warps > 1 or (rows == 16 and (tiles.outer < 64 or network.widest <= 64))
    ]


def programs_for(tiles: Any, scratch_bytes: int, tasks: int, device: Any) -> int:
    """How many programs share the tasks: those that run at once, or fewer for their scratch."""
    if triton_features.interpreted():
        return min(tasks, 3)  # of which some take more than one task
    resident = max(1, triton_cost.WARPS // tiles.num_warps) * device.multiprocessors
    cached = max(device.multiprocessors, int(CACHE_SHARE * device.cache_bytes) // scratch_bytes)
    return max(1, min(tasks, resident, cached, SCRATCH_BYTES // scratch_bytes))


def network_of(
    layers: Sequence[LayerPlan],
    variant: Variant,
    gradient_starts: Mapping[str, int],
    gradient_numbers: int,
) -> Any:
    """The `fused_program.Network` of the layers that adapt and those between and behind them.

    gradient_starts: where each adapting parameter's gradient begins among gradient_numbers.
    """
    kernels = importlib.import_module("maml_fast.kernels.fused_program")
    found: list[Any] = []
    for layer in layers:
        op = layer.link.op
        if layer.prelude:
            continue
        assert isinstance(op, (Linear, Operation))  # see `refusals`
        if isinstance(op, Linear):
            starts = gradient_starts.get(op.weight, -1), gradient_starts.get(op.bias or "", -1)
            found.append(kernels.Layer(op.in_features, op.out_features_, (), *starts))
        elif op.native is not None and op.native[0] != "reshape":  # those are views
            name, constants = op.native
            found[-1] = replace(found[-1], activation=(*found[-1].activation, (name, *constants)))
    return kernels.Network(
        tuple(found),
        variant.loss,
        variant.inner_steps,
        variant.rows,
        variant.query_rows,
        variant.gradient,
        not variant.first_order,
        bool(variant.learning),
        gradient_numbers,
    )
