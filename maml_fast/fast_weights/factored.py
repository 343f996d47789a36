"""Factored fast weights of a linear layer: the rows that make them, and never the weights.

T tasks, N support rows, M query rows, S inner steps, I/O in and out features. A is the layer's
input [T, rows, I], D the cotangent of its output [T, rows, O]; D carries the 1/N of the mean loss.

An inner gradient is an outer product of few rows, g_k = D_k^T A_k, and so is the adjoint:
    W_k = W - sum_{j<k} eta_j D_j^T A_j            Lam = D_q^T A_q - sum_j (t_D^T A + D^T t_A)_j
Dense forms them, [T, O, I]. Factored never does; with W shared by all tasks and R the rows,
    A W_k^T = A W^T - sum_j eta_j (A A_j^T) D_j    D W_k = D W - sum_j eta_j (D D_j^T) A_j
where the shared products are single matrix products over all tasks' rows, and the Gram blocks
are small. A bias moves by the sum of rows of D, which adds its rate to the Gram block.
With momentum or weight decay each step's rows count by coefficients of their own (`steps.py`).
`step` is the inner step whose weights W_k are meant; S means the adapted ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from maml_fast.fast_weights.base import FastLayer, LinearSpec
from maml_fast.fast_weights.steps import Coefficients


class FactoredLinear(FastLayer):
    """Rows instead of weights.

    right [T, S*N + M + S*N, I]: A_0 .. A_{S-1}, A_q, then -t_A of steps S-1 down.
    left  (same rows, O):        -t_D of each step, D_q, then D_k beside -t_A: Lam = left^T right.
    outer [T, S*N, O]:           D_0 .. D_{S-1}: W_k = W - sum eta_j outer_j^T right_j.
    At step k the adjoint's rows are those from (k+1) * N to the last written: one contiguous run.
    Query losses of earlier steps, if any count, put their A_q and D_q behind what was written.
    """

    spec: LinearSpec

    def __init__(
        self,
        spec: LinearSpec,
        rows: int,
        query_rows: int,
        second_order: bool,
        queries: int = 1,  # how many steps' query losses count
    ) -> None:
        super().__init__(spec)
        self.rows, self.query_rows = rows, query_rows
        support = rows * spec.inner_steps
        total = support + queries * query_rows + (support if second_order else 0)
        weight, tasks = spec.weight, spec.tasks
        out_features, in_features = weight.shape
        self.right = self._new_right(support, total, in_features)
        self.outer = weight.new_empty(tasks, support, out_features)
        self.left = weight.new_empty(tasks, total, out_features)
        self.of_weight, self.of_bias = (
            Coefficients.of(spec.rule, rates, weight) for rates in self._both_rates()
        )
        # Rows of -t_A move the weight alone; all the others move the bias too.
        self.moves_bias = weight.new_ones(total)
        self.first, self.last = support, support  # the adjoint's rows
        # The step whose weights gained a row of the adjoint
        self.gained = torch.zeros(total, dtype=torch.int64, device=weight.device)
        self.gained[:support] = torch.arange(spec.inner_steps).repeat_interleave(rows)

    def _new_right(self, support: int, total: int, in_features: int) -> Tensor:
        return self.spec.weight.new_empty(self.spec.tasks, total, in_features)

    def _moved(self, step: int) -> slice:
        return slice(0, step * self.rows)

    def _input_gram(self, x: Tensor, rows: slice) -> Tensor:
        """x right^T [T, rows of x, rows]"""
        return x @ self.right[:, rows].mT

    def _scale(self, step: int) -> Tensor:
        """What W_k's Gram blocks are multiplied by, row by row: [k*N]"""
        return -self.of_weight.moved[step, :step].repeat_interleave(self.rows)

    def _shift(self, step: int) -> Tensor:
        """What the bias adds to them"""
        return -self.of_bias.moved[step, :step].repeat_interleave(self.rows)

    def _kept(self, step: int, base: Tensor) -> Tensor:
        """x W^T, of the shared weights, as W_k has it left: weight decay takes from it."""
        return base * self.of_weight.kept[step] if self.spec.rule.weight_decay else base

    def _shared(self, step: int, x: Tensor) -> Tensor:
        """x W^T + b, what W_k and b_k have left of them."""
        spec = self.spec
        if not spec.rule.weight_decay or spec.bias is None:
            return self._kept(step, F.linear(x, spec.weight, spec.bias))
        bias = spec.bias * self.of_bias.kept[step]
        return torch.add(bias, F.linear(x, spec.weight), alpha=self.of_weight.kept[step].item())

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self._shared(step, x)
        if step:
            moved = self._moved(step)
            gram = torch.addcmul(self._shift(step), self._input_gram(x, moved), self._scale(step))
            z = z.baddbmm_(gram, self.outer[:, moved])
        return z, x

    def _times_weight(self, step: int, dy: Tensor) -> Tensor:
        """D W_k"""
        dx = self._kept(step, dy @ self.spec.weight)
        if step:
            moved = self._moved(step)
            gram = (dy @ self.outer[:, moved].mT).mul_(self._scale(step))
            dx.baddbmm_(gram, self.right[:, moved])
        return dx

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        return self._times_weight(step, dy)

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        rows = slice(step * self.rows, (step + 1) * self.rows)
        self.right[:, rows] = x
        self.outer[:, rows] = dy

    def add_query(self, step: int, x: Tensor, dy: Tensor) -> None:
        tail = slice(self.last, self.last + self.query_rows)
        self.right[:, tail], self.left[:, tail], self.gained[tail] = x, dy, step
        self.last = tail.stop

    def _along(self, step: int, coefficients: Coefficients) -> Tensor:
        """How much each row of the adjoint counts in v, the direction of step's tangents."""
        return coefficients.moved[self.gained[self.first : self.last], step]

    def _adjoint_gram(self, step: int, x: Tensor) -> Tensor:
        return self._input_gram(x, slice(self.first, self.last))

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        lam = slice(self.first, self.last)
        gram = torch.addcmul(
            self.moves_bias[lam] * self._along(step, self.of_bias),
            self._adjoint_gram(step, saved),
            self._along(step, self.of_weight),
        )
        if t_x is None:
            return gram @ self.left[:, lam]
        t_z = self._kept(step, F.linear(t_x, self.spec.weight))
        if step:
            moved = self._moved(step)
            t_gram = self._input_gram(t_x, moved).mul_(self._scale(step))
            t_z.baddbmm_(t_gram, self.outer[:, moved])
        return t_z.baddbmm_(gram, self.left[:, lam])

    def tangent_backward(
        self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        lam = slice(self.first, self.last)
        gram = (dy @ self.left[:, lam].mT).mul_(self._along(step, self.of_weight))
        return self._times_weight(step, t_dy).baddbmm_(gram, self.right[:, lam])

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.first = step * self.rows  # right has A_k there already
        torch.neg(t_dy, out=self.left[:, self.first : self.first + self.rows])
        tail = slice(self.last, self.last + self.rows)
        if t_x is None:
            self.right[:, tail], self.left[:, tail] = 0, 0
        else:
            torch.neg(t_x, out=self.right[:, tail])
            self.left[:, tail] = dy
        self.gained[tail], self.moves_bias[tail] = step, 0
        self.last += self.rows

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        lam = slice(self.first, self.last)
        left, right, of_bias = self.left[:, lam], self.right[:, lam], self.moves_bias[lam]
        if self.spec.rule.weight_decay:
            gained = self.gained[lam]
            of_bias = of_bias * self.of_bias.kept[gained]
            right = right * self.of_weight.kept[gained].unsqueeze(1)
        bias = torch.einsum("tro,r->o", left, of_bias)
        return left.flatten(0, 1).mT @ right.flatten(0, 1), bias

    def weights(self, step: int) -> tuple[Tensor, Tensor | None]:
        spec, moved = self.spec, self._moved(step)
        weight = spec.weight.expand(spec.tasks, *spec.weight.shape)
        if spec.weight_rates is not None and step:
            outer = self.outer[:, moved] * self._scale(step).unsqueeze(1)
            kept = weight * self.of_weight.kept[step]
            weight = torch.baddbmm(kept, outer.mT, self._formed_right(step))
        bias = None if spec.bias is None else spec.bias.expand(spec.tasks, -1)
        if bias is not None and step:
            bias = bias * self.of_bias.kept[step] + self._shift(step) @ self.outer[:, moved]
        return weight, bias

    def _formed_right(self, step: int) -> Tensor:
        return self.right[:, self._moved(step)]

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam = slice(self.first, self.last)
        gram = dy @ self.left[:, lam].mT  # <D^T A, Lam> is the sum of two Gram blocks' product
        by_weight, by_bias = self.rate_gradients
        by_weight[step] -= (gram * self._adjoint_gram(step, x)).sum(dtype=torch.float64)
        by_bias[step] -= (gram * self.moves_bias[lam]).sum(dtype=torch.float64)


class FactoredInput(FactoredLinear):
    """The first layer that adapts: its input is the data, the same at every inner step.

    So X W^T and the Gram blocks of the data are computed once for all steps, no cotangent goes
    further down, t_x is zero, and all steps' -t_D add up beside the one X:
    Lam = D_q^T X_q - (sum t_D)^T X, of rank N + M at most. With coefficients that change from step
    to step the sums are taken anew for each.
    """

    def __init__(
        self, spec: LinearSpec, support_x: Tensor, query_x: Tensor, second_order: bool
    ) -> None:
        super().__init__(spec, support_x.shape[1], query_x.shape[1], second_order=False)
        self.support_x, self.query_x = support_x, query_x
        self.products: dict[tuple[str, bool], Tensor] = {}
        # D_q [T, M, O] and -t_D [T, N, O] by the step whose weights gained them
        self.d_query, self.minus_t_d = Gained(spec.rule.plain), Gained(spec.rule.plain)

    def _new_right(self, support: int, total: int, in_features: int) -> Tensor:
        return self.spec.weight.new_empty(0)  # the data stand for all rows

    def _once(self, kind: str, x: Tensor, product: Callable[[], Tensor]) -> Tensor:
        """A product of the support or query rows, kept; of other rows, made anew."""
        if x is not self.support_x and x is not self.query_x:
            return product()
        key = (kind, x is self.support_x)
        if key not in self.products:
            self.products[key] = product()
        return self.products[key]

    def _gram(self, x: Tensor) -> Tensor:
        """x X^T [T, rows, N]"""
        return self._once("gram", x, lambda: x @ self.support_x.mT)

    def _input_gram(self, x: Tensor, rows: slice) -> Tensor:
        return self._gram(x).repeat(1, 1, rows.stop // self.rows)

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        base = self._base(step, x)
        if not step:
            return base, x
        moved = self._moved(step)
        gram = torch.addcmul(self._shift(step), self._input_gram(x, moved), self._scale(step))
        return torch.baddbmm(base, gram, self.outer[:, moved]), x

    def _base(self, step: int, x: Tensor) -> Tensor:
        weight, bias = self.spec.weight, self.spec.bias
        if not self.spec.rule.weight_decay:
            return self._once("base", x, lambda: F.linear(x, weight, bias))
        product = self._once("base", x, lambda: F.linear(x, weight)) * self.of_weight.kept[step]
        return product if bias is None else product + bias * self.of_bias.kept[step]

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        raise AssertionError("nothing adapts below the first adapting layer")

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        self.outer[:, step * self.rows : (step + 1) * self.rows] = dy

    def add_query(self, step: int, x: Tensor, dy: Tensor) -> None:
        self.d_query.add(step, dy)

    def _adjoint_times(
        self, x: Tensor, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x V^T [T, rows, O] and v_b [T, 1, O], the adjoint's parts counting by coefficients [S+1]
        of the steps that gained them; None: 1 each."""
        query = self.d_query.total(of_weight)
        assert query is not None
        product = self._gram(self.query_x).mT @ query
        of_all = self.d_query.total(of_bias).sum(1, True)  # type: ignore[union-attr]
        support = self.minus_t_d.total(of_weight)
        if support is not None:
            product.baddbmm_(self._gram(x), support)
            of_all = of_all + self.minus_t_d.total(of_bias).sum(1, True)  # type: ignore[union-attr]
        return product, of_all

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        if not self.spec.rule.plain:
            of_weight, of_bias = self.of_weight.moved[:, step], self.of_bias.moved[:, step]
            product, of_all = self._adjoint_times(saved, of_weight, of_bias)
            return product.add_(of_all)
        # One product for weight and bias: their rates scale and shift the Gram block.
        weight_rate, bias_rate = self.weight_rates[step], self.bias_rates[step]
        gram = torch.add(bias_rate, self._gram(self.query_x).mT, alpha=weight_rate)
        d_query = self.d_query.total()
        assert d_query is not None  # the last step's counts
        t_z = gram @ d_query
        if (t_sum := self.minus_t_d.total()) is not None:
            t_z.baddbmm_(torch.add(bias_rate, self._gram(saved), alpha=weight_rate), t_sum)
        return t_z

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.minus_t_d.add(step, -t_dy)

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        decays = bool(self.spec.rule.weight_decay)
        of_weight = self.of_weight.kept if decays else None
        of_bias = self.of_bias.kept if decays else None
        weight: Tensor | float = 0.0
        bias: Tensor | float = 0.0
        for gained, x in ((self.d_query, self.query_x), (self.minus_t_d, self.support_x)):
            by_weight, by_bias = gained.total(of_weight), gained.total(of_bias)
            if by_weight is not None and by_bias is not None:
                weight = weight + by_weight.flatten(0, 1).mT @ x.flatten(0, 1)
                bias = bias + by_bias.sum((0, 1))
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return weight, bias

    def _formed_right(self, step: int) -> Tensor:
        return self.support_x.repeat(1, step, 1)

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam_x, lam_b = self._adjoint_times(x, None, None)
        by_weight, by_bias = self.rate_gradients
        by_weight[step] -= (lam_x * dy).sum(dtype=torch.float64)
        by_bias[step] -= (lam_b * dy).sum(dtype=torch.float64)


class Gained:
    """Tensors of one shape by the step whose weights gained them, and their sums; added up at once
    where all steps count alike."""

    def __init__(self, alike: bool) -> None:
        self.alike = alike
        self.parts: list[tuple[int, Tensor]] = []

    def add(self, step: int, part: Tensor) -> None:
        if self.alike and self.parts:
            part = self.parts.pop()[1] + part
        self.parts.append((step, part))

    def total(self, by_step: Tensor | None = None) -> Tensor | None:
        """Their sum, each times by_step[its step]; None of none."""
        if not self.parts:
            return None
        if by_step is None:
            return sum((part for _, part in self.parts[1:]), self.parts[0][1])
        found = [part * by_step[step] for step, part in self.parts]
        return sum(found[1:], found[0])
