"""Losses by name: the three rules of each, and the torch function that defines it.

A loss is the mean over a task's rows (and features). With R rows of C features a task:
    by_row    each row's share        [T, R], of which L is the mean
    value     L(z, y)                 [T]
    cotangent D = dL/dz               [T, R, C]
    tangent   t_D = L''(z) t_z        [T, R, C]: the tangent of D in direction t_z
`state` is what `value` saw and the other two rules need.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class LossRules:
    """The rules of one loss, on all tasks at once; `oracle` defines it, for the tests."""

    @staticmethod
    def oracle(z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def by_row(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of rows [T, R] and the state, from predictions z [T, R, *features], targets y."""
        raise NotImplementedError

    @classmethod
    def value(cls, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [T] and the state."""
        by_row, state = cls.by_row(z, y)
        return by_row.mean(1), state

    @staticmethod
    def cotangent(state: Tensor, y: Tensor) -> Tensor:
        """dL/dz"""
        raise NotImplementedError

    @staticmethod
    def tangent(state: Tensor, t_z: Tensor) -> Tensor:
        """The tangent of dL/dz"""
        raise NotImplementedError


def _per_task(x: Tensor) -> int:
    return x[0].numel()


def _row_means(x: Tensor) -> Tensor:
    """[T, R, *features] -> [T, R]"""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class MSE(LossRules):
    """L = mean (z - y)^2; the state is z - y."""

    @staticmethod
    def oracle(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y)

    @staticmethod
    def by_row(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        difference = z - y
        return _row_means(difference.square()), difference

    @staticmethod
    def cotangent(state: Tensor, y: Tensor) -> Tensor:
        return state * (2 / _per_task(state))

    @staticmethod
    def tangent(state: Tensor, t_z: Tensor) -> Tensor:
        return t_z * (2 / _per_task(t_z))


class CrossEntropy(LossRules):
    """L = mean over rows of -log p_y with p = softmax(z); the state is p, [T, R, C]."""

    @staticmethod
    def oracle(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    @staticmethod
    def by_row(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(-1)
        loss = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return loss, log_p.exp_()

    @staticmethod
    def cotangent(state: Tensor, y: Tensor) -> Tensor:
        index = y.unsqueeze(-1)
        minus_one = state.new_full((1,), -1.0).expand(index.shape)
        return state.scatter_add(-1, index, minus_one).div_(state.shape[1])

    @staticmethod
    def tangent(state: Tensor, t_z: Tensor) -> Tensor:
        weighted = state * t_z
        mean = weighted.sum(-1, keepdim=True)
        return weighted.addcmul_(state, mean, value=-1).div_(state.shape[1])


class BCEWithLogits(LossRules):
    """L = mean of -(y log s + (1 - y) log(1 - s)) with s = sigmoid(z); the state is s."""

    @staticmethod
    def oracle(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, y)

    @staticmethod
    def by_row(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # log(1 + e^z) - y z, in the form that neither overflows nor loses small digits
        loss = z.clamp_min(0) - z * y + torch.log1p(torch.exp(-z.abs()))
        return _row_means(loss), z.sigmoid()

    @staticmethod
    def cotangent(state: Tensor, y: Tensor) -> Tensor:
        return (state - y).div_(_per_task(state))

    @staticmethod
    def tangent(state: Tensor, t_z: Tensor) -> Tensor:
        return (state * (1 - state)).mul_(t_z).div_(_per_task(t_z))


class Huber(LossRules):
    """L = mean of d^2/2 where |d| <= 1, |d| - 1/2 elsewhere, with d = z - y; the state is d."""

    @staticmethod
    def oracle(z: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(z, y)

    @staticmethod
    def by_row(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        difference = z - y
        bounded = difference.clamp(-1, 1)
        loss = bounded * (difference - 0.5 * bounded)
        return _row_means(loss), difference

    @staticmethod
    def cotangent(state: Tensor, y: Tensor) -> Tensor:
        return state.clamp(-1, 1).div_(_per_task(state))

    @staticmethod
    def tangent(state: Tensor, t_z: Tensor) -> Tensor:
        # As autograd has it: the second derivative at |d| = 1 is 1.
        return (t_z / _per_task(t_z)).masked_fill_(state.abs() > 1, 0)


class WeightedRows:
    """The rules of a loss of which a task's rows count by weights [T, R], or alike (None)."""

    def __init__(self, rules: type[LossRules], weight: Tensor | None) -> None:
        self.rules = rules
        self.share = None if weight is None else weight / weight.sum(1, keepdim=True)  # [T, R]

    def value(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.share is None:
            return self.rules.value(z, y)
        by_row, state = self.rules.by_row(z, y)
        return (by_row * self.share).sum(1), state

    def cotangent(self, state: Tensor, y: Tensor) -> Tensor:
        return self._shared_out(self.rules.cotangent(state, y))

    def tangent(self, state: Tensor, t_z: Tensor) -> Tensor:
        return self._shared_out(self.rules.tangent(state, t_z))

    def _shared_out(self, d: Tensor) -> Tensor:
        """Rows of a mean's cotangent, each times what it counts in place of 1/R."""
        if self.share is None:
            return d
        scale = self.share * self.share.shape[1]
        return d * scale.view(*scale.shape, *(1,) * (d.dim() - 2))


LOSSES: dict[str, type[LossRules]] = {
    "mse": MSE,
    "cross_entropy": CrossEntropy,
    "bce_with_logits": BCEWithLogits,
    "huber": Huber,
}
