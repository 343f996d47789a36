"""The meta-step in C++: a plan and its tensors become one call of `maml_fast._cpu`.

Everything of a tile of tasks, inner steps, query and Hessian-vector products, runs inside that call
(csrc/tile.h). Here are only sizes, addresses, and the tensors that the results go to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maml_fast import cpu_features
from maml_fast.ops import Linear, MergeRows, SplitRows
from maml_fast.plan import Plan
from maml_fast.problem import Outcome, Problem, TaskBatch


@dataclass(frozen=True)
class Variant:
    """What a program depends on beside the plan's layers."""

    loss: str
    inner_steps: int
    rows: int
    query_rows: int
    first_order: bool
    gradient: bool
    exports: bool  # of the adapted parameters
    learning: frozenset[str]  # parameters whose rates want a gradient


def meta_step(problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> Outcome:
    """The whole meta-step of all tasks, in one call."""
    variant = _variant(problem, batch, gradient=gradient, exports=False)
    gradient = variant.gradient
    outputs = batch.query_x.new_empty(batch.tasks, batch.query_x.shape[1], *plan.output[1:])
    outcome = Outcome(
        batch.query_x.new_empty(batch.tasks),
        batch.query_x.new_empty(batch.tasks, problem.inner_steps),
        outputs,
    )
    if gradient:
        outcome.gradients, outcome.rate_gradients = _run(plan, problem, batch, variant, outcome)
    else:
        _run(plan, problem, batch, variant, outcome)
    return outcome


class AdaptedByCpu:
    """Adapted models of all tasks. The inner steps are run again for each query: no task's weights
    are kept."""

    def __init__(
        self, plan: Plan, problem: Problem, support_x: Tensor, support_y: Tensor
    ) -> None:
        self._plan, self._problem = plan, problem
        self._support_x, self._support_y = support_x, support_y.clone()
        self.support_losses = self._outcome(support_x[:, :1]).support_losses

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        return self._outcome(query_x).query_outputs

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        query_x, tasks = self._support_x[:, :1], len(self._support_x)
        found = {
            name: tensor.expand(tasks, *tensor.shape)
            for name, tensor in self._problem.parameters.items()
        }
        adapted = {
            name: query_x.new_empty(tasks, *self._problem.parameters[name].shape)
            for layer in self._plan.layers
            if isinstance(layer.link.op, Linear) and layer.form != "shared"
            for name in (layer.link.op.weight, layer.link.op.bias)
            if name is not None
        }
        self._outcome(query_x, adapted)
        return found | adapted

    def _outcome(self, query_x: Tensor, adapted: dict[str, Tensor] | None = None) -> Outcome:
        problem, plan = self._problem, self._plan
        batch = TaskBatch(self._support_x, self._support_y, query_x, query_x)
        variant = _variant(problem, batch, gradient=False, exports=adapted is not None)
        outcome = Outcome(
            query_x.new_empty(0),
            query_x.new_empty(batch.tasks, problem.inner_steps),
            query_x.new_empty(batch.tasks, query_x.shape[1], *plan.output[1:]),
        )
        _run(plan, problem, batch, variant, outcome, adapted or {}, query_loss=False)
        return outcome


def _variant(problem: Problem, batch: TaskBatch, gradient: bool, exports: bool) -> Variant:
    assert isinstance(problem.loss, str)  # the plan refuses others
    return Variant(
        problem.loss,
        problem.inner_steps,
        batch.support_x.shape[1],
        batch.query_x.shape[1],
        problem.first_order,
        gradient,
        exports,
        problem.rates.learning if gradient else frozenset(),
    )


def _run(
    plan: Plan,
    problem: Problem,
    batch: TaskBatch,
    variant: Variant,
    outcome: Outcome,
    adapted: dict[str, Tensor] | None = None,
    query_loss: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the program into the tensors of `outcome`; returns gradients of parameters and rates."""
    prepared = plan.programs.get(variant)
    if prepared is None:
        prepared = plan.programs[variant] = prepare(plan, variant)
    alive: list[Tensor] = []  # what addresses point to, until the call is over

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        alive.append(tensor)
        return tensor.data_ptr()

    gradients = _gradient_views(problem, batch.query_x) if variant.gradient else {}
    rate_gradients: dict[str, Tensor] = {}
    adapted = adapted or {}
    addresses = [
        address(batch.support_x),
        address(batch.support_y),
        address(batch.query_x),
        address(batch.query_y if query_loss else None),
        address(outcome.task_losses),
        address(outcome.support_losses),
        address(outcome.query_outputs),
    ]
    rates = []
    for layer in plan.layers:
        op = layer.link.op
        if not isinstance(op, Linear):
            continue
        by_step = None
        if not variant.learning.isdisjoint((op.weight, op.bias)):
            by_step = torch.empty(2, variant.inner_steps, dtype=torch.float64)
            rate_gradients |= {op.weight: by_step[0]} | ({op.bias: by_step[1]} if op.bias else {})
        bias = None if op.bias is None else problem.parameters[op.bias]
        addresses += [
            address(problem.parameters[op.weight]),
            address(bias),
            address(gradients.get(op.weight)),
            address(gradients.get(op.bias or "")),
            address(by_step),
            address(adapted.get(op.weight)),
            address(adapted.get(op.bias or "")),
        ]
        values = problem.rates.values
        rates.append((values.get(op.weight, ()), values.get(op.bias or "", ())))
    prepared.run(batch.tasks, addresses, rates, torch.get_num_threads())
    used = {name for layer in plan.layers for name in _names(layer.link.op)}
    for name, gradient in gradients.items():
        if name not in used:
            gradient.zero_()
    like = batch.query_x
    return gradients, {
        name: rate_gradients[name].to(like.dtype)
        if name in rate_gradients
        else like.new_zeros(variant.inner_steps)
        for name in variant.learning
    }


def _gradient_views(problem: Problem, like: Tensor) -> dict[str, Tensor]:
    """One tensor of all gradients, and a view of it for each parameter that adapts."""
    parameters = [problem.parameters[name] for name in problem.adapting]
    sizes = [parameter.numel() for parameter in parameters]
    pieces = like.new_empty(sum(sizes)).split(sizes)
    return {
        name: piece.view(parameter.shape)
        for name, piece, parameter in zip(problem.adapting, pieces, parameters, strict=True)
    }


def _names(op: Any) -> tuple[str, ...]:
    return tuple(filter(None, (op.weight, op.bias))) if isinstance(op, Linear) else ()


def prepare(plan: Plan, variant: Variant) -> Any:
    """The `_cpu.Prepared` of a plan."""
    assert plan.cpu is not None
    extension = cpu_features.extension()
    builder = extension.Builder(
        loss=variant.loss,
        layout=plan.cpu.layout,
        steps=variant.inner_steps,
        rows=variant.rows,
        query_rows=variant.query_rows,
        in_features=math.prod(plan.shapes.support[1:]),
        out_features=math.prod(plan.output[1:]),
        first_order=variant.first_order,
        gradient=variant.gradient,
        exports=variant.exports,
    )
    for layer in plan.layers:
        op, prelude = layer.link.op, layer.prelude
        if isinstance(op, Linear):
            builder.linear(
                in_features=op.in_features,
                out_features=op.out_features_,
                has_bias=op.bias is not None,
                form=layer.form,
                prelude=prelude,
                learns_rates=not variant.learning.isdisjoint((op.weight, op.bias)),
            )
        elif isinstance(op, (MergeRows, SplitRows)):
            merge = isinstance(op, MergeRows)
            positions = math.prod(layer.features[:-1]) if merge else layer.positions
            builder.reshape(merge=merge, positions=positions, prelude=prelude)
        else:
            assert op.native is not None  # the plan refuses others
            name, constants = op.native
            if name != "reshape":  # those keep the order of a row's features
                builder.pointwise(name, list(constants), prelude)
    return builder.prepare(plan.cpu.instruction_set, plan.shapes.dtype == torch.float64)
