"""A convolution on the Triton kernels: dense fast weights, shared by all tasks at step 0.

T tasks, N images of a task, C/K in and out channels; x [T, pixels, C] with the channels last, z and
its cotangent D [T, pixels, K], weights [taps, C, K] or [T, taps, C, K]. The formulas are in
`maml_fast.fast_weights.conv`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.triton_blocks import Block, placed, summed
from maml_fast.backends.triton_forms import NOWHERE
from maml_fast.backends.triton_norm import NormBlock
from maml_fast.fast_weights import DenseLayer, LayerSpec, Pair
from maml_fast.kernels import conv
from maml_fast.kernels.attend import Terms
from maml_fast.ops import Conv2d, Stage


class FrozenConv(Stage):
    """A convolution that runs once, in front of all that adapts: [T, N, C, height, width]."""

    def __init__(self, spec: LayerSpec, precision: str) -> None:
        self.spec, self.precision = spec, precision

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        features = tuple(x.shape[2:])
        block = ConvBlock(self.spec, features, self.precision)
        rows = x.movedim(2, -1).contiguous().flatten(1, 3)
        z, saved = block.forward(0, rows, NOWHERE, None)
        sizes = -1, saved.geometry.out_height, saved.geometry.out_width
        return z.unflatten(1, sizes).movedim(-1, 2), None


@dataclass
class Saved:
    """What a convolution leaves of one pass over the network."""

    geometry: conv.Geometry
    x: Tensor
    d: Tensor = field(init=False)
    t_x: Tensor | None = None


class ConvLayer(DenseLayer):
    """The weights of a convolution, as the kernels have them."""

    def __init__(self, spec: LayerSpec, precision: str) -> None:
        super().__init__(spec)
        weight, bias = spec.weight, spec.bias
        assert weight is not None
        self.shape, self.precision = weight.shape, precision
        self.w = [weight.flatten(2).permute(2, 1, 0).contiguous()]
        self.b = [None if bias is None else bias.contiguous()]

    def at(self, step: int) -> Pair:
        """Before an inner step; what does not adapt stays the same."""
        step = step if any(self.moves) else 0
        return self.w[step], self.b[step]

    def rates(self, step: int) -> tuple[float, float]:
        return self.weight_rates[step], self.bias_rates[step]

    def move(
        self,
        saved: Saved,
        d: Tensor,
        base: Pair,
        scales: tuple[float, float],
        t: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Pair:
        """The base plus the scaled gradient of weight and bias from a cotangent, and from a second
        pair of input and cotangent; None of what stays. In new memory."""
        weight, bias = base
        moves_weight, moves_bias = self.moves
        tasks = len(d)
        new_bias = d.new_empty(tasks, d.shape[2]) if moves_bias else None
        if not moves_weight:
            if moves_bias:
                new_bias = d.sum(1).mul_(scales[1])
                new_bias = new_bias if bias is None else new_bias.add_(bias)
            return None, new_bias
        new = d.new_empty(tasks, *self.w[0].shape)  # type: ignore[union-attr]
        conv.outer(
            saved.geometry, new, self.precision, saved.x, d, *t, scales[0], weight,
            new_bias, scales[1], bias if moves_bias else None,
        )  # fmt: skip
        return new, new_bias

    def descend(self, step: int, saved: Saved, dy: Tensor) -> None:
        weight_rate, bias_rate = self.rates(step)
        base = self.w[step], self.b[step]
        for kept, new in zip(
            (self.w, self.b), self.move(saved, dy, base, (-weight_rate, -bias_rate)), strict=True
        ):
            kept.append(kept[step] if new is None else new)

    def begin_adjoint(self, saved: Saved, dy: Tensor) -> None:
        self.lam = self.move(saved, dy, (None, None), (1.0, 1.0))

    def pull_back(
        self, step: int, saved: Saved, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        second = (None, None) if t_x is None else (t_x, dy)
        self.lam = self.move(saved, t_dy, self.lam, (-1.0, -1.0), second)

    def add_rate_gradients(self, step: int, saved: Saved, dy: Tensor) -> None:
        lam, lam_b = self.lam
        if lam is not None:
            lam_x = torch.empty_like(dy)
            conv.convolve("forward", saved.geometry, lam_x, self.precision, saved.x, lam)
            self.rate_gradients[0][step] -= (lam_x * dy).sum(dtype=torch.float64)
        if lam_b is not None:
            self.rate_gradients[1][step] -= (lam_b.unsqueeze(1) * dy).sum(dtype=torch.float64)

    def gradient_sums(self) -> Pair:
        lam, lam_b = self.lam
        return (
            None if lam is None else self._as_torch(lam.sum(0)),
            None if lam_b is None else lam_b.sum(0),
        )

    def _as_torch(self, weight: Tensor) -> Tensor:
        """[.., taps, C, K] -> [.., K, C, kernel, kernel]"""
        return weight.movedim(-3, -1).transpose(-2, -3).unflatten(-1, self.shape[2:])

    def weights(self, step: int) -> Pair:
        tasks, (w, b) = self.spec.tasks, (self.w[step], self.b[step])
        assert w is not None
        w = self._as_torch(w).expand(tasks, *self.shape)
        return w, None if b is None else b.expand(tasks, b.shape[-1])


class ConvBlock(Block):
    """A convolution alone. A batch norm behind it gets the statistics of its tiles."""

    def __init__(self, spec: LayerSpec, features: tuple[int, ...], precision: str) -> None:
        assert isinstance(spec.op, Conv2d)
        self.op, self.features, self.precision = spec.op, features, precision
        self.weights = ConvLayer(spec, precision)
        self.layer = self.weights if any(self.weights.moves) else None
        self.width = spec.op.in_channels
        self.follower: NormBlock | None = None

    def _geometry(self, x: Tensor) -> conv.Geometry:
        op, (_, height, width) = self.op, self.features
        images = x.shape[1] // (height * width)
        return conv.Geometry(
            images, height, width, op.in_channels, op.out_channels, op.kernel, op.stride, op.padding
        )

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Saved]:
        geometry = self._geometry(x)
        shape = len(x), geometry.out_rows, geometry.out_channels
        out, partials = placed(x, shape, to), None
        tiles, split = conv.tiles_of(geometry)
        if self.follower is not None:
            partials = x.new_empty(len(x), tiles, 2, geometry.out_channels)
            self.follower.measured = partials, split
        w, b = self.weights.at(step)
        conv.convolve("forward", geometry, out, self.precision, x, w, bias=b, partials=partials)
        return out, Saved(geometry, x)

    def backward(
        self, step: int, saved: Saved, dy: Terms, place: str, goes_on: bool
    ) -> Terms | None:
        saved.d = summed(dy, self.precision).view(len(saved.x), -1, self.op.out_channels)
        if not goes_on:
            return None
        dx = torch.empty_like(saved.x)
        w, _ = self.weights.at(step)
        conv.convolve("backward", saved.geometry, dx, self.precision, saved.d, w)
        return Terms(dx)

    def tangent(self, step: int, saved: Saved, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        saved.t_x = t_x
        weight_rate, bias_rate = self.weights.rates(step)
        lam, lam_b = self.weights.lam
        t_z = placed(saved.d, tuple(saved.d.shape), to)
        conv.convolve(
            "forward", saved.geometry, t_z, self.precision,
            t_x, None if t_x is None else self.weights.at(step)[0],
            None if lam is None else saved.x, lam, weight_rate, lam_b, bias_rate,
        )  # fmt: skip
        return t_z

    def tangent_backward(self, step: int, saved: Saved, t_dy: Terms, goes_on: bool) -> Terms | None:
        t_d = summed(t_dy, self.precision).view(saved.d.shape)
        terms = None
        if goes_on:
            t_dx, (lam, _) = torch.empty_like(saved.x), self.weights.lam
            w, _ = self.weights.at(step)
            conv.convolve(
                "backward", saved.geometry, t_dx, self.precision, t_d, w,
                None if lam is None else saved.d, lam, self.weights.rates(step)[0],
            )  # fmt: skip
            terms = Terms(t_dx)
        if self.layer is not None:
            self.layer.pull_back(step, saved, saved.d, saved.t_x, t_d)
        return terms

    def descend(self, step: int, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.descend(step, saved, saved.d)

    def begin_adjoint(self, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.begin_adjoint(saved, saved.d)

    def add_rate_gradients(self, step: int, saved: Saved) -> None:
        if self.layer is not None:
            self.layer.add_rate_gradients(step, saved, saved.d)
