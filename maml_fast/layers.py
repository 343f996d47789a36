"""A model as a chain of planned layers: what runs, on which rows, and what of it adapts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from maml_fast.cost import Cost, LayerUse
from maml_fast.losses import LOSSES
from maml_fast.ops import (
    BatchNorm,
    Conv2d,
    Features,
    Flatten,
    Linear,
    MergeRows,
    Reshape,
    SplitRows,
    Weighted,
)
from maml_fast.problem import Problem, TaskBatch
from maml_fast.trace import Link, trace


@dataclass(frozen=True)
class Asked:
    """What the user asked for; the options of `MAML` that a plan depends on."""

    loss: str | int  # a name; of a callable, its id
    inner_steps: int
    first_order: bool
    backend: str
    fast_weights: str
    chunk_size: int | None
    precision: str = "highest"  # torch.get_float32_matmul_precision(); of Triton's kernels
    cuda_graphs: bool = True


@dataclass(frozen=True)
class Shapes:
    """What a plan depends on beside the model: one task's rows, and how many tasks."""

    tasks: int
    support: tuple[int, ...]  # [N, *features]
    query: tuple[int, ...]  # [M, *features]
    dtype: torch.dtype
    device: torch.device


class Variant(NamedTuple):
    """What a compiled program depends on beside the layers."""

    loss: str
    inner_steps: int
    rows: int
    query_rows: int
    first_order: bool
    gradient: bool
    exports: bool  # of the adapted parameters
    adapting: tuple[str, ...]
    learning: frozenset[str]  # parameters whose rates want a gradient

    @classmethod
    def of(
        cls, problem: Problem, batch: TaskBatch, gradient: bool, exports: bool = False
    ) -> Variant:
        """What runs for a batch."""
        assert isinstance(problem.loss, str)  # the plan refuses others
        return cls(
            problem.loss,
            problem.inner_steps,
            batch.support_x.shape[1],
            batch.query_x.shape[1],
            problem.first_order,
            gradient,
            exports,
            tuple(problem.rates.values),
            problem.rates.learning if gradient else frozenset(),
        )

    @classmethod
    def planned(cls, asked: Asked, shapes: Shapes, adapting: Collection[str]) -> Variant:
        """What a plan is made for: gradients, of parameters alone."""
        assert isinstance(asked.loss, str)  # `plan_layers` refuses others
        return cls(
            asked.loss,
            asked.inner_steps,
            shapes.support[0],
            shapes.query[0],
            asked.first_order,
            gradient=True,
            exports=False,
            adapting=tuple(adapting),
            learning=frozenset(),
        )


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


def plan_layers(
    model: nn.Module, asked: Asked, shapes: Shapes, adapting: Collection[str]
) -> tuple[list[LayerPlan], list[str]]:
    """The layers, without the forms of those that adapt; or why the model cannot be planned."""
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
        if not isinstance(link.op, Weighted):
            layers.append(LayerPlan(link, features, 1, prelude, ""))
            features = after
            continue
        adapts = not set(link.op.parameters).isdisjoint(adapting)
        before, prelude = prelude, prelude and not adapts
        plan = _plan_weighted(link, features, adapts, before, asked, shapes)
        if isinstance(link.op, Linear) and len(features) > 1:
            merge, split = Link(link.name, MergeRows()), Link(link.name, SplitRows(features[:-1]))
            layers.append(LayerPlan(merge, features, 1, before, ""))
            layers.append(plan)
            layers.append(LayerPlan(split, after[-1:], plan.positions, prelude, ""))
        else:
            layers.append(plan)
        features = after
    return layers, []


def centred_by(layers: Sequence[LayerPlan]) -> str:
    """The name of a batch norm that takes away what all rows of a task's data have in common, as it
    comes next to a linear layer that takes the data; "" if there is none.

    Such data may be handed over less their mean over the rows: nothing else changes, for cotangents
    behind a batch norm add up to 0 over the rows, and D^T (A - mean) = D^T A. It matters where the
    mean is large beside the rest, as of images: the digits that go into it, in weights' Gram blocks
    above all, are lost to what the norm leaves.
    """
    flat = [layer for layer in layers if not isinstance(layer.link.op, (Flatten, Reshape))]
    if len(flat) < 2 or not isinstance(flat[0].link.op, Linear):
        return ""
    return flat[1].link.name if isinstance(flat[1].link.op, BatchNorm) else ""


def _plan_weighted(
    link: Link, features: Features, adapts: bool, before: bool, asked: Asked, shapes: Shapes
) -> LayerPlan:
    """A layer with parameters; `before`: nothing below it adapts.

    The form of a linear layer that adapts is chosen later, by backend; others' are dense.
    """
    op = link.op
    if isinstance(op, Linear):
        sizes, positions = (op.in_features, op.out_features_), math.prod(features[:-1])
    elif isinstance(op, Conv2d):
        sizes = op.in_channels * op.kernel**2, op.out_channels
        positions = math.prod(op.out_features(features)[1:])
    else:
        return LayerPlan(link, features, 1, before and not adapts, "dense" if adapts else "shared")
    if not adapts:
        return LayerPlan(link, features, positions, before, "shared")
    use = LayerUse(
        *sizes,
        shapes.support[0] * positions,
        shapes.query[0] * positions,
        asked.inner_steps,
        asked.first_order,
        first=before,
        factors=isinstance(op, Linear),
    )
    return LayerPlan(link, features, positions, False, "", use=use)
