"""The planned engine on Triton's layer kernels, for networks too large for a kernel of their own.

The blocks of `triton_chain` run one after the other, each in a launch or a few a pass. Memory is
[T, rows, width] throughout. Nothing here waits for the device or looks at its numbers, so that a
graph can capture a meta-step.

T tasks, N support rows, M query rows, S inner steps; t_x is the tangent of x.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from maml_fast.backends.planned import PlannedStepper, frozen_stage, through
from maml_fast.backends.specs import spec_of
from maml_fast.backends.triton_chain import Chain
from maml_fast.backends.triton_conv import FrozenConv
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
from maml_fast.backends.triton_rearrange import ChannelsLast
from maml_fast.fast_weights import LayerSpec, LinearSpec
from maml_fast.kernels.attend import Terms
from maml_fast.layers import LayerPlan
from maml_fast.losses import LOSSES, WeightedRows
from maml_fast.ops import Conv2d, Linear, Stage, Weighted
from maml_fast.plan import Plan
from maml_fast.problem import Problem, TaskBatch


@dataclass
class Trace:
    """What an inner step leaves for its Hessian-vector product, block by block."""

    saved: list[Any]
    loss_state: Tensor


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
        rules, self.precision = LOSSES[problem.loss], precision
        self.losses = (
            WeightedRows(rules, batch.support_weight),
            WeightedRows(rules, batch.query_weight),
        )
        self.second_order = gradient and not problem.first_order
        self.output = plan.output[1:]
        self.prelude = [self._frozen(layer) for layer in plan.layers if layer.prelude]
        self.support_x = through(self.prelude, batch.support_x).contiguous()
        self.query_x = through(self.prelude, batch.query_x).contiguous()
        self.rates = rate_table(problem, plan) if rates is None else rates
        self.product = functools.partial(product, engine=engine, precision=precision)
        adapting = [layer for layer in plan.layers if not layer.prelude]
        self.linear = [layer.link.op for layer in adapting if isinstance(layer.link.op, Linear)]
        chain = Chain(self._spec, self._form, precision, self.second_order)
        self.blocks = chain.of(adapting)
        if chain.takes_channels_last:
            turn = ChannelsLast()
            self.prelude.append(turn)
            self.support_x, self.query_x = (
                through([turn], x).contiguous() for x in (self.support_x, self.query_x)
            )
        layers = enumerate(block.layer for block in self.blocks)
        self.fast = {i: layer for i, layer in layers if layer is not None}

    def _frozen(self, layer: LayerPlan) -> Stage:
        """In front of all that adapts. torch may round a convolution's numbers to TF32."""
        op = layer.link.op
        if isinstance(op, Conv2d):
            return FrozenConv(self._spec(op), self.precision)
        return frozen_stage(layer, self.problem)

    def _spec(self, op: Weighted) -> LayerSpec:
        return spec_of(op, self.problem, self.batch.tasks)

    def _form(self, layer: LayerPlan, is_first: bool) -> Form:
        op = layer.link.op
        assert isinstance(op, Linear)
        spec = self._spec(op)
        assert isinstance(spec, LinearSpec)
        if spec.bias is not None:
            spec = replace(spec, bias=spec.bias.contiguous())
        form = self._form_of(layer, spec, self.rates[self.linear.index(op)], is_first)
        form.product = self.product
        return form

    def _form_of(self, layer: LayerPlan, spec: LinearSpec, rates: Tensor, is_first: bool) -> Form:
        if layer.form == "shared":
            return SharedForm(spec)
        if layer.form == "dense":
            return DenseForm(spec)
        rows, query_rows = (
            x.shape[1] * layer.positions for x in (self.batch.support_x, self.batch.query_x)
        )
        query_rows = query_rows if self.gradient else 0
        use = Use(rates, rows, query_rows, self.second_order, self.precision)
        if is_first:
            return InputForm(spec, use, self.support_x, self.query_x)
        return FactoredForm(spec, use)

    def _values(self, step: int, x: Tensor, place: str = NOWHERE) -> tuple[Tensor, list[Any]]:
        tasks, saved = len(x), []
        x = x.contiguous()
        for i, block in enumerate(self.blocks):
            last = i + 1 == len(self.blocks)
            to = None if last else self.blocks[i + 1].input_place(step, place)
            x, kept = block.forward(step, x.view(tasks, -1, block.width), place, to)
            saved.append(kept)
        return x.view(tasks, -1, *self.output), saved

    def _cotangents_into(self, saved: list[Any], step: int, dy: Tensor, place: str) -> None:
        """Through every block; nothing adapts below the first."""
        terms: Terms | None = Terms(self._as_rows(dy))
        for i in range(len(self.blocks) - 1, -1, -1):
            assert terms is not None
            terms = self.blocks[i].backward(step, saved[i], terms, place, goes_on=i > 0)

    def _as_rows(self, dy: Tensor) -> Tensor:
        """[T, rows, features of a prediction]"""
        return dy.contiguous().view(len(dy), -1, self.output[-1] if self.output else 1)

    def inner_step(self, fast: int, step: int) -> tuple[Tensor, int, Any]:
        z, saved = self._values(step, self.support_x, SUPPORT)
        losses, state = self.losses[0].value(z, self.batch.support_y)
        if self.blocks:
            dz = self.losses[0].cotangent(state, self.batch.support_y)
            self._cotangents_into(saved, step, dz, SUPPORT)
        for i in self.fast:
            self.blocks[i].descend(step, saved[i])
        return losses, step + 1, Trace(saved, state)

    def query(
        self, fast: int, weight: float, gradient: bool, adjoint: None
    ) -> tuple[Tensor, Tensor, None]:
        z, saved = self._values(fast, self.query_x, QUERY if gradient else NOWHERE)
        losses, state = self.losses[1].value(z, self.batch.query_y)
        assert weight == 1  # the plan refuses others
        if gradient and self.blocks:
            dz = self.losses[1].cotangent(state, self.batch.query_y)
            self._cotangents_into(saved, fast, dz, QUERY)
            for i in self.fast:
                self.blocks[i].begin_adjoint(saved[i])
        return losses, z, None

    def pull_back(self, adjoint: None, trace: Any, step: int) -> None:
        saved = trace.saved
        for i, layer in self.fast.items():
            if layer.spec.learns_rates:
                self.blocks[i].add_rate_gradients(step, saved[i])
        if self.problem.first_order or not self.fast:
            return
        tasks = self.batch.tasks
        t_y: Tensor | None = None
        for i, (block, own) in enumerate(zip(self.blocks, saved, strict=True)):
            t_x = None if t_y is None else t_y.view(tasks, -1, block.width)
            to = self.blocks[i + 1].t_input_place(step) if i + 1 < len(saved) else None
            t_y = block.tangent(step, own, t_x, to)
        assert t_y is not None
        t_dy = self.losses[0].tangent(trace.loss_state, t_y.view(tasks, -1, *self.output))
        terms: Terms | None = Terms(self._as_rows(t_dy))
        for i in range(len(self.blocks) - 1, -1, -1):
            assert terms is not None
            terms = self.blocks[i].tangent_backward(step, saved[i], terms, goes_on=i > 0)
