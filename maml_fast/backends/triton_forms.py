"""The forms of a linear layer's weights for the Triton layer kernels: what each pass sums.

T tasks, N support rows, M query rows, S inner steps, I/O in and out features of a layer;
A [T, N, I] its input, D [T, N, O] the cotangent of its output, t_x the tangent of x. A form does
not run its passes: it names the terms, a product with the weights and factors of corrections, and
the places where its factors belong, so that the kernel that computes an A, a D or a tangent of
theirs puts it where later passes read it. Here are the forms without factors, and what factors lie
in; `triton_factored` has the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_fast.fast_weights import DenseLinear, LinearSpec, SharedLinear
from maml_fast.kernels import matmul
from maml_fast.kernels.attend import Terms
from maml_fast.ops import Linear
from maml_fast.plan import Plan
from maml_fast.problem import Problem

SUPPORT, QUERY, NOWHERE = "support", "query", ""  # whose rows a pass is for; "": no gradient's


Product = Callable[[Tensor, Tensor], Tensor]


def product(x: Tensor, weight: Tensor, engine: str = "torch", precision: str = "tf32x3") -> Tensor:
    """One product over all tasks' rows: [T, rows, F], [F, O] -> [T, rows, O]"""
    found = matmul.product(x.flatten(0, 1), weight, engine=engine, precision=precision)
    return found.unflatten(0, x.shape[:2])


class Form:
    """What a layer adds to each pass, before the activation. A place of None is anywhere."""

    keeps_outputs = False  # whether `outputs` is to be told
    product: Product = staticmethod(product)

    def forward_terms(self, step: int, x: Tensor, place: str) -> Terms:
        """z"""
        raise NotImplementedError

    def backward_terms(self, step: int, d: Tensor) -> Terms:
        """dx"""
        raise NotImplementedError

    def tangent_terms(self, step: int, x: Tensor, d: Tensor, t_x: Tensor | None) -> Terms:
        """t_z"""
        raise NotImplementedError

    def tangent_backward_terms(self, step: int, d: Tensor, t_d: Tensor) -> Terms:
        """t_dx"""
        raise NotImplementedError

    def outputs(self, z: Tensor) -> None:
        """The z of the support's rows at the latest inner step."""

    def input_place(self, step: int, place: str) -> Tensor | None:
        return None

    def cotangent_place(self, step: int, place: str) -> Tensor | None:
        return None

    def t_input_place(self, step: int) -> Tensor | None:
        return None

    def t_cotangent_place(self, step: int) -> tuple[Tensor | None, bool]:
        """And whether t_D is to be added to what is there."""
        return None, False


class SharedForm(SharedLinear, Form):
    """A layer that does not adapt."""

    def forward_terms(self, step: int, x: Tensor, place: str) -> Terms:
        return Terms(self.product(x, self.spec.weight.mT), self.spec.bias)

    def backward_terms(self, step: int, d: Tensor) -> Terms:
        return Terms(self.product(d, self.spec.weight))

    def tangent_terms(self, step: int, x: Tensor, d: Tensor, t_x: Tensor | None) -> Terms:
        assert t_x is not None  # the first layer adapts
        return Terms(self.product(t_x, self.spec.weight.mT))

    def tangent_backward_terms(self, step: int, d: Tensor, t_d: Tensor) -> Terms:
        return Terms(self.product(t_d, self.spec.weight))


class DenseForm(DenseLinear, Form):
    """Weights [T, O, I]: batched products by torch. Rates are numbers in its calls."""

    def forward_terms(self, step: int, x: Tensor, place: str) -> Terms:
        if step:
            return Terms(self.forward(step, x)[0])
        return Terms(self.product(x, self.spec.weight.mT), self.spec.bias)

    def backward_terms(self, step: int, d: Tensor) -> Terms:
        return Terms(self.backward(step, d, d) if step else self.product(d, self.spec.weight))

    def tangent_terms(self, step: int, x: Tensor, d: Tensor, t_x: Tensor | None) -> Terms:
        return Terms(self.tangent(step, x, d, t_x))

    def tangent_backward_terms(self, step: int, d: Tensor, t_d: Tensor) -> Terms:
        return Terms(self.tangent_backward(step, d, d, None, t_d))


@dataclass(frozen=True)
class Use:
    """How a layer is used in a meta-step."""

    rates: Tensor  # [2, S] of weight and bias, on the device
    rows: int  # N, times the layer's positions
    query_rows: int  # M, likewise; 0 where no gradient is wanted
    second_order: bool
    precision: str


class Chunks:
    """Rows of all tasks in one piece of memory: [T, N, F] of steps, [T, M, F], [T, N, F] of steps.

    `before` and `behind` say of how many steps; a chunk per step and not per task, so that all
    tasks' rows of a step are one matrix.
    """

    def __init__(self, spec: LinearSpec, use: Use, features: int, before: int, behind: int) -> None:
        self.tasks, self.rows, self.query_rows = spec.tasks, use.rows, use.query_rows
        self.features, self.size = features, spec.tasks * use.rows * features
        self.query_at = before * self.size
        self.behind_at = self.query_at + spec.tasks * use.query_rows * features
        self.flat = spec.weight.new_empty(self.behind_at + behind * self.size)

    def before(self, step: int) -> Tensor:
        return self._view(step * self.size, self.rows)

    def query(self) -> Tensor:
        return self._view(self.query_at, self.query_rows)

    def behind(self, step: int) -> Tensor:
        return self._view(self.behind_at + step * self.size, self.rows)

    def _view(self, start: int, rows: int) -> Tensor:
        size = self.tasks * rows * self.features
        return self.flat[start : start + size].view(self.tasks, rows, self.features)

    def all_before(self) -> Tensor:
        """[S * T * N, F]"""
        return self.flat[: self.query_at].view(-1, self.features)

    def all_behind(self) -> Tensor:
        """[S * T * N, F]"""
        return self.flat[self.behind_at :].view(-1, self.features)


def rate_table(problem: Problem, plan: Plan) -> Tensor:
    """The rates of each linear layer's weight and bias, on the device: [layers, 2, S]."""
    values, still = problem.rates.values, (0.0,) * problem.inner_steps
    ops = [layer.link.op for layer in plan.layers if not layer.prelude]
    table = [
        [values.get(name, still) if name else still for name in (op.weight, op.bias)]
        for op in ops
        if isinstance(op, Linear)
    ]
    return torch.tensor(table, dtype=torch.float32, device=plan.shapes.device)
