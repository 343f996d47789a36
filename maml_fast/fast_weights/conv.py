"""Convolutions with weights shared by all tasks, and with dense ones of each task's own.

T tasks, C/K in/out channels. x [T, N, C, H, W], weights [K, C, k, k] or [T, K, C, k, k]. A
convolution is bilinear in x and W, so its tangents are convolutions too (the product rule).
Tasks with weights of their own are groups of one grouped convolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as F_grad

from maml_fast.fast_weights.base import DenseLayer, LayerSpec, Pair, Still
from maml_fast.ops.conv import Conv2d


def _conv(op: Conv2d, x: Tensor, w: Tensor) -> Tensor:
    """x [T, N, C, H, W], w [K, C, k, k] or [T, K, C, k, k] -> [T, N, K, H', W']"""
    if w.dim() == 4:
        y = F.conv2d(x.flatten(0, 1), w, None, op.stride, op.padding)
        return y.unflatten(0, x.shape[:2])
    y = F.conv2d(_grouped(x), w.flatten(0, 1), None, op.stride, op.padding, groups=len(x))
    return _ungrouped(y, len(x))


def _conv_input(op: Conv2d, features: tuple[int, ...], w: Tensor, dy: Tensor) -> Tensor:
    """The transpose of `_conv` in x, which has rows of shape `features`."""
    tasks, rows = dy.shape[:2]
    if w.dim() == 4:
        shape = (tasks * rows, *features)
        dx = F_grad.conv2d_input(shape, w, dy.flatten(0, 1), op.stride, op.padding)
        return dx.unflatten(0, (tasks, rows))
    shape = (rows, tasks * features[0], *features[1:])
    dx = F_grad.conv2d_input(
        shape, w.flatten(0, 1), _grouped(dy), op.stride, op.padding, groups=tasks
    )
    return _ungrouped(dx, tasks)


def _conv_weight(op: Conv2d, x: Tensor, dy: Tensor) -> Tensor:
    """The transpose of `_conv` in w, for each task: [T, K, C, k, k]"""
    tasks = len(x)
    shape = (tasks * op.out_channels, op.in_channels, op.kernel, op.kernel)
    dw = F_grad.conv2d_weight(_grouped(x), shape, _grouped(dy), op.stride, op.padding, groups=tasks)
    return dw.unflatten(0, (tasks, op.out_channels))


def _grouped(x: Tensor) -> Tensor:
    """[T, N, C, ...] -> [N, T * C, ...]"""
    return x.transpose(0, 1).flatten(1, 2)


def _ungrouped(x: Tensor, tasks: int) -> Tensor:
    return x.unflatten(1, (tasks, -1)).transpose(0, 1)


def _plus_bias(z: Tensor, bias: Tensor | None) -> Tensor:
    """bias [K] or [T, K]"""
    if bias is None:
        return z
    return z.add_(bias.view(-1, 1, bias.shape[-1], 1, 1))


class SharedConv(Still):
    """A convolution that does not adapt: every task has the meta-parameters, at every step.
    saved: x"""

    def __init__(self, spec: LayerSpec) -> None:
        assert isinstance(spec.op, Conv2d)
        assert spec.weight is not None
        self.op, self.weight, self.bias = spec.op, spec.weight, spec.bias

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return _plus_bias(_conv(self.op, x, self.weight), self.bias), x

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return _conv_input(self.op, tuple(saved.shape[2:]), self.weight, dy)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else _conv(self.op, t_x, self.weight)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        return _conv_input(self.op, tuple(saved.shape[2:]), self.weight, t_dy)

    def gradients(self, saved: Any, dy: Tensor) -> Pair:
        bias = None if self.bias is None else dy.sum((0, 1, 3, 4))
        return self._by_weight(saved, dy), bias

    def t_gradients(self, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        weight, bias = self.gradients(saved, t_dy)
        if t_x is not None and weight is not None:
            weight = weight + self._by_weight(t_x, dy)
        return weight, bias

    def _by_weight(self, x: Tensor, dy: Tensor) -> Tensor:
        op = self.op
        x, dy = x.flatten(0, 1), dy.flatten(0, 1)
        return F_grad.conv2d_weight(x, self.weight.shape, dy, op.stride, op.padding)


class DenseConv(DenseLayer):
    """A convolution that adapts. saved: x"""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.op, Conv2d)
        self.op = spec.op

    def _weight(self, step: int) -> Tensor:
        w = self.w[step]
        assert w is not None
        return w

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return _plus_bias(_conv(self.op, x, self._weight(step)), self.b[step]), x

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return _conv_input(self.op, tuple(saved.shape[2:]), self._weight(step), dy)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        t_w, t_b = self.direction(step)
        t_z = dy.new_zeros(dy.shape) if t_w is None else _conv(self.op, saved, t_w)
        if t_x is not None:
            t_z = t_z + _conv(self.op, t_x, self._weight(step))
        return _plus_bias(t_z, t_b)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        features = tuple(saved.shape[2:])
        t_dx = _conv_input(self.op, features, self._weight(step), t_dy)
        t_w, _ = self.direction(step)
        return t_dx if t_w is None else t_dx + _conv_input(self.op, features, t_w, dy)

    def gradients(self, saved: Any, dy: Tensor) -> Pair:
        weight, bias = self.moves
        return (
            _conv_weight(self.op, saved, dy) if weight else None,
            dy.sum((1, 3, 4)) if bias else None,
        )

    def t_gradients(self, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        t_weight, t_bias = self.gradients(saved, t_dy)
        if t_x is not None and t_weight is not None:
            t_weight = t_weight + _conv_weight(self.op, t_x, dy)
        return t_weight, t_bias
