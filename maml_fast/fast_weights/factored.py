"""Factored fast weights of a linear layer: the rows that make them, and never the weights.

T tasks, N support rows, M query rows, S inner steps, I/O in and out features. A is the layer's
input [T, rows, I], D the cotangent of its output [T, rows, O]; D carries the 1/N of the mean loss.

An inner gradient is an outer product of few rows, g_k = D_k^T A_k, and so is the adjoint:
    W_k = W - sum_{j<k} eta_j D_j^T A_j            Lam = D_q^T A_q - sum_j (t_D^T A + D^T t_A)_j
Dense forms them, [T, O, I]. Factored never does; with W shared by all tasks and R the rows,
    A W_k^T = A W^T - sum_j eta_j (A A_j^T) D_j    D W_k = D W - sum_j eta_j (D D_j^T) A_j
where the shared products are single matrix products over all tasks' rows, and the Gram blocks
are small. A bias moves by the sum of rows of D, which adds its rate to the Gram block.
`step` is the inner step whose weights W_k are meant; S means the adapted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from maml_fast.fast_weights.base import FastLayer, LinearSpec


class FactoredLinear(FastLayer):
    """Rows instead of weights.

    right [T, S*N + M + S*N, I]: A_0 .. A_{S-1}, A_q, then -t_A of steps S-1 down.
    left  (same rows, O):        -t_D of each step, D_q, then D_k beside -t_A: Lam = left^T right.
    outer [T, S*N, O]:           D_0 .. D_{S-1}: W_k = W - sum eta_j outer_j^T right_j.
    At step k the adjoint's rows are those from (k+1) * N to the last written: one contiguous run.
    """

    spec: LinearSpec

    def __init__(self, spec: LinearSpec, rows: int, query_rows: int, second_order: bool) -> None:
        super().__init__(spec)
        self.rows, self.query_rows = rows, query_rows
        support = rows * spec.inner_steps
        total = support + query_rows + (support if second_order else 0)
        weight, tasks = spec.weight, spec.tasks
        out_features, in_features = weight.shape
        self.right = self._new_right(support, total, in_features)
        self.outer = weight.new_empty(tasks, support, out_features)
        self.left = weight.new_empty(tasks, total, out_features)
        # W_k's Gram blocks times these, plus these: [S*N] each
        self.scale = _by_row([-rate for rate in self.weight_rates], rows, weight)
        self.shift = _by_row([-rate for rate in self.bias_rates], rows, weight)
        # Rows of -t_A move the weight alone; all the others move the bias too.
        self.bias_end = support + query_rows
        self.moves_bias = weight.new_zeros(total)
        self.moves_bias[: self.bias_end] = 1
        self.first, self.last = support, support  # the adjoint's rows

    def _new_right(self, support: int, total: int, in_features: int) -> Tensor:
        return self.spec.weight.new_empty(self.spec.tasks, total, in_features)

    def _moved(self, step: int) -> slice:
        return slice(0, step * self.rows)

    def _input_gram(self, x: Tensor, rows: slice) -> Tensor:
        """x right^T [T, rows of x, rows]"""
        return x @ self.right[:, rows].mT

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, self.spec.weight, self.spec.bias)
        if step:
            moved = self._moved(step)
            gram = torch.addcmul(self.shift[moved], self._input_gram(x, moved), self.scale[moved])
            z = z.baddbmm_(gram, self.outer[:, moved])
        return z, x

    def _times_weight(self, step: int, dy: Tensor) -> Tensor:
        """D W_k"""
        dx = dy @ self.spec.weight
        if step:
            moved = self._moved(step)
            gram = (dy @ self.outer[:, moved].mT).mul_(self.scale[moved])
            dx.baddbmm_(gram, self.right[:, moved])
        return dx

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        return self._times_weight(step, dy)

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        rows = slice(step * self.rows, (step + 1) * self.rows)
        self.right[:, rows] = x
        self.outer[:, rows] = dy

    def begin_adjoint(self, x: Tensor, dy: Tensor) -> None:
        self.last = self.first + self.query_rows
        self.right[:, self.first : self.last] = x
        self.left[:, self.first : self.last] = dy

    def _adjoint_gram(self, step: int, x: Tensor) -> Tensor:
        return self._input_gram(x, slice(self.first, self.last))

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        lam = slice(self.first, self.last)
        gram = torch.add(
            self.moves_bias[lam] * self.bias_rates[step],
            self._adjoint_gram(step, saved),
            alpha=self.weight_rates[step],
        )
        if t_x is None:
            return gram @ self.left[:, lam]
        t_z = F.linear(t_x, self.spec.weight)
        if step:
            moved = self._moved(step)
            t_gram = self._input_gram(t_x, moved).mul_(self.scale[moved])
            t_z.baddbmm_(t_gram, self.outer[:, moved])
        return t_z.baddbmm_(gram, self.left[:, lam])

    def tangent_backward(
        self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        lam = slice(self.first, self.last)
        gram = dy @ self.left[:, lam].mT
        t_dx = self._times_weight(step, t_dy)
        return t_dx.baddbmm_(gram, self.right[:, lam], alpha=self.weight_rates[step])

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.first = step * self.rows  # right has A_k there already
        torch.neg(t_dy, out=self.left[:, self.first : self.first + self.rows])
        tail = slice(self.last, self.last + self.rows)
        if t_x is None:
            self.right[:, tail], self.left[:, tail] = 0, 0
        else:
            torch.neg(t_x, out=self.right[:, tail])
            self.left[:, tail] = dy
        self.last += self.rows

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        lam = slice(self.first, self.last)
        left, right = self.left[:, lam], self.right[:, lam]
        bias = self.left[:, self.first : self.bias_end].sum((0, 1))
        return left.flatten(0, 1).mT @ right.flatten(0, 1), bias

    def weights(self, step: int) -> tuple[Tensor, Tensor | None]:
        spec, moved = self.spec, self._moved(step)
        weight = spec.weight.expand(spec.tasks, *spec.weight.shape)
        if spec.weight_rates is not None and step:
            outer = self.outer[:, moved] * self.scale[moved, None]
            weight = torch.baddbmm(weight, outer.mT, self._formed_right(step))
        bias = None if spec.bias is None else spec.bias.expand(spec.tasks, -1)
        if bias is not None and step:
            bias = bias + self.shift[moved] @ self.outer[:, moved]
        return weight, bias

    def _formed_right(self, step: int) -> Tensor:
        return self.right[:, self._moved(step)]

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam = slice(self.first, self.last)
        gram = dy @ self.left[:, lam].mT  # <D^T A, Lam> is the sum of two Gram blocks' product
        self.rate_gradients[0, step] -= (gram * self._adjoint_gram(step, x)).sum(
            dtype=torch.float64
        )
        self.rate_gradients[1, step] -= (gram * self.moves_bias[lam]).sum(dtype=torch.float64)


class FactoredInput(FactoredLinear):
    """The first layer that adapts: its input is the data, the same at every inner step.

    So X W^T and the Gram blocks of the data are computed once for all steps, no cotangent goes
    further down, t_x is zero, and all steps' -t_D add up beside the one X:
    Lam = D_q^T X_q - (sum t_D)^T X, of rank N + M at most.
    """

    def __init__(
        self, spec: LinearSpec, support_x: Tensor, query_x: Tensor, second_order: bool
    ) -> None:
        super().__init__(spec, support_x.shape[1], query_x.shape[1], second_order=False)
        self.support_x, self.query_x = support_x, query_x
        self.products: dict[tuple[str, bool], Tensor] = {}
        self.t_sum: Tensor | None = None  # -sum t_D [T, N, O]

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
        base = self._once("base", x, lambda: F.linear(x, self.spec.weight, self.spec.bias))
        if not step:
            return base, x
        moved = self._moved(step)
        gram = torch.addcmul(self.shift[moved], self._input_gram(x, moved), self.scale[moved])
        return torch.baddbmm(base, gram, self.outer[:, moved]), x

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        raise AssertionError("nothing adapts below the first adapting layer")

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        self.outer[:, step * self.rows : (step + 1) * self.rows] = dy

    def begin_adjoint(self, x: Tensor, dy: Tensor) -> None:
        self.d_query = dy

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        weight_rate, bias_rate = self.weight_rates[step], self.bias_rates[step]
        gram = torch.add(bias_rate, self._gram(self.query_x).mT, alpha=weight_rate)
        t_z = gram @ self.d_query
        if self.t_sum is not None:
            t_z.baddbmm_(torch.add(bias_rate, self._gram(saved), alpha=weight_rate), self.t_sum)
        return t_z

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.t_sum = -t_dy if self.t_sum is None else self.t_sum.sub_(t_dy)

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        weight = self.d_query.flatten(0, 1).mT @ self.query_x.flatten(0, 1)
        bias = self.d_query.sum((0, 1))
        if self.t_sum is not None:
            weight.addmm_(self.t_sum.flatten(0, 1).mT, self.support_x.flatten(0, 1))
            bias += self.t_sum.sum((0, 1))
        return weight, bias

    def _formed_right(self, step: int) -> Tensor:
        return self.support_x.repeat(1, step, 1)

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        # A Lam^T and lam_b, then their product with D
        lam_x, lam_b = self._gram(self.query_x).mT @ self.d_query, self.d_query.sum(1, True)
        if self.t_sum is not None:
            lam_x.baddbmm_(self._gram(x), self.t_sum)
            lam_b = lam_b + self.t_sum.sum(1, True)
        self.rate_gradients[0, step] -= (lam_x * dy).sum(dtype=torch.float64)
        self.rate_gradients[1, step] -= (lam_b * dy).sum(dtype=torch.float64)


def _by_row(by_step: Sequence[float], rows: int, like: Tensor) -> Tensor:
    """[S] -> [S * rows]"""
    return torch.tensor(by_step, dtype=like.dtype, device=like.device).repeat_interleave(rows)
