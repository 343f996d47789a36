"""What the Triton layer kernels run as one: a block of a network, and its passes.

T tasks; A a layer's input, D the cotangent of its output z, y = f(z), t_x the tangent of x. A block
sees rows [T, rows, width], of images the pixels, and hands on rows that the next one sees in its
own width. What it needs of an earlier pass is in `saved`, which it makes and no one else looks
into. A cotangent comes as terms that may not be summed yet, so that the launch that goes through an
activation sums them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.triton_forms import NOWHERE, SUPPORT, Form
from maml_fast.fast_weights import FastLayer
from maml_fast.kernels.attend import Terms, attend
from maml_fast.kernels.pointwise import is_curved, keeps_input
from maml_fast.ops import Linear


class Block:
    """One block; `layer` is what of it adapts. `to` is where a result belongs; None: anywhere."""

    width: int
    layer: FastLayer | None = None

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Any]:
        """y, and what the other passes need."""
        raise NotImplementedError

    def backward(self, step: int, saved: Any, dy: Terms, place: str, goes_on: bool) -> Terms | None:
        """dx, unless nothing below adapts; `saved` gets what the layer's gradient is made of."""
        raise NotImplementedError

    def tangent(self, step: int, saved: Any, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        """t_y"""
        raise NotImplementedError

    def tangent_backward(self, step: int, saved: Any, t_dy: Terms, goes_on: bool) -> Terms | None:
        """t_dx, unless nothing below adapts; the layer's adjoint is pulled back."""
        raise NotImplementedError

    def descend(self, step: int, saved: Any) -> None:
        """The layer's inner step."""

    def begin_adjoint(self, saved: Any) -> None:
        """The layer's adjoint is the query's gradient."""

    def add_rate_gradients(self, step: int, saved: Any) -> None:
        """Of the layer's rates."""

    def input_place(self, step: int, place: str) -> Tensor | None:
        """Where its input belongs."""
        return None

    def t_input_place(self, step: int) -> Tensor | None:
        return None


def summed(terms: Terms, precision: str) -> Tensor:
    """The terms as a tensor, of the base's shape."""
    assert terms.base is not None
    if terms.is_base:
        return terms.base.contiguous()
    out = torch.empty_like(terms.base)
    attend("backward", terms, (), out, precision)
    return out


def placed(like: Tensor, shape: tuple[int, ...], to: Tensor | None) -> Tensor:
    """`to` in a shape, or else new memory."""
    return like.new_empty(shape) if to is None else to.view(shape)


@dataclass
class Saved:
    """What a linear block leaves of one pass over the network."""

    x: Tensor  # A
    kept: Tensor | None  # what f' and f'' are found from
    d: Tensor = field(init=False)
    dy: Tensor | None = None  # where f is curved
    t_x: Tensor | None = None
    t_z: Tensor | None = None  # where f is curved


class LinearBlock(Block):
    """A linear layer with the pointwise operations behind it, as `kernels.pointwise` has them.

    Products with shared weights are one large matrix product over all tasks' rows; then one launch
    adds what a task has of its own and goes through the activation.
    """

    def __init__(
        self, op: Linear, form: Form, ops: tuple[Any, ...], precision: str, second_order: bool
    ) -> None:
        self.op, self.form, self.ops, self.precision = op, form, ops, precision
        self.layer = form if isinstance(form, FastLayer) else None
        self.out_features, self.width = op.out_features_, op.in_features
        self.keeps_input, self.curved = keeps_input(ops), is_curved(ops)
        self.second_order = second_order

    def _launch(
        self,
        kind: str,
        terms: Terms,
        like: Tensor,
        shape: tuple[int, ...],
        to: Tensor | None,
        add: bool = False,
        **tensors: Tensor | None,
    ) -> Tensor:
        """One pass through the activation, into `to` if that is somewhere, else into memory on the
        device of `like`."""
        if to is None and not self.ops and terms.is_base:
            assert terms.base is not None
            return terms.base
        out = placed(like, shape, to)
        attend(kind, terms, self.ops, out, self.precision, add=out if add else None, **tensors)
        return out

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Saved]:
        form, shape = self.form, (*x.shape[:2], self.out_features)
        terms = form.forward_terms(step, x, place)
        follows = form.keeps_outputs and place == SUPPORT
        keeps = self.keeps_input and place != NOWHERE
        z = x.new_empty(shape) if self.ops and (keeps or follows) else None
        y = self._launch("forward", terms, x, shape, to, extra=z)
        if follows:
            form.outputs(y if z is None else z)
        kept = z if self.keeps_input else y
        return y, Saved(x, kept if self.ops else None)

    def backward(
        self, step: int, saved: Saved, dy: Terms, place: str, goes_on: bool
    ) -> Terms | None:
        assert dy.base is not None
        shape = tuple(dy.base.shape)
        keeps = self.curved and self.second_order and place == SUPPORT
        saved.dy = dy.base.new_empty(shape) if keeps else None
        to = self.form.cotangent_place(step, place)
        d = self._launch("backward", dy, dy.base, shape, to, kept=saved.kept, extra=saved.dy)
        saved.d = d.view(len(d), -1, self.out_features)
        return self.form.backward_terms(step, saved.d) if goes_on else None

    def tangent(self, step: int, saved: Saved, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        terms = self.form.tangent_terms(step, saved.x, saved.d, t_x)
        shape = tuple(saved.d.shape)
        saved.t_x, saved.t_z = t_x, saved.d.new_empty(shape) if self.curved else None
        return self._launch("tangent", terms, saved.d, shape, to, kept=saved.kept, extra=saved.t_z)

    def tangent_backward(self, step: int, saved: Saved, t_dy: Terms, goes_on: bool) -> Terms | None:
        assert t_dy.base is not None
        to, add = self.form.t_cotangent_place(step)
        bent = dict(kept=saved.kept, t_z=saved.t_z, dx=saved.dy)
        like, shape = t_dy.base, tuple(t_dy.base.shape)
        t_d = self._launch("tangent_backward", t_dy, like, shape, to, add, **bent)
        t_d = t_d.view(len(t_d), -1, self.out_features)
        terms = self.form.tangent_backward_terms(step, saved.d, t_d) if goes_on else None
        if self.layer is not None:
            self.layer.pull_back(step, saved.x, saved.d, saved.t_x, t_d)
        return terms

    def descend(self, step: int, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.descend(step, saved.x, saved.d)

    def begin_adjoint(self, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.begin_adjoint(saved.x, saved.d)

    def add_rate_gradients(self, step: int, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.add_rate_gradients(step, saved.x, saved.d)

    def input_place(self, step: int, place: str) -> Tensor | None:
        return self.form.input_place(step, place)

    def t_input_place(self, step: int) -> Tensor | None:
        return self.form.t_input_place(step)
