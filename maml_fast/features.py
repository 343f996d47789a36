"""What each backend runs of the MAML family, found out by running it.

A few small meta-steps, a moment each: no table to fall behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast import inner, outer
from maml_fast.errors import UnavailableBackendError, UnsupportedModelError
from maml_fast.maml import MAML
from maml_fast.rates import PositiveRate

BACKENDS = ("reference", "functional", "torch", "cpu", "triton")
T, N, M, S = 2, 4, 3, 2


@dataclass(frozen=True)
class Feature:
    """A variant: what is asked for, of a small network, and with which data."""

    name: str
    options: Callable[[nn.Module], dict[str, Any]]
    data: dict[str, Tensor] = field(default_factory=dict)
    inputs: bool = False


@dataclass(frozen=True)
class Found:
    """What came of it: the backend that ran, or why none did."""

    feature: str
    backend: str
    runs: bool
    reason: str = ""


def _rates(rate: Callable[[Tensor], Any]) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {"inner_lr": {n: rate(p) for n, p in model.named_parameters()}}


def _options(**options: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: options


FEATURES = (
    Feature("MAML, second order", _options()),
    Feature("FOMAML", _options(first_order=True)),
    Feature("ANIL: the head adapts", _options(inner_params=["4.*"])),
    Feature("BOIL: the body adapts", _options(inner_params=["0.*", "2.*"])),
    Feature(
        "rates by layer and step (LSLR), learned",
        _rates(lambda p: nn.Parameter(torch.full((S,), 0.1))),
    ),
    Feature("Meta-SGD", _rates(lambda p: nn.Parameter(torch.full((1, *p.shape), 0.1)))),
    Feature("rates that stay positive", _rates(lambda p: PositiveRate(0.1))),
    Feature("momentum, Nesterov", _options(inner_optimizer=inner.SGD(momentum=0.9, nesterov=True))),
    Feature("weight decay", _options(inner_optimizer=inner.SGD(weight_decay=0.1))),
    Feature("clipping of norms or values", _options(inner_optimizer=inner.SGD(clip_norm=1.0))),
    Feature("proximal term", _options(inner_optimizer=inner.SGD(proximal=1.0))),
    Feature("Adam, or a rule of one's own", _options(inner_optimizer=inner.Adam())),
    Feature("losses of all steps (MAML++)", _options(step_weights=[0.2, 0.3, 0.5])),
    Feature("norms with values for each step (MAML++)", _options(step_params=["3.*"])),
    Feature(
        "weights of rows, masks",
        _options(),
        {"support_weight": torch.tensor([[1.0, 1, 1, 0]] * T)},
    ),
    Feature("gradients by the inputs", _options(), inputs=True),
    Feature("Reptile", _options(meta_gradient=outer.Reptile())),
    Feature(
        "iMAML",
        _options(meta_gradient=outer.Implicit(), inner_optimizer=inner.SGD(proximal=1.0)),
    ),
)


def try_out(feature: Feature, backend: str) -> Found:
    """Whether a backend runs it: one small meta-step, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), norm, nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x, q = (torch.randn(T, rows, 3, generator=generator) for rows in (N, M))
    y, yq = (torch.randn(T, rows, 2, generator=generator) for rows in (N, M))
    options = {"inner_lr": 0.1, **feature.options(model)}
    maml = MAML(model, "mse", inner_steps=S, backend=backend, **options)
    x, q = x.requires_grad_(feature.inputs), q.requires_grad_(feature.inputs)
    try:
        maml(x, y, q, yq, **feature.data).loss.backward()
    except (UnsupportedModelError, UnavailableBackendError) as error:
        return Found(feature.name, backend, False, str(error))
    return Found(feature.name, backend, True)


def all_found(backends: tuple[str, ...] = BACKENDS) -> list[Found]:
    """Each feature on each backend."""
    return [try_out(feature, backend) for feature in FEATURES for backend in backends]


def reasons(found: list[Found]) -> list[str]:
    """Why a backend has not what it has not, a line each reason; "auto" takes another then."""
    lacking: dict[str, list[str]] = {}
    for one in found:
        if not one.runs:
            lacking.setdefault(one.reason, []).append(one.feature)
    every = len(dict.fromkeys(one.feature for one in found))
    return [
        f"{reason} (all of these)" if len(names) == every else f"{'; '.join(names)}: {reason}"
        for reason, names in lacking.items()
    ]


def as_markdown(found: list[Found]) -> str:
    """A table: a row a feature, a column a backend."""
    backends = list(dict.fromkeys(one.backend for one in found))
    runs = {(one.feature, one.backend): one.runs for one in found}
    lines = [f"| | {' | '.join(f'`{name}`' for name in backends)} |"]
    lines.append("|---" * (len(backends) + 1) + "|")
    for feature in dict.fromkeys(one.feature for one in found):
        marks = ["yes" if runs[feature, name] else "-" for name in backends]
        lines.append(f"| {feature} | {' | '.join(marks)} |")
    return "\n".join(lines)
