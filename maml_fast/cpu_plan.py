"""How backend "cpu" goes about a chain of layers, and the program of `maml_fast._cpu` for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from maml_fast import cpu_cost, cpu_features
from maml_fast.cost import LayerUse, cost_of, once_cost
from maml_fast.inner import SGD
from maml_fast.layers import Asked, LayerPlan, Layers, Shapes, Variant, product_of
from maml_fast.ops import (
    AveragePool,
    BatchNorm,
    Conv2d,
    Features,
    GlobalMean,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool,
    MergeRows,
    Norm,
    Operation,
    SplitRows,
    Weighted,
)
from maml_fast.ops.reshape import Rearrange

IMAGES = "channels_in_lanes"


@dataclass(frozen=True)
class CpuPlan:
    """See csrc/lanes.h for the layouts and csrc/meta_step.cpp for tiles and chunks."""

    instruction_set: str
    layout: str
    tile_tasks: int  # that a thread takes through the meta-step at once
    arena_bytes: int  # that a thread works in
    chunks: int  # of tiles, whose sums are added up in order
    cycles: float  # predicted, of one core, for all tasks
    lanes: int
    replays: bool = False  # the adjoint computes each inner step's values again

    def seconds(self, doubles: bool) -> float:
        """Predicted for one thread of this processor."""
        return self.cycles * 4 * self.lanes / _peak(self.instruction_set, doubles)

    def describe(self, doubles: bool) -> str:
        """A line for people."""
        return (
            f"{self.instruction_set}, {self.layout.replace('_', ' ')}: tiles of {self.tile_tasks} "
            f"tasks in {self.chunks} chunks, arena {self.arena_bytes / 1024:.0f} KiB a thread; "
            f"{'inner steps computed again in the adjoint; ' if self.replays else ''}"
            f"predicted {self.seconds(doubles) * 1e3:.3g} ms on one thread"
        )


@functools.cache
def _peak(instruction_set: str, doubles: bool) -> float:
    return cpu_features.extension().peak(instruction_set, doubles)


def refusals(parts: Layers, asked: Asked, shapes: Shapes) -> list[str]:
    """Why backend "cpu" cannot run layers that the torch backend can."""
    if shapes.device.type != "cpu":
        return [f"the data are on {shapes.device}; backend 'cpu' wants them on the CPU"]
    if missing := cpu_features.why_missing():
        return [missing]
    layers = parts.above
    found = [
        f"layer '{layer.link.name}' ({layer.link.op}): has no C++ operation"
        for layer in layers
        if not _has(layer)
    ]
    found += [
        f"layer '{layer.link.name}' ({layer.link.op}): C++ has values for each step of norms alone"
        for layer in layers
        if isinstance(layer.link.op, Weighted)
        and not isinstance(layer.link.op, Norm)
        and not set(layer.link.op.parameters).isdisjoint(asked.by_step)
    ]
    return found + [
        f"layer '{layer.link.name}' ({layer.link.op}): C++ has layer norms of all axes, of all but "
        f"the channels, or of the last; a row is {list(layer.features)}"
        for layer in layers
        if isinstance(layer.link.op, LayerNorm) and not _spans(layer.link.op, layer.features)
    ]


def _spans(op: LayerNorm, features: Features) -> bool:
    """Whether images of three axes, the channels, all between and the last, show what is normed."""
    normed = math.prod(op.shape)
    return normed in (math.prod(features), math.prod(features[1:]), features[-1])


def _has(layer: LayerPlan) -> bool:
    op = layer.link.op
    return isinstance(op, Weighted) or op.native is not None


def is_spatial(layer: LayerPlan) -> bool:
    """Whether the layer wants images, channels in the lanes of vectors."""
    op = layer.link.op
    images = (Conv2d, MaxPool, AveragePool, GlobalMean)
    return isinstance(op, images) or (isinstance(op, Norm) and len(layer.features) > 1)


def plan_for_cpu(
    parts: Layers, asked: Asked, shapes: Shapes, adapting: Collection[str]
) -> tuple[list[LayerPlan], CpuPlan]:
    """The layers with forms that suit the C++ engine, and its plan. It knows no body, only layers
    that run once."""
    layers = parts.above
    name = cpu_features.instruction_set()
    vector_bytes = cpu_features.engines()[name]
    itemsize = shapes.dtype.itemsize
    machine = cpu_cost.Machine(vector_bytes // itemsize, vector_bytes)
    uses = [layer.use for layer in layers if layer.use is not None]
    once = _once_uses(layers, asked, shapes)
    if any(map(is_spatial, layers)):
        choice = cpu_cost.choose_images(uses, machine, list(once.values()))
    else:
        norms = [_norm_use(layer, asked, shapes) for layer in layers if _is_norm(layer)]
        choice = cpu_cost.choose(
            uses, shapes.tasks, asked.fast_weights, machine, norms, list(once.values())
        )
    layers = [
        replace(layer, cost=once_cost(once[i])) if i in once else layer
        for i, layer in enumerate(layers)
    ]
    forms = iter(choice.forms)
    planned = []
    for layer in layers:
        if layer.use is not None:
            form = next(forms)
            layer = replace(layer, form=form, cost=cost_of(layer.use, form, itemsize))
        planned.append(layer)
    cycles = cpu_cost.total_cycles(choice, shapes.tasks, threads=1)
    plan = CpuPlan(name, choice.layout, choice.tile_tasks, 0, 0, cycles, machine.lanes)
    variant = Variant.planned(asked, shapes, adapting)
    sizes = prepare(Layers([], planned), plan, variant, shapes).sizes(shapes.tasks)
    found = {name: sizes[name] for name in ("arena_bytes", "chunks", "replays")}
    return planned, replace(plan, **found)


def _once_uses(layers: Sequence[LayerPlan], asked: Asked, shapes: Shapes) -> dict[int, LayerUse]:
    """The linear layers and convolutions that run once, by place."""
    found: dict[int, LayerUse] = {}
    nothing_below = not asked.wants_inputs  # has a gradient
    for i, layer in enumerate(layers):
        op = layer.link.op
        if not layer.prelude:
            break
        if isinstance(op, (Linear, Conv2d)):
            found[i] = LayerUse(
                *product_of(op),
                shapes.support[0] * layer.positions,
                shapes.query[0] * layer.positions,
                asked.inner_steps,
                asked.first_order,
                first=nothing_below,
                learns=layer.still,
            )
        nothing_below = nothing_below and not layer.still
    return found


def _is_norm(layer: LayerPlan) -> bool:
    return isinstance(layer.link.op, Norm)


def _norm_use(layer: LayerPlan, asked: Asked, shapes: Shapes) -> cpu_cost.NormUse:
    return cpu_cost.NormUse(
        math.prod(layer.features),
        shapes.support[0],
        shapes.query[0],
        1 if layer.prelude else asked.inner_steps,
        asked.first_order or layer.prelude,
        of_rows=isinstance(layer.link.op, BatchNorm),
    )


def prepare(
    parts: Layers,
    plan: CpuPlan,
    variant: Variant,
    shapes: Shapes,
) -> Any:
    """The `_cpu.Prepared` that runs the layers above the body."""
    rule = variant.rule
    assert isinstance(rule, SGD)  # `plan_layers` refuses others
    builder = cpu_features.extension().Builder(
        loss=variant.loss,
        layout=plan.layout,
        steps=variant.inner_steps,
        rows=variant.rows,
        query_rows=variant.query_rows,
        shape=list(parts.entering(shapes.support)),
        first_order=variant.first_order,
        gradient=variant.gradient,
        exports=variant.exports,
        inputs=variant.inputs,
        momentum=rule.momentum,
        nesterov=rule.nesterov,
        weight_decay=rule.weight_decay,
    )
    for number in engine_layers(parts.above, plan):
        layer = parts.above[number]
        if isinstance(layer.link.op, Weighted):
            _add_weighted(builder, layer, variant)
        else:
            _add(builder, layer, images=plan.layout == IMAGES)
    return builder.prepare(plan.instruction_set, shapes.dtype == torch.float64)


def engine_layers(layers: Sequence[LayerPlan], plan: CpuPlan) -> list[int]:
    """The places of those that the engine has: flat rows keep their order in a rearrangement."""
    merging = (MergeRows, SplitRows)
    return [
        i
        for i, layer in enumerate(layers)
        if plan.layout == IMAGES
        or not isinstance(layer.link.op, Rearrange)
        or isinstance(layer.link.op, merging)
    ]


def _add_weighted(builder: Any, layer: LayerPlan, variant: Variant) -> None:
    op = layer.link.op
    assert isinstance(op, Weighted)
    counts = variant.gradient or not layer.prelude  # below, without a gradient nothing happens
    moves = [counts and name in variant.adapting for name in (op.weight, op.bias)]
    parameters = cpu_features.extension().Parameters(
        has_weight=op.weight is not None,
        has_bias=op.bias is not None,
        weight_adapts=moves[0],
        bias_adapts=moves[1],
        learns=layer.prelude and any(moves),
        learns_rates=not variant.learning.isdisjoint(op.parameters),
        weight_by_number=op.weight in variant.by_number,
        bias_by_number=op.bias in variant.by_number,
        weight_by_step=op.weight in variant.by_step,
        bias_by_step=op.bias in variant.by_step,
        form=layer.form,
        prelude=layer.prelude,
    )
    if isinstance(op, Linear):
        builder.linear(op.in_features, op.out_features_, parameters)
    elif isinstance(op, Conv2d):
        builder.conv(op.in_channels, op.out_channels, op.kernel, op.stride, op.padding, parameters)
    else:
        assert isinstance(op, (BatchNorm, GroupNorm, LayerNorm))
        length = math.prod(op.shape) if isinstance(op, LayerNorm) else op.channels
        groups = op.groups if isinstance(op, GroupNorm) else 1
        features = math.prod(layer.features)
        builder.norm(NORM_KINDS[type(op)], features, length, groups, op.eps, parameters)


NORM_KINDS = {BatchNorm: "batch", GroupNorm: "group", LayerNorm: "layer"}


def _add(builder: Any, layer: LayerPlan, images: bool) -> None:
    """An operation without parameters."""
    op, prelude = layer.link.op, layer.prelude
    if isinstance(op, (MergeRows, SplitRows)) and not images:
        merge = isinstance(op, MergeRows)
        positions = math.prod(layer.features[:-1]) if merge else layer.positions
        builder.reshape(merge=merge, positions=positions, prelude=prelude)
    elif isinstance(op, MergeRows):
        builder.rearrange(shape=list(layer.features[-1:]), prelude=prelude)
    elif isinstance(op, SplitRows):
        builder.rearrange(shape=[*op.positions, *layer.features], prelude=prelude)
    elif isinstance(op, Rearrange):
        builder.rearrange(shape=list(op.out_features(layer.features)), prelude=prelude)
    elif isinstance(op, MaxPool):
        builder.max_pool(prelude=prelude)
    elif isinstance(op, AveragePool):
        builder.average_pool(window=op.kernel, step=op.stride, prelude=prelude)
    elif isinstance(op, GlobalMean):
        size = layer.features[1:]
        builder.average_pool(window=size, step=size, prelude=prelude)
    else:
        assert isinstance(op, Operation) and op.native is not None  # see `refusals`
        name, constants = op.native
        builder.pointwise(name, list(constants), prelude)
