"""The planned engine on Triton's layer kernels, for networks too wide for a kernel of their own.

A block is a linear layer and the activations behind it. Products with shared weights are one large
matrix product over all tasks' rows; then one launch a block and pass adds what a task has of its
own and goes through the activation. Reshapes are views: memory is [T, rows, features] throughout.
Nothing here waits for the device or looks at its numbers, so that a graph can capture a meta-step.

T tasks, N support rows, M query rows, S inner steps; A a layer's input, D the cotangent of its
output z, y = f(z), t_x the tangent of x.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.planned import PlannedStepper, _spec, frozen_stage, through
from maml_fast.backends.triton_factored import FactoredForm, InputForm
from maml_fast.backends.triton_forms import (
    NOWHERE,
    QUERY,
    SUPPORT,
    DenseForm,
    Form,
    SharedForm,
    Use,
    product,
    rate_table,
)
from maml_fast.fast_weights import FastLinear, LinearSpec
from maml_fast.kernels.attend import Terms, attend
from maml_fast.kernels.pointwise import is_curved, keeps_input
from maml_fast.layers import LayerPlan
from maml_fast.losses import LOSSES
from maml_fast.ops import Linear
from maml_fast.ops.reshape import Rearrange
from maml_fast.plan import Plan
from maml_fast.problem import Problem, TaskBatch


@dataclass
class Saved:
    """What one block leaves of one pass over the network."""

    x: Tensor  # A
    kept: Tensor | None  # what f' and f'' are found from
    d: Tensor = field(init=False)
    dy: Tensor | None = None  # where f is curved


@dataclass
class Trace:
    """What an inner step leaves for its Hessian-vector product, block by block."""

    saved: list[Saved]
    loss_state: Tensor


@dataclass
class Block:
    """A linear layer with the pointwise operations behind it, as `kernels.pointwise` has them."""

    layer: Form
    spec: LinearSpec
    ops: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        self.out_features, self.in_features = self.spec.weight.shape
        self.keeps_input, self.curved = keeps_input(self.ops), is_curved(self.ops)

    def shape(self, x: Tensor) -> torch.Size:
        return torch.Size((*x.shape[:2], self.out_features))


class LayerStepper(PlannedStepper):
    """One chunk of tasks, for `stepping.drive`; fast weights are the number of a step.

    precision: of the kernels' products, as `kernels.dots` has it; torch's follow torch's setting.
    rates: those of `rate_table`, for a caller that must not copy from the host now.
    engine: of products with shared weights, as `kernels.matmul` has it.
    """

    def __init__(
        self,
        problem: Problem,
        batch: TaskBatch,
        plan: Plan,
        gradient: bool,
        precision: str,
        rates: Tensor | None = None,
        engine: str = "torch",
    ) -> None:
        assert isinstance(problem.loss, str)  # the plan refuses others
        self.problem, self.batch, self.gradient = problem, batch, gradient
        self.loss, self.precision = LOSSES[problem.loss], precision
        self.second_order = gradient and not problem.first_order
        self.output = plan.output[1:]
        prelude = [frozen_stage(layer, problem) for layer in plan.layers if layer.prelude]
        self.prelude = prelude
        self.support_x = through(prelude, batch.support_x).contiguous()
        self.query_x = through(prelude, batch.query_x).contiguous()
        self.rates = rate_table(problem, plan) if rates is None else rates
        self.product = functools.partial(product, engine=engine, precision=precision)
        self.blocks = self._blocks([layer for layer in plan.layers if not layer.prelude])
        layers = enumerate(block.layer for block in self.blocks)
        self.fast = {i: layer for i, layer in layers if isinstance(layer, FastLinear)}

    def _blocks(self, layers: list[LayerPlan]) -> list[Block]:
        blocks: list[Block] = []
        for layer in layers:
            op = layer.link.op
            if isinstance(op, Linear):
                spec = _spec(op, self.problem, self.batch.tasks)
                if spec.bias is not None:
                    spec = replace(spec, bias=spec.bias.contiguous())
                form = self._form(layer, spec, len(blocks))
                form.product = self.product
                blocks.append(Block(form, spec, ()))
            elif not isinstance(op, Rearrange):
                assert op.native is not None  # the plan refuses others
                name, constants = op.native
                last = blocks[-1]
                blocks[-1] = Block(last.layer, last.spec, (*last.ops, (name, *constants)))
        return blocks

    def _form(self, layer: LayerPlan, spec: LinearSpec, position: int) -> Form:
        if layer.form == "shared":
            return SharedForm(spec)
        if layer.form == "dense":
            return DenseForm(spec)
        rows, query_rows = (
            x.shape[1] * layer.positions for x in (self.batch.support_x, self.batch.query_x)
        )
        query_rows = query_rows if self.gradient else 0
        use = Use(self.rates[position], rows, query_rows, self.second_order, self.precision)
        if position == 0:
            return InputForm(spec, use, self.support_x, self.query_x)
        return FactoredForm(spec, use)

    def _launch(
        self,
        kind: str,
        block: Block,
        terms: Terms,
        shape: torch.Size,
        place: Tensor | None,
        add: bool = False,
        **tensors: Tensor | None,
    ) -> Tensor:
        """One pass through a block's activation, into `place` if that is somewhere."""
        if place is None and not block.ops and terms.is_base:
            assert terms.base is not None
            return terms.base
        out = self.support_x.new_empty(shape) if place is None else place.view(shape)
        added = out if add else None
        attend(kind, terms, block.ops, out, self.precision, add=added, **tensors)
        return out

    def _values(self, step: int, x: Tensor, place: str = NOWHERE) -> tuple[Tensor, list[Saved]]:
        tasks, saved = len(x), []
        x = x.contiguous()
        for i, block in enumerate(self.blocks):
            layer, x = block.layer, x.view(tasks, -1, block.in_features)
            terms, shape = layer.forward_terms(step, x, place), block.shape(x)
            follows = layer.keeps_outputs and place == SUPPORT
            keeps = block.keeps_input and place != NOWHERE
            z = x.new_empty(shape) if block.ops and (keeps or follows) else None
            y = self._launch(
                "forward", block, terms, shape, self._next_place(i, step, place), extra=z
            )
            if follows:
                layer.outputs(y if z is None else z)
            kept = z if block.keeps_input else y
            saved.append(Saved(x, kept if block.ops else None))
            x = y
        return x.view(tasks, -1, *self.output), saved

    def _next_place(self, i: int, step: int, place: str) -> Tensor | None:
        return (
            self.blocks[i + 1].layer.input_place(step, place) if i + 1 < len(self.blocks) else None
        )

    def _cotangents_into(self, saved: list[Saved], step: int, dy: Tensor, place: str) -> None:
        """D of every block; nothing adapts below the first."""
        tasks = len(dy)
        keeps = self.second_order and place == SUPPORT
        terms = Terms(dy.contiguous().view(tasks, -1, self.blocks[-1].out_features))
        for i in range(len(self.blocks) - 1, -1, -1):
            block, own = self.blocks[i], saved[i]
            assert terms.base is not None
            shape = terms.base.shape
            own.dy = dy.new_empty(shape) if block.curved and keeps else None
            to = block.layer.cotangent_place(step, place)
            d = self._launch("backward", block, terms, shape, to, kept=own.kept, extra=own.dy)
            own.d = d.view(tasks, -1, block.out_features)
            if i:
                terms = block.layer.backward_terms(step, own.d)

    def inner_step(self, fast: int, step: int) -> tuple[Tensor, int, Any]:
        z, saved = self._values(step, self.support_x, SUPPORT)
        losses, state = self.loss.value(z, self.batch.support_y)
        if self.blocks:
            dz = self.loss.cotangent(state, self.batch.support_y)
            self._cotangents_into(saved, step, dz, SUPPORT)
        for i, layer in self.fast.items():
            layer.descend(step, saved[i].x, saved[i].d)
        return losses, step + 1, Trace(saved, state)

    def query(self, fast: int, gradient: bool) -> tuple[Tensor, Tensor, None]:
        z, saved = self._values(fast, self.query_x, QUERY if gradient else NOWHERE)
        losses, state = self.loss.value(z, self.batch.query_y)
        if gradient and self.blocks:
            dz = self.loss.cotangent(state, self.batch.query_y)
            self._cotangents_into(saved, fast, dz, QUERY)
            for i, layer in self.fast.items():
                layer.begin_adjoint(saved[i].x, saved[i].d)
        return losses, z, None

    def pull_back(self, adjoint: None, trace: Any, step: int) -> None:
        saved = trace.saved
        for i, layer in self.fast.items():
            if layer.spec.learns_rates:
                layer.add_rate_gradients(step, saved[i].x, saved[i].d)
        if self.problem.first_order or not self.fast:
            return
        tasks = self.batch.tasks
        t_y: Tensor | None = None
        t_inputs, t_zs = [], []
        for i, (block, own) in enumerate(zip(self.blocks, saved, strict=True)):
            t_x = None if t_y is None else t_y.view(tasks, -1, block.in_features)
            terms = block.layer.tangent_terms(step, own.x, own.d, t_x)
            shape = own.d.shape
            t_z = own.d.new_empty(shape) if block.curved else None
            to = self.blocks[i + 1].layer.t_input_place(step) if i + 1 < len(saved) else None
            t_y = self._launch("tangent", block, terms, shape, to, kept=own.kept, extra=t_z)
            t_inputs.append(t_x)
            t_zs.append(t_z)
        assert t_y is not None
        t_dy = self.loss.tangent(trace.loss_state, t_y.view(tasks, -1, *self.output))
        terms = Terms(t_dy.contiguous().view(tasks, -1, self.blocks[-1].out_features))
        for i in range(len(self.blocks) - 1, -1, -1):
            block, own = self.blocks[i], saved[i]
            assert terms.base is not None
            to, add = block.layer.t_cotangent_place(step)
            bent = dict(kept=own.kept, t_z=t_zs[i], dx=own.dy)
            t_d = self._launch("tangent_backward", block, terms, terms.base.shape, to, add, **bent)
            t_d = t_d.view(tasks, -1, block.out_features)
            if i:
                terms = block.layer.tangent_backward_terms(step, own.d, t_d)
            if i in self.fast:
                self.fast[i].pull_back(step, own.x, own.d, t_inputs[i], t_d)
