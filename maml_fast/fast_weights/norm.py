"""Normalisation with gamma and beta of each task's own, or shared, or none.

With m the mean over the numbers that share statistics and v any of their kind,
    r = 1 / sqrt(m((x - m(x))^2) + eps)    xhat = r (x - m(x))    P(v) = v - m(v) - xhat m(v xhat)
    y = gamma xhat + beta                  dx = r P(u)                       with u = gamma dy
    t_xhat = r P(t_x)                      t_y = gamma t_xhat + t_gamma xhat + t_beta
    t_r = -r^2 m(xhat t_x)                 t_u = gamma t_dy + t_gamma dy
    t_dx = t_r P(u) + r (t_u - m(t_u) - t_xhat m(u xhat) - xhat m(t_u xhat + u t_xhat))
    g of gamma = sum dy xhat               g of beta = sum dy
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maml_fast.fast_weights.base import DenseLayer, LayerSpec, Pair, Still
from maml_fast.ops.base import Features
from maml_fast.ops.norm import Norm


class Normalised(NamedTuple):
    """What a norm saves of a forward pass, seen as [T, N, *view]."""

    xhat: Tensor
    r: Tensor
    axes: tuple[int, ...]  # of the statistics
    affine: Features  # of gamma and beta, without T and N

    @classmethod
    def of(cls, op: Norm, x: Tensor) -> Normalised:
        """Normalise x [T, N, *features]."""
        view, axes, affine = op.split(tuple(x.shape[2:]))
        axes = tuple(axis + 1 for axis in axes)
        x = x.reshape(*x.shape[:2], *view)
        centred = x - x.mean(axes, keepdim=True)
        r = (centred.square().mean(axes, keepdim=True) + op.eps).rsqrt_()
        return cls(centred.mul_(r), r, axes, affine)

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.axes, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        """P(v)"""
        return v - self.mean(v) - self.xhat * self.mean(v * self.xhat)

    def spread(self, parameter: Tensor | None) -> Tensor | None:
        """gamma or beta, [*shape] or [T, *shape], to multiply or add to [T, N, *view]"""
        return None if parameter is None else parameter.reshape(-1, 1, *self.affine)

    def summed(self, v: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `spread`, by task: [T, *shape]"""
        over = [1, *(2 + axis for axis, n in enumerate(self.affine) if n == 1)]
        return v.sum(over).reshape(len(v), *shape)


class SharedNorm(Still):
    """A norm that does not adapt, with the meta-parameters or none."""

    def __init__(self, spec: LayerSpec) -> None:
        assert isinstance(spec.op, Norm)
        self.op, self.shared = spec.op, (spec.weight, spec.bias)
        self.moves = True, True

    def _pair(self, step: int) -> Pair:
        """gamma and beta before an inner step"""
        return self.shared

    def _direction(self, step: int) -> Pair:
        """t_gamma and t_beta"""
        return None, None

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Normalised]:
        saved = Normalised.of(self.op, x)
        gamma, beta = map(saved.spread, self._pair(step))
        y = saved.xhat if gamma is None else saved.xhat * gamma
        return (y if beta is None else y + beta).view(x.shape), saved

    def backward(self, step: int, saved: Normalised, dy: Tensor) -> Tensor:
        return (saved.r * saved.project(self._scaled(step, saved, dy))).view(dy.shape)

    def _scaled(self, step: int, saved: Normalised, dy: Tensor) -> Tensor:
        """u = gamma dy"""
        gamma = saved.spread(self._pair(step)[0])
        dy = dy.reshape(saved.xhat.shape)
        return dy if gamma is None else gamma * dy

    def tangent(
        self, step: int, saved: Normalised, dy: Tensor, t_x: Tensor | None
    ) -> Tensor | None:
        t_gamma, t_beta = map(saved.spread, self._direction(step))
        t_y = None
        if t_x is not None:
            t_y = self._scaled(step, saved, t_xhat(saved, t_x))
        if t_gamma is not None:
            t_y = t_gamma * saved.xhat if t_y is None else t_y + t_gamma * saved.xhat
        if t_beta is not None:
            t_y = t_beta.expand_as(saved.xhat) if t_y is None else t_y + t_beta
        return None if t_y is None else t_y.reshape(dy.shape)

    def tangent_backward(
        self, step: int, saved: Normalised, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        xhat, r, mean = saved.xhat, saved.r, saved.mean
        u, t_u = self._scaled(step, saved, dy), self._scaled(step, saved, t_dy)
        if (t_gamma := saved.spread(self._direction(step)[0])) is not None:
            t_u = t_u + t_gamma * dy.reshape(xhat.shape)
        if t_x is None:
            return (r * saved.project(t_u)).view(dy.shape)
        moved = t_xhat(saved, t_x)
        t_r = -r.square() * mean(xhat * t_x.reshape(xhat.shape))
        t_dx = t_u - mean(t_u) - moved * mean(u * xhat) - xhat * mean(t_u * xhat + u * moved)
        return (t_dx.mul_(r) + t_r * saved.project(u)).view(dy.shape)

    def gradients(self, saved: Normalised, dy: Tensor) -> Pair:
        return _all_tasks(self._by_task(saved, dy))

    def t_gradients(self, saved: Normalised, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        return _all_tasks(self._t_by_task(saved, dy, t_x, t_dy))

    def _by_task(self, saved: Normalised, dy: Tensor) -> Pair:
        dy = dy.reshape(saved.xhat.shape)
        return self._sums(saved, dy * saved.xhat, dy)

    def _t_by_task(self, saved: Normalised, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        dy, t_dy = dy.reshape(saved.xhat.shape), t_dy.reshape(saved.xhat.shape)
        by_gamma = t_dy * saved.xhat
        if t_x is not None:
            by_gamma = by_gamma + dy * t_xhat(saved, t_x)
        return self._sums(saved, by_gamma, t_dy)

    def _sums(self, saved: Normalised, by_gamma: Tensor, by_beta: Tensor) -> Pair:
        """Summed to the shapes of gamma and beta, where they are wanted."""
        weight, bias = self.shared
        moves_weight, moves_bias = self.moves
        return (
            saved.summed(by_gamma, weight.shape) if moves_weight and weight is not None else None,
            saved.summed(by_beta, bias.shape) if moves_bias and bias is not None else None,
        )


class FastNorm(SharedNorm, DenseLayer):
    """A norm of which gamma or beta adapts."""

    def __init__(self, spec: LayerSpec) -> None:
        SharedNorm.__init__(self, spec)
        DenseLayer.__init__(self, spec)

    def _pair(self, step: int) -> Pair:
        return self.w[step], self.b[step]

    def _direction(self, step: int) -> Pair:
        return self.direction(step)

    gradients = SharedNorm._by_task
    t_gradients = SharedNorm._t_by_task


def _all_tasks(pair: Pair) -> Pair:
    gamma, beta = (None if part is None else part.sum(0) for part in pair)
    return gamma, beta


def t_xhat(saved: Normalised, t_x: Tensor) -> Tensor:
    """r P(t_x)"""
    return saved.r * saved.project(t_x.reshape(saved.xhat.shape))
