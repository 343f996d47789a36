"""A model as a chain of planned layers: what runs, on which rows, and what of it adapts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from maml_fast.cost import Cost, LayerUse
from maml_fast.inner import SGD, InnerRule
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
from maml_fast.outer import Implicit, MetaGradient
from maml_fast.problem import Problem, TaskBatch
from maml_fast.trace import Link, trace

WEIGHTED_ROWS, LOSSES_OF_STEPS = "weights of rows", "step_weights"  # in words


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
    adapting: tuple[str, ...] = ()  # parameters that adapt
    learned: tuple[str, ...] = ()  # that get a meta-gradient
    by_number: frozenset[str] = frozenset()  # that have a rate for each number
    learns_rates: bool = False
    rule: InnerRule = field(default_factory=SGD)
    step_weights: tuple[float, ...] = ()
    weighted_rows: bool = False
    wants_inputs: bool = False
    outer: MetaGradient | None = None
    by_step: tuple[str, ...] = ()  # parameters that have values for each step

    def unusual(self) -> list[str]:
        """What is asked for, in words, beyond inner steps of theta - eta g with a number eta, the
        last one's query loss, and rows that count alike."""
        found = []
        if self.rule != SGD():
            found.append(f"inner_optimizer {self.rule}")
        if self.by_number:
            found.append("rates for single numbers")
        if self.step_weights:
            found.append(LOSSES_OF_STEPS)
        if self.weighted_rows:
            found.append(WEIGHTED_ROWS)
        if self.wants_inputs:
            found.append("gradients by the inputs")
        if self.by_step:
            found.append("step_params")
        return found

    def may_be_factored(self, names: Collection[str]) -> bool:
        """Whether a layer's weights stay sums of outer products, with what the adjoint asks."""
        if not self.by_number.isdisjoint(names):
            return False
        return self.rule == SGD() or not self.learns_rates


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
    rule: InnerRule = SGD()
    inputs: bool = False  # gradients by the data are wanted
    by_number: frozenset[str] = frozenset()  # parameters that have a rate for each number
    by_step: frozenset[str] = frozenset()  # that have values for each step

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
            problem.rule,
            gradient and problem.wants_inputs,
            problem.rates.by_number,
            frozenset(problem.by_step),
        )

    @classmethod
    def planned(cls, asked: Asked, shapes: Shapes, adapting: Collection[str]) -> Variant:
        """What a plan is made for: gradients, of parameters, and by data that want one."""
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
            rule=asked.rule,
            inputs=asked.wants_inputs,
            by_number=asked.by_number.intersection(adapting),
            by_step=frozenset(asked.by_step),
        )


@dataclass(frozen=True)
class LayerPlan:
    """One operation of the chain, in order."""

    link: Link
    features: Features  # of a row that enters
    positions: int  # rows of the operation for a row of the data
    prelude: bool  # runs once, before anything that adapts or learns
    form: str  # "factored", "dense", "shared", or "" for operations without weights
    cost: Cost | None = None
    use: LayerUse | None = None  # of a layer that adapts or learns
    still: bool = False  # it learns and does not adapt; of the form "shared", only once


@dataclass(frozen=True)
class Layers:
    """A model's layers. Those of the body lie below all that adapts, and are differentiated once,
    behind the meta-step of the others."""

    body: list[LayerPlan]
    above: list[LayerPlan]

    def entering(self, rows: tuple[int, ...]) -> Features:
        """Of a row that enters those above the body; `rows`: [N, *features] of the data."""
        if self.above:
            return self.above[0].features
        last = self.body[-1] if self.body else None
        return last.link.op.out_features(last.features) if last else rows[1:]

    def moving(self, asked: Asked) -> list[str]:
        """The parameters that the meta-step above the body adapts, or sums a gradient of."""
        below = {
            name
            for layer in self.body
            if isinstance(layer.link.op, Weighted)
            for name in layer.link.op.parameters
        }
        both = dict.fromkeys((*asked.adapting, *asked.learned))
        return [name for name in both if name not in below]


def plan_layers(
    model: nn.Module, asked: Asked, shapes: Shapes, with_body: bool = True
) -> tuple[Layers, list[str]]:
    """The layers, without the forms of those that adapt; or why the model cannot be planned.

    Without a body, what would be in it adapts at rate 0.
    """
    chain = trace(model)
    refusals = list(chain.refusals)
    if not isinstance(asked.loss, str):
        refusals.append(f"loss is a callable; planned are {', '.join(LOSSES)}")
    if not isinstance(asked.rule, SGD) or not asked.rule.linear:
        refusals.append(
            f"inner_optimizer {asked.rule} is not planned; planned is SGD, with momentum and "
            "weight decay"
        )
    if isinstance(asked.outer, Implicit):
        refusals.append("meta_gradient Implicit runs on backends functional and reference")
    if shapes.dtype not in (torch.float32, torch.float64):
        refusals.append(f"the data are {shapes.dtype}; planned are float32 and float64")
    if refusals:
        return Layers([], []), refusals
    layers: list[LayerPlan] = []
    features: Features = shapes.support[1:]
    height = _body_height(chain.links, asked) if with_body else 0
    prelude = True
    for i, link in enumerate(chain.links):
        try:
            after = link.op.out_features(features)
        except ValueError as reason:
            return Layers([], []), [f"layer '{link.name}' ({link.op}): {reason}"]
        if i == height:
            body, layers, prelude = layers, [], True
        if not isinstance(link.op, Weighted):
            layers.append(LayerPlan(link, features, 1, prelude, ""))
            features = after
            continue
        own = set(link.op.parameters)
        if not own.isdisjoint(asked.by_step) and not own.isdisjoint(asked.adapting):
            return Layers([], []), [
                f"layer '{link.name}' ({link.op}): some of its parameters adapt and others have "
                "values for each step; that runs on backends functional and reference"
            ]
        learns = not {*asked.adapting, *asked.learned}.isdisjoint(link.op.parameters)
        adapts = learns and i >= height
        before, prelude = prelude, prelude and not adapts
        first = before and not (height or asked.wants_inputs)
        plan = _plan_weighted(link, features, learns, adapts, before, first, asked, shapes)
        if isinstance(link.op, Linear) and len(features) > 1:
            merge, split = Link(link.name, MergeRows()), Link(link.name, SplitRows(features[:-1]))
            layers.append(LayerPlan(merge, features, 1, before, ""))
            layers.append(plan)
            layers.append(LayerPlan(split, after[-1:], plan.positions, prelude, ""))
        else:
            layers.append(plan)
        features = after
    if len(chain.links) == height:
        body, layers = layers, []
    return Layers(body, layers), []


def _body_height(links: Sequence[Link], asked: Asked) -> int:
    """How many links the body has: what learns and does not adapt, below all that does or has
    values for each step; with gradients by the inputs, whatever runs once."""
    lowest = len(links)
    learns = asked.wants_inputs
    for i, link in enumerate(links):
        if isinstance(link.op, Weighted):
            if not set(link.op.parameters).isdisjoint((*asked.adapting, *asked.by_step)):
                lowest = i
                break
            learns = learns or not set(link.op.parameters).isdisjoint(asked.learned)
    return lowest if learns else 0


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


def product_of(op: Linear | Conv2d) -> tuple[int, int]:
    """Numbers that go into one row or position of the result, and that come out."""
    if isinstance(op, Linear):
        return op.in_features, op.out_features_
    return op.in_channels * op.kernel**2, op.out_channels


def _plan_weighted(
    link: Link,
    features: Features,
    learns: bool,
    adapts: bool,
    before: bool,
    first: bool,
    asked: Asked,
    shapes: Shapes,
) -> LayerPlan:
    """A layer with parameters; `adapts`: in the meta-step, if at rate 0; `before`: nothing below it
    does; `first`: nor learns.

    The form of a linear layer that adapts is chosen later, by backend; others' are dense.
    """
    op = link.op
    assert isinstance(op, Weighted)
    still = learns and set(op.parameters).isdisjoint(asked.adapting)
    if isinstance(op, Linear):
        positions = math.prod(features[:-1])
    elif isinstance(op, Conv2d):
        positions = math.prod(op.out_features(features)[1:])
    else:
        form = "dense" if adapts else "shared"
        return LayerPlan(link, features, 1, before and not adapts, form, still=still)
    if not adapts:
        return LayerPlan(link, features, positions, before, "shared", still=still)
    use = LayerUse(
        *product_of(op),
        shapes.support[0] * positions,
        shapes.query[0] * positions,
        asked.inner_steps,
        asked.first_order,
        first=first,
        factors=isinstance(op, Linear) and asked.may_be_factored(op.parameters),
    )
    return LayerPlan(link, features, positions, False, "", use=use, still=still)
