"""Meta-steps with options drawn at random: what adapts, rates, rules, steps and rows that count."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast import MAML, PositiveRate, inner
from tests.networks import Draw

RULES = {
    "sgd": inner.SGD(),
    "momentum": inner.SGD(momentum=0.7),
    "nesterov": inner.SGD(momentum=0.5, nesterov=True),
    "weight decay": inner.SGD(weight_decay=0.1),
    "momentum and decay": inner.SGD(momentum=0.6, nesterov=True, weight_decay=0.2),
    "clipped norm": inner.SGD(clip_norm=0.3, momentum=0.3),
    "clipped values": inner.SGD(clip_value=0.05, weight_decay=0.1),
    "proximal": inner.SGD(proximal=0.4, momentum=0.5),
    "adam": inner.Adam(eps=0.1, weight_decay=0.05),
}
LINEAR = ["sgd", "momentum", "nesterov", "weight decay", "momentum and decay"]
ADAPTS = ["all", "head", "body", "middle", "weights", "biases"]
RATES = ["number", "learned", "each step", "positive", "meta-sgd", "meta-sgd by step"]
STEP_WEIGHTS = ["last", "all", "some"]
ROWS = ["all", "masks", "weights"]


@dataclass
class Variant:
    """One meta-step, and what it is asked for."""

    seed: int = 0
    network: str = "mlp"
    adapts: str = "all"
    rates: str = "number"
    rule: str = "sgd"
    step_weights: str = "last"
    rows: str = "all"
    loss: str = "cross_entropy"
    steps: int = 3
    first_order: bool = False
    inputs: bool = False
    frozen: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random, self.draw = random.Random(self.seed), Draw(self.seed)
        self.model, shape = NETWORKS[self.network]()
        self.model = self.draw.initialise(self.model.double())
        names = [name for name, _ in self.model.named_parameters()]
        if self.frozen:
            for name in self.random.sample(names, 2):
                self.model.get_parameter(name).requires_grad_(False)
        tasks, counts = 3, (5, 4)
        self.x = [self.draw.normal(tasks, n, *shape) for n in counts]
        self.y = [self.draw.target(self.loss, tasks, n, features=3) for n in counts]
        self.weights = [self._row_weights(tasks, n) for n in counts]

    def _row_weights(self, tasks: int, rows: int) -> Tensor | None:
        if self.rows == "all":
            return None
        uniform = torch.rand(tasks, rows, generator=self.draw.generator, dtype=torch.float64)
        counts = uniform < 0.6
        counts[:, :3] = True
        return counts if self.rows == "masks" else counts * (uniform + 0.5)

    def inner_params(self) -> list[str] | None:
        """Names or patterns."""
        names = [name for name, _ in self.model.named_parameters()]
        head = names[-1].split(".")[0] + "."
        if self.adapts == "all":
            return None
        if self.adapts == "head":
            return [head + "*"]
        if self.adapts == "body":
            return [name for name in names if not name.startswith(head)]
        if self.adapts == "middle":
            return names[2:4]
        return ["*.weight"] if self.adapts == "weights" else ["*.bias"]

    def adapting(self) -> dict[str, nn.Parameter]:
        maml = MAML(self.model, inner_params=self.inner_params())
        named = dict(self.model.named_parameters())
        if maml.inner_params is None:
            return {name: p for name, p in named.items() if p.requires_grad}
        from maml_fast.options import matching

        return {
            name: named[name] for name in matching("inner_params", maml.inner_params, named) or ()
        }

    def rate(self) -> Any:
        """What `inner_lr` is given."""
        double = dict(dtype=torch.float64)
        if self.rates == "number":
            return 0.1
        if self.rates == "learned":
            return nn.Parameter(torch.tensor(0.1, **double))
        steps = torch.linspace(0.05, 0.2, self.steps, **double)
        if self.rates == "each step":
            return {n: nn.Parameter(steps * (1 + i % 3)) for i, n in enumerate(self.adapting())}
        if self.rates == "positive":
            return {n: PositiveRate(torch.tensor(0.1, **double)) for n in self.adapting()}
        found: dict[str, Any] = {}
        for i, (name, p) in enumerate(self.adapting().items()):
            shape = p.shape if self.rates == "meta-sgd" else (self.steps, *p.shape)
            if i % 3 == 2:
                found[name] = 0.15
            else:
                spread = torch.rand(shape, generator=self.draw.generator, **double)
                found[name] = nn.Parameter(0.2 * spread)
        return found

    def weights_of_steps(self) -> list[float] | None:
        if self.step_weights == "last":
            return None
        if self.step_weights == "all":
            return [1 / (1 + step) for step in range(self.steps + 1)]
        return [0.7 * (step % 2) for step in range(self.steps)] + [0.5]

    def maml(self, backend: str, **options: Any) -> MAML:
        rule = RULES[self.rule]
        maml = MAML(
            self.model, self.loss, self.rate(), self.steps, self.first_order, backend=backend,
            inner_params=self.inner_params(), inner_optimizer=rule,
            step_weights=self.weights_of_steps(), **self.options, **options,
        )  # fmt: skip
        self.draw = Draw(self.seed + 1)  # the same rates for the next one
        return maml

    def run(self, backend: str, **options: Any) -> dict[str, Tensor]:
        """Losses, outputs, and every gradient by name."""
        self.draw = Draw(self.seed + 1)
        maml = self.maml(backend, **options)
        maml.zero_grad()
        x, q = (rows.clone().requires_grad_(self.inputs) for rows in self.x)
        out = maml(x, self.y[0], q, self.y[1], *self.weights)
        out.loss.backward()
        found = {"loss": out.loss.detach(), "task losses": out.task_losses}
        found |= {"support losses": out.support_losses, "outputs": out.query_outputs}
        named = dict(maml.named_parameters())
        found |= {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        if self.inputs:
            found |= {"support_x": x.grad, "query_x": q.grad}  # type: ignore[dict-item]
        return found


def _batch_norm(channels: int, two: bool = False) -> nn.Module:
    kind = nn.BatchNorm2d if two else nn.BatchNorm1d
    return kind(channels, track_running_stats=False)


NETWORKS: dict[str, Any] = {
    "mlp": lambda: (
        nn.Sequential(
            nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 7, bias=False), nn.Softplus(),
            nn.Linear(7, 3),
        ),
        (4,),
    ),
    "mlp with norm": lambda: (
        nn.Sequential(
            nn.Linear(4, 6, bias=False), _batch_norm(6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(),
            nn.Linear(5, 3),
        ),
        (4,),
    ),
    "conv": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False), _batch_norm(3, True), nn.Tanh(),
            nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(),
            nn.Flatten(), nn.Linear(16, 3),
        ),
        (1, 5, 4),
    ),
}  # fmt: skip
