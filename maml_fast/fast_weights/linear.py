"""Linear layers with weights shared by all tasks, and with dense ones of each task's own.

T tasks, S inner steps, I/O in and out features. A is the layer's input [T, rows, I], D the
cotangent of its output [T, rows, O]; D carries the 1/N of the mean loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maml_fast.fast_weights.base import DenseLayer, FastLayer, LinearSpec, Pair, Still


class SharedLinear(Still):
    """A layer that does not adapt: every task has the meta-parameters, at every step. saved: x"""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.spec.weight, self.spec.bias), x

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        return dy @ self.spec.weight

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else F.linear(t_x, self.spec.weight)

    def tangent_backward(
        self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return t_dy @ self.spec.weight

    def gradients(self, saved: Tensor, dy: Tensor) -> Pair:
        weight = dy.flatten(0, 1).mT @ saved.flatten(0, 1)
        return weight, None if self.spec.bias is None else dy.sum((0, 1))

    def t_gradients(self, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        weight, bias = self.gradients(saved, t_dy)
        if t_x is not None and weight is not None:
            weight.addmm_(dy.flatten(0, 1).mT, t_x.flatten(0, 1))
        return weight, bias


class DenseLinear(FastLayer):
    """Weights [T, O, I] formed at every step but the first, where all tasks share them; of a plain
    rule, whose updates go into the products."""

    spec: LinearSpec

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.w = [spec.weight]  # [O, I], then [T, O, I]
        self.b = [spec.bias]  # [O], then [T, 1, O]
        self.lam, self.lam_b = spec.weight, spec.weight  # until `add_query`
        self.has_adjoint = False

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        w, b = self.w[step], self.b[step]
        if not step:
            return F.linear(x, w, b), x
        return (x @ w.mT if b is None else torch.baddbmm(b, x, w.mT)), x

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        return dy @ self.w[step]

    def descend(self, step: int, x: Tensor, dy: Tensor) -> None:
        spec, w, b = self.spec, self.w[step], self.b[step]
        if spec.weight_rates is None:
            w = w.expand(spec.tasks, -1, -1)
        else:
            w = torch.baddbmm(
                w.expand(spec.tasks, *spec.weight.shape), dy.mT, x, alpha=-self.weight_rates[step]
            )
        if b is not None:
            b = torch.sub(b.expand(spec.tasks, 1, -1), dy.sum(1, True), alpha=self.bias_rates[step])
        self.w.append(w)
        self.b.append(b)

    def add_query(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam, lam_b = dy.mT @ x, dy.sum(1, True)  # [T, O, I], [T, 1, O]
        if self.has_adjoint:
            lam, lam_b = self.lam + lam, self.lam_b + lam_b
        self.lam, self.lam_b, self.has_adjoint = lam, lam_b, True

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        weight_rate, bias_rate = self.weight_rates[step], self.bias_rates[step]
        t_z = torch.baddbmm(self.lam_b, saved, self.lam.mT, beta=bias_rate, alpha=weight_rate)
        if t_x is None:
            return t_z
        return t_z.add_(t_x @ self.w[step].mT) if not step else t_z.baddbmm_(t_x, self.w[step].mT)

    def tangent_backward(
        self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        t_dx = t_dy @ self.w[step]
        return t_dx.baddbmm_(dy, self.lam, alpha=self.weight_rates[step])

    def pull_back(self, step: int, x: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> None:
        self.lam.baddbmm_(t_dy.mT, x, alpha=-1)
        if t_x is not None:
            self.lam.baddbmm_(dy.mT, t_x, alpha=-1)
        self.lam_b -= t_dy.sum(1, True)

    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        return self.lam.sum(0), self.lam_b.sum((0, 1))

    def weights(self, step: int) -> tuple[Tensor, Tensor | None]:
        spec, b = self.spec, self.b[step]
        w = self.w[step].expand(spec.tasks, *spec.weight.shape)
        return w, None if b is None else b.reshape(-1, b.shape[-1]).expand(spec.tasks, -1)

    def add_rate_gradients(self, step: int, x: Tensor, dy: Tensor) -> None:
        lam_x = x @ self.lam.mT
        self.rate_gradients[0][step] -= (lam_x * dy).sum(dtype=torch.float64)
        self.rate_gradients[1][step] -= (self.lam_b * dy).sum(dtype=torch.float64)


class RuledLinear(DenseLayer):
    """Dense weights [T, O, I] under any rule that is linear. saved: x"""

    spec: LinearSpec

    def _times(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        """x w^T + b, of each task's own or of shared ones."""
        assert w is not None
        z = x @ w.mT
        return z if b is None else z + (b if b.dim() == 1 else b.unsqueeze(1))

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._times(x, self.w[step], self.b[step]), x

    def backward(self, step: int, saved: Tensor, dy: Tensor) -> Tensor:
        return dy @ self._weight(step)

    def _weight(self, step: int) -> Tensor:
        w = self.w[step]
        assert w is not None
        return w

    def tangent(self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        t_w, t_b = self.along
        t_z = dy.new_zeros(dy.shape) if t_w is None else saved @ t_w.mT
        if t_b is not None:
            t_z = t_z + t_b.unsqueeze(1)
        return t_z if t_x is None else t_z + self._times(t_x, self.w[step], None)

    def tangent_backward(
        self, step: int, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        t_dx, t_w = t_dy @ self._weight(step), self.along[0]
        return t_dx if t_w is None else t_dx + dy @ t_w

    def gradients(self, saved: Tensor, dy: Tensor) -> Pair:
        weight, bias = self.moves
        return dy.mT @ saved if weight else None, dy.sum(1) if bias else None

    def t_gradients(self, saved: Tensor, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        t_weight, t_bias = self.gradients(saved, t_dy)
        if t_x is not None and t_weight is not None:
            t_weight = t_weight + dy.mT @ t_x
        return t_weight, t_bias
