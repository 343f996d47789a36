"""Normalisation, activations and 2x2 max pool on the Triton kernels, as one block.

Any of the three may be absent. T tasks, N images of a task, C channels; x [T, pixels, C] with the
channels last. gamma and beta are fast weights [C] or [T, C]. The formulas are in
`maml_fast.kernels.norm_kernel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.triton_blocks import Block, placed, summed
from maml_fast.backends.triton_forms import NOWHERE, SUPPORT
from maml_fast.fast_weights import DenseLayer, LayerSpec, Pair
from maml_fast.kernels import norm
from maml_fast.kernels.attend import Terms
from maml_fast.ops import BatchNorm, Features, GroupNorm, LayerNorm, Norm


@dataclass(frozen=True)
class Seen:
    """How a row of features is seen: as images [height, width, channels], `per_row` of them. The
    norm's statistics are those of `norm.Shape`."""

    channels: int
    height: int = 1
    width: int = 1
    per_row: int = 1
    norm: str = "none"
    group_size: int = 1

    @classmethod
    def by(cls, op: Norm | None, features: Features, channels_last: bool) -> Seen:
        """By a norm, or by an activation or a pool alone."""
        size = math.prod(features)
        if isinstance(op, LayerNorm):
            width = math.prod(op.shape)
            return cls(width, per_row=size // width, norm="rows", group_size=width)
        if op is None and not channels_last:
            return cls(size)
        channels, *positions = features
        height, width = positions if len(positions) == 2 else (math.prod(positions), 1)
        if isinstance(op, GroupNorm):
            return cls(channels, height, width, norm="rows", group_size=channels // op.groups)
        return cls(channels, height, width, norm="batch" if isinstance(op, BatchNorm) else "none")


@dataclass
class Saved:
    """What a block leaves of one pass over the network."""

    shape: norm.Shape
    x: Tensor
    stats: Tensor | None
    code: Tensor | None
    dy: Tensor = field(init=False)
    sums: Tensor | None = None
    gradients: Tensor | None = None  # [2, T, C] of beta and gamma
    t_x: Tensor | None = None
    t_stats: Tensor | None = None


class NormLayer(DenseLayer):
    """gamma and beta, as the kernels have them: [C] or [T, C]."""

    def __init__(self, spec: LayerSpec, positions: int) -> None:
        """positions: of a layer norm over images that lie channels last, else 1."""
        super().__init__(spec)
        self.positions = positions
        self.w, self.b = [self._in_memory(spec.weight)], [self._in_memory(spec.bias)]

    def _in_memory(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        return parameter.reshape(-1, self.positions).mT.reshape(-1).contiguous()

    def _as_torch(self, parameter: Tensor | None, like: Tensor | None) -> Tensor | None:
        """[.., C] -> [.., *shape]"""
        if parameter is None or like is None:
            return None
        found = parameter.unflatten(-1, (self.positions, -1)).mT
        return found.reshape(*parameter.shape[:-1], *like.shape)

    def direction_of(self, step: int) -> norm.Affine:
        """The weights before an inner step, and its tangent."""
        lam, lam_b = self.lam
        rates = self.weight_rates[step], self.bias_rates[step]
        return norm.Affine(self.w[step], self.b[step], lam, lam_b, *rates)

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        """saved: [2, T, C], the gradients of beta and gamma"""
        for i, lam in enumerate(self.lam):
            if lam is not None:
                found = (saved[1 - i] * lam).sum(dtype=torch.float64)
                self.rate_gradients[i][step] -= found

    def gradient_sums(self) -> Pair:
        lam, lam_b = (None if lam is None else lam.sum(0) for lam in self.lam)
        return self._as_torch(lam, self.spec.weight), self._as_torch(lam_b, self.spec.bias)

    def weights(self, step: int) -> Pair:
        found = []
        for kept, like in ((self.w, self.spec.weight), (self.b, self.spec.bias)):
            formed = self._as_torch(kept[step], like)
            if formed is not None and like is not None:
                formed = formed.expand(self.spec.tasks, *like.shape)
            found.append(formed)
        return found[0], found[1]


class NormBlock(Block):
    """A norm, if any, with the pointwise operations and the max pool behind it."""

    layer: NormLayer | None

    def __init__(
        self,
        seen: Seen,
        precision: str,
        op: Norm | None = None,
        weights: NormLayer | None = None,
        ops: tuple[Any, ...] = (),
        pool: bool = False,
    ) -> None:
        self.seen, self.op, self.ops, self.pool = seen, op, ops, pool
        self.precision, self.weights, self.width = precision, weights, seen.channels
        self.layer = weights if weights is not None and any(weights.moves) else None
        self.by_row = seen.norm == "rows"
        self.measured: tuple[Tensor, int] | None = None  # partial statistics of the next input

    def followed_by(self, ops: tuple[Any, ...] = (), pool: bool = False) -> NormBlock:
        """The same with more behind it."""
        return NormBlock(self.seen, self.precision, self.op, self.weights, (*self.ops, *ops), pool)

    def takes_pool(self, seen: Seen) -> bool:
        """Whether a max pool of such images can join."""
        own = self.seen
        sizes = (own.channels, own.height, own.width, own.per_row)
        return not self.pool and sizes == (seen.channels, seen.height, seen.width, seen.per_row)

    def _affine(self, step: int) -> norm.Affine:
        if self.weights is None:
            return norm.Affine()
        step = 0 if self.layer is None else step
        return norm.Affine(self.weights.w[step], self.weights.b[step])

    def _total(
        self,
        kind: str,
        saved: Saved,
        affine: norm.Affine,
        by_group: bool = False,
        t_dy: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        """The two sums of a pass, of each channel or group, [2, T, statistics]; options: those of
        `norm.total`."""
        shape, given = saved.shape, dict(x=saved.x, stats=saved.stats, t_dy=t_dy)
        if kind != "tangent":
            given |= dict(dy=saved.dy, code=saved.code)
        if kind != "backward":
            given |= dict(t_x=saved.t_x)
        if kind == "tangent_backward":
            given |= dict(t_stats=saved.t_stats)
        partials = norm.sums(kind, shape, len(saved.x), affine, by_group, **given)
        return norm.total(partials, shape.count, **options)

    def _statistics(self, shape: norm.Shape, x: Tensor) -> Tensor | None:
        """Mean and r"""
        measured, self.measured = self.measured, None
        if self.op is None:
            return None
        if measured is None:
            partials = norm.sums("forward", shape, len(x), norm.Affine(), self.by_row, x=x)
            measured = partials, shape.count if self.by_row else norm.SPLIT
        return norm.total(measured[0], shape.count, measured[1], self.op.eps)

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Saved]:
        seen = self.seen
        images = x.shape[1] // (seen.height * seen.width)
        shape = norm.Shape(
            images, seen.height, seen.width, seen.channels, seen.norm, self.ops, self.pool,
            seen.group_size,
        )  # fmt: skip
        saved = Saved(shape, x, self._statistics(shape, x), None)
        if place != NOWHERE:
            saved.code = norm.new_code(shape, len(x), x)
        out = placed(x, (len(x), shape.out_pixels, seen.channels), to)
        norm.apply(
            "forward", shape, out, self._affine(step), x=x, stats=saved.stats, code=saved.code
        )
        return out, saved

    def backward(
        self, step: int, saved: Saved, dy: Terms, place: str, goes_on: bool
    ) -> Terms | None:
        shape, affine = saved.shape, self._affine(step)
        saved.dy = summed(dy, self.precision).view(len(saved.x), -1, shape.channels)
        if self.op is not None:
            if self.layer is not None or not self.by_row:
                saved.sums = self._gradients(step, saved, affine, place)
            if self.by_row and goes_on:
                share = 1 / shape.count
                saved.sums = self._total("backward", saved, affine, by_group=True, factor=share)
        if not goes_on:
            return None
        dx = saved.x.new_empty(saved.x.shape)
        norm.apply(
            "backward", shape, dx, affine, x=saved.x, stats=saved.stats, code=saved.code,
            dy=saved.dy, sums=saved.sums,
        )  # fmt: skip
        return Terms(dx)

    def _gradients(self, step: int, saved: Saved, affine: norm.Affine, place: str) -> Tensor | None:
        """[2, T, C] of beta and gamma; the layer takes its step, or begins its adjoint, as well."""
        layer = self.layer
        if layer is None:
            return self._total("backward", saved, affine)
        new, scales = self._new(layer, saved), (1.0, 1.0)
        base: dict[str, Any] = {}
        if place == SUPPORT:
            scales = -layer.weight_rates[step], -layer.bias_rates[step]
            base = dict(w=affine.gamma, b=affine.beta)
        saved.gradients = self._total(
            "backward", saved, affine, **new, **base, scale=scales[0], scale_b=scales[1]
        )
        if place == SUPPORT:
            layer.w.append(layer.w[step] if new["w_out"] is None else new["w_out"])
            layer.b.append(layer.b[step] if new["b_out"] is None else new["b_out"])
        else:
            layer.lam = new["w_out"], new["b_out"]
        return saved.gradients

    def _new(self, layer: NormLayer, saved: Saved) -> dict[str, Any]:
        """Memory for weights, or their adjoint, of what moves."""
        size = len(saved.x), saved.shape.channels
        return {
            name: saved.x.new_empty(size) if moves else None
            for name, moves in zip(("w_out", "b_out"), layer.moves, strict=True)
        }

    def tangent(self, step: int, saved: Saved, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        shape, affine = saved.shape, self._direction(step)
        saved.t_x = t_x
        if self.op is not None and t_x is not None:
            share = 1 / shape.count
            saved.t_stats = self._total("tangent", saved, affine, self.by_row, factor=share)
        t_y = placed(saved.x, (len(saved.x), shape.out_pixels, shape.channels), to)
        norm.apply(
            "tangent", shape, t_y, affine, x=saved.x, stats=saved.stats, code=saved.code,
            t_x=t_x, t_stats=saved.t_stats,
        )  # fmt: skip
        return t_y

    def _direction(self, step: int) -> norm.Affine:
        return self._affine(step) if self.layer is None else self.layer.direction_of(step)

    def tangent_backward(self, step: int, saved: Saved, t_dy: Terms, goes_on: bool) -> Terms | None:
        shape, affine, layer = saved.shape, self._direction(step), self.layer
        back = summed(t_dy, self.precision).view(saved.dy.shape)
        t_sums: Tensor | None = None
        new: dict[str, Any] = {}
        if self.op is not None:
            if layer is not None:
                new = self._new(layer, saved)
                new |= dict(w=affine.lam, b=affine.lam_b)
            if layer is not None or not self.by_row:
                t_sums = self._total(
                    "tangent_backward", saved, affine, t_dy=back, scale=-1.0, scale_b=-1.0, **new
                )
            if self.by_row and goes_on:
                t_sums = self._total(
                    "tangent_backward", saved, affine, by_group=True, t_dy=back,
                    factor=1 / shape.count,
                )  # fmt: skip
        terms = None
        if goes_on:
            t_dx = saved.x.new_empty(saved.x.shape)
            norm.apply(
                "tangent_backward", shape, t_dx, affine, x=saved.x, stats=saved.stats,
                code=saved.code, dy=saved.dy, t_dy=back, t_x=saved.t_x, t_stats=saved.t_stats,
                sums=saved.sums, t_sums=t_sums,
            )  # fmt: skip
            terms = Terms(t_dx)
        if layer is not None:
            layer.lam = new["w_out"], new["b_out"]
        return terms

    def add_rate_gradients(self, step: int, saved: Saved) -> None:
        if self.layer is not None and saved.gradients is not None:
            self.layer.add_rate_gradients(step, saved.gradients, saved.dy)
