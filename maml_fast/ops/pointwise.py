"""Pointwise activations: y = f(x), dx = f' dy, t_y = f' t_x, t_dx = f' t_dy + f'' t_x dy."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_fast.ops.base import Features, Operation

aten = torch.ops.aten


class Pointwise(Operation):
    """f by three functions; `saved` is whatever `value` wants to hand to the other two."""

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        """f(x), and what `slope` and `curve` need."""
        raise NotImplementedError

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        """f'(x) v"""
        raise NotImplementedError

    def curve(self, saved: Any) -> Tensor | None:
        """f''(x), or None where f is piecewise linear."""
        return None

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return self.value(x)

    def backward(self, step: int, saved: Any, dy: Tensor) -> Tensor:
        return self.slope(saved, dy)

    def tangent(self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None) -> Tensor | None:
        return None if t_x is None else self.slope(saved, t_x)

    def tangent_backward(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> Tensor:
        t_dx = self.slope(saved, t_dy)
        if t_x is None or (curve := self.curve(saved)) is None:
            return t_dx
        return t_dx.addcmul_(curve.mul_(t_x), dy)

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (7,)
        yield cls(), (2, 3)


class ReLU(Pointwise):
    """saved: y"""

    native = ("relu", ())
    modules = {nn.ReLU: lambda module: ReLU()}
    calls = dict.fromkeys(
        (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"),
        lambda input, inplace=False: ReLU(),
    )

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        y = x.relu()
        return y, y

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.threshold_backward(v, saved, 0)

    def oracle(self, x: Tensor) -> Tensor:
        return F.relu(x)


class LeakyReLU(Pointwise):
    """saved: x"""

    modules = {nn.LeakyReLU: lambda module: LeakyReLU(module.negative_slope)}
    calls = dict.fromkeys(
        (F.leaky_relu, F.leaky_relu_),
        lambda input, negative_slope=0.01, inplace=False: LeakyReLU(negative_slope),
    )

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope
        self.native = ("leaky_relu", (negative_slope,))

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.leaky_relu(x, self.negative_slope), x

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.leaky_relu_backward(v, saved, self.negative_slope, False)

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (7,)
        yield cls(0.3), (2, 3)

    def oracle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)


class Tanh(Pointwise):
    """saved: y; f' = 1 - y^2, f'' = -2 y f'"""

    native = ("tanh", ())
    modules = {nn.Tanh: lambda module: Tanh()}
    calls = dict.fromkeys((torch.tanh, F.tanh, "tanh"), lambda input: Tanh())

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        y = x.tanh()
        return y, y

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.tanh_backward(v, saved)

    def curve(self, saved: Any) -> Tensor | None:
        return aten.tanh_backward(saved, saved).mul_(-2)

    def oracle(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Sigmoid(Pointwise):
    """saved: y; f' = y (1 - y), f'' = (1 - 2 y) f'"""

    native = ("sigmoid", ())
    modules = {nn.Sigmoid: lambda module: Sigmoid()}
    calls = dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), lambda input: Sigmoid())

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        y = x.sigmoid()
        return y, y

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.sigmoid_backward(v, saved)

    def curve(self, saved: Any) -> Tensor | None:
        return aten.sigmoid_backward(1 - 2 * saved, saved)

    def oracle(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class SiLU(Pointwise):
    """f = x s with s = sigmoid(x); f' = s (1 + x (1 - s)), f'' = s (1 - s) (2 + x (1 - 2 s))"""

    native = ("silu", ())
    modules = {nn.SiLU: lambda module: SiLU()}
    calls = {F.silu: lambda input, inplace=False: SiLU()}

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.silu(x), x

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.silu_backward(v, saved)

    def curve(self, saved: Any) -> Tensor | None:
        s = saved.sigmoid()
        return saved.mul(1 - 2 * s).add_(2).mul_(s).mul_(1 - s)

    def oracle(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GELU(Pointwise):
    """f = x Phi(x), Phi the normal distribution, or its tanh approximation

    exact: f'' = (2 - x^2) phi(x). tanh: f = x/2 (1 + t), t = tanh(u), u = a (x + b x^3).
    """

    modules = {nn.GELU: lambda module: GELU(module.approximate)}
    calls = {F.gelu: lambda input, approximate="none": GELU(approximate)}

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate
        self.native = ("gelu" if approximate == "none" else "gelu_tanh", ())

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.gelu(x, approximate=self.approximate), x

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.gelu_backward(v, saved, approximate=self.approximate)

    def curve(self, saved: Any) -> Tensor | None:
        x, square = saved, saved.square()
        if self.approximate == "none":
            return (2 - square).mul_(torch.exp(-0.5 * square)).mul_(1 / math.sqrt(2 * math.pi))
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(a * x * (1 + b * square))
        u1, u2 = a * (1 + 3 * b * square), 6 * a * b * x
        # f' = (1 + t)/2 + x/2 (1 - t^2) u1, differentiated once more
        return (1 - t.square()) * (u1 + 0.5 * x * (u2 - 2 * t * u1.square()))

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (7,)
        yield cls("tanh"), (7,)

    def oracle(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)


class Softplus(Pointwise):
    """f = log(1 + e^{bx}) / b, f' = s = sigmoid(b x), f'' = b s'; f = x where b x > threshold"""

    modules = {nn.Softplus: lambda module: Softplus(module.beta, module.threshold)}
    calls = {F.softplus: lambda input, beta=1, threshold=20: Softplus(beta, threshold)}

    def __init__(self, beta: float = 1, threshold: float = 20) -> None:
        self.beta, self.threshold = beta, threshold
        self.native = ("softplus", (beta, threshold))

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.softplus(x, self.beta, self.threshold), x

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return aten.softplus_backward(v, saved, self.beta, self.threshold)

    def curve(self, saved: Any) -> Tensor | None:
        scaled = saved * self.beta
        s = scaled.sigmoid()
        return aten.sigmoid_backward(s.new_full((), self.beta).expand_as(s), s).masked_fill_(
            scaled > self.threshold, 0
        )

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(), (7,)
        yield cls(2.5, 1.0), (7,)

    def oracle(self, x: Tensor) -> Tensor:
        return F.softplus(x, self.beta, self.threshold)


class Sine(Pointwise):
    """saved: x and y; f' = cos x, f'' = -y"""

    native = ("sine", ())
    calls = dict.fromkeys((torch.sin, "sin"), lambda input: Sine())

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        y = x.sin()
        return y, (x.cos(), y)

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return saved[0] * v

    def curve(self, saved: Any) -> Tensor | None:
        return -saved[1]

    def oracle(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Scale(Pointwise):
    """f = c x with a constant c, as in SIREN's sin(30 x)"""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.native = ("scale", (factor,))

    calls = dict.fromkeys(
        (operator.mul, torch.mul, "mul"),
        lambda input, other: Scale(_number(input if other is None else other)),
    )

    def value(self, x: Tensor) -> tuple[Tensor, Any]:
        return x * self.factor, None

    def slope(self, saved: Any, v: Tensor) -> Tensor:
        return v * self.factor

    @classmethod
    def examples(cls) -> Iterable[tuple[Operation, Features]]:
        yield cls(-2.5), (7,)

    def oracle(self, x: Tensor) -> Tensor:
        return x * self.factor

    def __str__(self) -> str:
        return f"scale({self.factor:g})"


def _number(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise ValueError("multiplies by something other than a number")
    return value
