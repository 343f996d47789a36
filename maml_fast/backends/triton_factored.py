"""Factored fast weights for the Triton layer kernels; the formulas are in `maml_fast.fast_weights`.

T tasks, N support rows, M query rows, S inner steps, I/O in and out features of a layer;
A [T, N, I] its input, D [T, N, O] the cotangent of its output, t_x the tangent of x.
    W_k = W - sum_{j<k} eta_j D_j^T A_j           Lam = D_q^T A_q - sum_j (t_D^T A + D^T t_A)_j
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from maml_fast.backends.triton_forms import QUERY, SUPPORT, Chunks, Form, Use
from maml_fast.fast_weights import FastLayer, LinearSpec
from maml_fast.kernels.attend import Segment, Terms, attend


class Factors(FastLayer, Form):
    """What both factored forms share. The kernels put factors in their places, so that most steps
    of a layer's life are done by then."""

    spec: LinearSpec

    def __init__(self, spec: LinearSpec, use: Use) -> None:
        super().__init__(spec)
        self.use = use

    def moved_pair(self, step: int) -> tuple[Tensor, Tensor]:
        """D and A of an inner step."""
        raise NotImplementedError

    def lam_terms(self, step: int, x: Tensor) -> Terms:
        """A Lam^T, with Lam as it stands when step `step` is to be pulled back."""
        raise NotImplementedError

    def lam_bias(self, step: int) -> Tensor:
        """The bias's adjoint at that time, [T, O]."""
        raise NotImplementedError

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        pass

    def begin_adjoint(self, x: Tensor, dy: Tensor) -> None:
        pass

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        pass

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam_x = torch.empty_like(dy)
        attend("forward", self.lam_terms(step, x), (), lam_x, self.use.precision)
        lam_b = self.lam_bias(step).unsqueeze(1)
        self.rate_gradients[0][step] -= (lam_x * dy).sum(dtype=torch.float64)
        self.rate_gradients[1][step] -= (lam_b * dy).sum(dtype=torch.float64)

    def weights(self, step: int) -> tuple[Tensor, Tensor | None]:
        spec = self.spec
        weight = spec.weight.expand(spec.tasks, *spec.weight.shape)
        bias = None if spec.bias is None else spec.bias.expand(spec.tasks, -1)
        for j in range(step):
            d, x = self.moved_pair(j)
            if spec.weight_rates is not None:
                weight = torch.baddbmm(weight, d.mT, x, alpha=-self.weight_rates[j])
            if bias is not None:
                bias = torch.sub(bias, d.sum(1), alpha=self.bias_rates[j])
        return weight, bias


class FactoredForm(Factors):
    """right: A of all steps, A_q, t_A of all steps; left: t_D, D_q, D. Lam = sum +-left^T right."""

    def __init__(self, spec: LinearSpec, use: Use) -> None:
        super().__init__(spec, use)
        (out_features, in_features), steps = spec.weight.shape, spec.inner_steps
        self.pulled = steps if use.second_order else 0  # steps that leave tangents
        self.right = Chunks(spec, use, in_features, before=steps, behind=self.pulled)
        self.left = Chunks(spec, use, out_features, before=self.pulled, behind=steps)
        self.d, self.a = self.left.flat[self.left.behind_at :], self.right.flat

    def input_place(self, step: int, place: str) -> Tensor | None:
        if place == SUPPORT:
            return self.right.before(step)
        return self.right.query() if place == QUERY else None

    def cotangent_place(self, step: int, place: str) -> Tensor | None:
        return self.left.behind(step) if place == SUPPORT else self.left.query()

    def t_input_place(self, step: int) -> Tensor | None:
        return self.right.behind(step)

    def t_cotangent_place(self, step: int) -> tuple[Tensor | None, bool]:
        return self.left.before(step), False

    def _terms(
        self, step: int, base: Tensor | None, moved: Segment | None, adjoint: Segment | None = None
    ) -> Terms:
        use = self.use
        return Terms(
            base,
            moved=moved if step else None,
            adjoint=adjoint,
            rates=use.rates,
            step=step,
            first=(step + 1) * use.rows if self.pulled else 0,
            step_rows=use.rows,
            query_rows=use.query_rows,
            support_keys=self.pulled * use.rows,
        )

    def _lam(self, step: int) -> tuple[Tensor, Tensor, int]:
        """right, left, and how many of their rows make Lam when `step` is to be pulled back."""
        if not self.pulled:
            return self.right.query(), self.left.query(), self.use.query_rows
        chunks = 2 * (self.pulled - 1 - step)
        return self.right.flat, self.left.flat, self.use.query_rows + chunks * self.use.rows

    def forward_terms(self, step: int, x: Tensor, place: str) -> Terms:
        moved = Segment(x, self.a, self.d, step * self.use.rows)
        terms = self._terms(step, self.product(x, self.spec.weight.mT), moved)
        return replace(terms, bias=self.spec.bias)

    def backward_terms(self, step: int, d: Tensor) -> Terms:
        moved = Segment(d, self.d, self.a, step * self.use.rows)
        return self._terms(step, self.product(d, self.spec.weight), moved)

    def tangent_terms(self, step: int, x: Tensor, d: Tensor, t_x: Tensor | None) -> Terms:
        assert t_x is not None  # the first layer has a form of its own
        right, left, keys = self._lam(step)
        moved = Segment(t_x, self.a, self.d, step * self.use.rows)
        base = self.product(t_x, self.spec.weight.mT)
        return self._terms(step, base, moved, Segment(x, right, left, keys))

    def tangent_backward_terms(self, step: int, d: Tensor, t_d: Tensor) -> Terms:
        right, left, keys = self._lam(step)
        moved = Segment(t_d, self.d, self.a, step * self.use.rows)
        base = self.product(t_d, self.spec.weight)
        return self._terms(step, base, moved, Segment(d, left, right, keys))

    def lam_terms(self, step: int, x: Tensor) -> Terms:
        right, left, keys = self._lam(step)
        terms = self._terms(step, None, None, Segment(x, right, left, keys))
        return replace(terms, rates=None)

    def lam_bias(self, step: int) -> Tensor:
        total = self.left.query().sum(1)
        for j in range(step + 1, self.pulled):
            total -= self.left.before(j).sum(1)
        return total

    def moved_pair(self, step: int) -> tuple[Tensor, Tensor]:
        return self.left.behind(step), self.right.before(step)

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        left, right = self.left, self.right
        d_query = left.query().flatten(0, 1)
        weight, bias = d_query.mT @ right.query().flatten(0, 1), d_query.sum(0)
        if self.pulled:
            weight.addmm_(left.all_before().mT, right.all_before(), alpha=-1)
            weight.addmm_(left.all_behind().mT, right.all_behind(), alpha=-1)
            bias -= left.all_before().sum(0)
        return weight, bias


class InputForm(Factors):
    """The first layer that adapts: its input is the data X, the same at every inner step.

    So Gram blocks of the data are computed once. An inner step moves the support's z by the N rows
    of that step's D; the t_D of all steps add up beside the one X, and Lam has rank N + M. No
    cotangent goes further down.
    """

    keeps_outputs = True

    def __init__(self, spec: LinearSpec, use: Use, support_x: Tensor, query_x: Tensor) -> None:
        super().__init__(spec, use)
        self.support_x, self.query_x = support_x, query_x
        out_features = spec.weight.shape[0]
        self.left = Chunks(spec, use, out_features, before=0, behind=int(use.second_order))
        self.d = spec.weight.new_empty(spec.inner_steps, spec.tasks, use.rows, out_features)
        self.z: Tensor | None = None
        self.summed = False  # whether left has a sum of t_D behind D_q

    @functools.cached_property
    def gram(self) -> Tensor:
        """Of X with X_q, then with itself: [T, N, M + N]; without a gradient, [T, N, N]."""
        x, own = self.support_x, torch.bmm(self.support_x, self.support_x.mT)
        return torch.cat((torch.bmm(x, self.query_x.mT), own), 2) if self.use.query_rows else own

    def cotangent_place(self, step: int, place: str) -> Tensor | None:
        return self.d[step] if place == SUPPORT else self.left.query()

    def t_cotangent_place(self, step: int) -> tuple[Tensor | None, bool]:
        return self.left.behind(0), self.summed

    def outputs(self, z: Tensor) -> None:
        self.z = z

    def forward_terms(self, step: int, x: Tensor, place: str) -> Terms:
        rows = self.use.rows
        if step and place == SUPPORT:  # on from the step before
            gram = self.gram[:, :, self.use.query_rows :]
            moved = Segment(gram, None, self.d[step - 1], rows)
            rates = self.use.rates[:, step - 1 :]
            return Terms(
                self.z, moved=moved, rates=rates, step_rows=rows, gram_stride=gram.stride(1)
            )
        terms = Terms(self.product(x, self.spec.weight.mT), self.spec.bias)
        if not step:
            return terms
        moved = Segment(torch.bmm(x, self.support_x.mT), None, self.d, step * rows)
        return replace(terms, moved=moved, rates=self.use.rates, step_rows=rows, gram_stride=rows)

    def tangent_terms(self, step: int, x: Tensor, d: Tensor, t_x: Tensor | None) -> Terms:
        use = self.use
        keys = use.query_rows + (use.rows if self.summed else 0)
        return Terms(
            None,
            adjoint=Segment(self.gram, None, self.left.flat, keys),
            rates=use.rates,
            step=step,
            step_rows=use.rows,
            query_rows=use.query_rows,
            gram_stride=use.query_rows + use.rows,
        )

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.summed = True

    def lam_terms(self, step: int, x: Tensor) -> Terms:
        return replace(self.tangent_terms(step, x, x, None), rates=None)

    def lam_bias(self, step: int) -> Tensor:
        total = self.left.query().sum(1)
        return total - self.left.behind(0).sum(1) if self.summed else total

    def moved_pair(self, step: int) -> tuple[Tensor, Tensor]:
        return self.d[step], self.support_x

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        d_query = self.left.query().flatten(0, 1)
        weight, bias = d_query.mT @ self.query_x.flatten(0, 1), d_query.sum(0)
        if self.summed:
            t_d = self.left.all_behind()
            weight.addmm_(t_d.mT, self.support_x.flatten(0, 1), alpha=-1)
            bias -= t_d.sum(0)
        return weight, bias
