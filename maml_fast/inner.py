"""Inner rules: what an inner step makes of the gradient of the support loss.

A rule sees one task: dictionaries from names to tensors of the parameters' own shapes. It is made
of torch operations that autograd differentiates and vmap batches, and what it computes is
differentiated exactly, clipping and moments included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class InnerRule:
    """How parameters move in an inner step. A rule of one's own derives from this.

    It must equal (`==`, hash) only a rule that does the same, for plans are kept by it; that of a
    frozen dataclass does, and that of a plain object too.
    """

    def start(self, parameters: Tensors) -> Any:
        """What the rule keeps from step to step, before the first: any nesting of dictionaries,
        lists and tuples with tensors at its leaves."""
        return {}

    def step(
        self, parameters: Tensors, gradients: Tensors, rates: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """The parameters after one step, and what is kept.

        parameters, gradients: {name: the parameter's own shape}; rates: {name: a tensor that
        broadcasts to it}, the inner learning rates of this step.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(InnerRule):
    """Gradient descent, as `torch.optim.SGD` does it.

    momentum: mu of m_{k+1} = mu m_k + g_k, with m_0 = 0; 0 or more, below 1.
    nesterov: step along g_k + mu m_{k+1} instead of m_{k+1}.
    weight_decay: adds so much of the parameter to its gradient, after clipping.
    proximal: adds so much of the parameter's way from where the task began to its gradient: that of
        proximal/2 |theta - theta_0|^2 beside the support loss (Rajeswaran et al. 2019).
    clip_value: each number of a gradient is held within -clip_value and clip_value.
    clip_norm: then all gradients of a task are scaled down together where their norm is larger,
        as `torch.nn.utils.clip_grad_norm_` does it.

    Raises TypeError or ValueError naming the argument.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    proximal: float = 0.0

    def __post_init__(self) -> None:
        _check_number("momentum", self.momentum, below=1.0)
        _check_number("weight_decay", self.weight_decay)
        _check_number("proximal", self.proximal)
        _check_clipping(self.clip_norm, self.clip_value)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov is {self.nesterov!r}; wanted is True or False")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is True but momentum is 0; give momentum, or leave it out")

    @property
    def plain(self) -> bool:
        """Whether it is theta - eta g and no more."""
        return self == SGD()

    @property
    def linear(self) -> bool:
        """Whether a step is a linear function of gradients and the parameter as it is."""
        return self.clip_norm is None and self.clip_value is None and not self.proximal

    def start(self, parameters: Tensors) -> Any:
        state: dict[str, Tensors] = {}
        if self.momentum:
            state["momentum"] = {name: torch.zeros_like(p) for name, p in parameters.items()}
        if self.proximal:
            state["start"] = dict(parameters)
        return state

    def step(
        self, parameters: Tensors, gradients: Tensors, rates: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        moved, momentum = {}, {}
        for name, g in clipped(gradients, self.clip_norm, self.clip_value).items():
            if self.weight_decay:
                g = g + self.weight_decay * parameters[name]
            if self.proximal:
                g = g + self.proximal * (parameters[name] - state["start"][name])
            if self.momentum:
                momentum[name] = self.momentum * state["momentum"][name] + g
                g = g + self.momentum * momentum[name] if self.nesterov else momentum[name]
            moved[name] = parameters[name] - rates[name] * g
        return moved, {**state, "momentum": momentum} if self.momentum else state

    def __str__(self) -> str:
        return _described("SGD", self, SGD())


@dataclass(frozen=True)
class Adam(InnerRule):
    """Adam (Kingma and Ba 2015) in the inner loop, as `torch.optim.Adam` does it, from moments 0.

    betas, eps, weight_decay: as there. clip_norm, clip_value: as of `SGD`.
    Its first step is nearly the gradient's sign, whose derivative is as large as 1/eps where a
    gradient is 0: enlarge eps if the meta-gradient explodes.

    Raises TypeError or ValueError naming the argument.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas is {self.betas!r}; wanted are two numbers from 0 up, below 1")
        object.__setattr__(self, "betas", tuple(self.betas))  # hashable
        for beta in self.betas:
            _check_number("betas", beta, below=1.0)
        _check_number("eps", self.eps, above=0.0)
        _check_number("weight_decay", self.weight_decay)
        _check_clipping(self.clip_norm, self.clip_value)

    def start(self, parameters: Tensors) -> Any:
        zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
        device = next((p.device for p in parameters.values()), None)
        # In few digits 1 - beta^steps would be lost.
        steps = torch.zeros((), dtype=torch.float64, device=device)
        return {"first": zeros, "second": dict(zeros), "steps": steps}

    def step(
        self, parameters: Tensors, gradients: Tensors, rates: Tensors, state: Any
    ) -> tuple[dict[str, Tensor], Any]:
        beta1, beta2 = self.betas
        steps = state["steps"] + 1
        moved, first, second = {}, {}, {}
        for name, g in clipped(gradients, self.clip_norm, self.clip_value).items():
            if self.weight_decay:
                g = g + self.weight_decay * parameters[name]
            first[name] = beta1 * state["first"][name] + (1 - beta1) * g
            second[name] = beta2 * state["second"][name] + (1 - beta2) * g * g
            size = _root(second[name] / (1 - beta2**steps).to(g.dtype))
            mean = first[name] / (1 - beta1**steps).to(g.dtype)
            moved[name] = parameters[name] - rates[name] * mean / (size + self.eps)
        return moved, {"first": first, "second": second, "steps": steps}

    def __str__(self) -> str:
        return _described("Adam", self, Adam())


def clipped(
    gradients: Tensors, clip_norm: float | None, clip_value: float | None
) -> dict[str, Tensor]:
    """One task's gradients, each number clipped and then their norm; differentiable."""
    found = dict(gradients)
    if clip_value is not None:
        found = {name: g.clamp(-clip_value, clip_value) for name, g in found.items()}
    if clip_norm is not None and found:
        squares = sum(g.square().sum() for g in found.values())
        assert isinstance(squares, Tensor)
        scale = (clip_norm / (_root(squares) + 1e-6)).clamp(max=1.0)
        found = {name: g * scale for name, g in found.items()}
    return found


def _root(x: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0: what is multiplied by it is 0 there too."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def _described(name: str, rule: Any, default: Any) -> str:
    given = {k: v for k, v in vars(rule).items() if v != vars(default)[k]}
    return name + "(" + ", ".join(f"{k}={v}" for k, v in given.items()) + ")"


def _check_clipping(clip_norm: object, clip_value: object) -> None:
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is not None:
            _check_number(name, value, above=0.0)


def _check_number(
    name: str, value: object, below: float = math.inf, above: float | None = None
) -> None:
    wanted = "a number " + ("from 0 up" if above is None else f"above {above:g}")
    wanted += f", below {below:g}" if math.isfinite(below) else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; wanted is {wanted}")
    inside = value >= 0 if above is None else value > above
    if not (math.isfinite(value) and inside and value < below):
        raise ValueError(f"{name} is {value!r}; wanted is {wanted}")
