"""What the tests share: seeded data, small networks, and an independent meta-gradient."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_fast.problem import TaskBatch

SMOOTH = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}
IN_DOUBLE = ("cpu", "torch")  # planned backends that know float64
ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda z, y: ((z - y) ** 2).mean(),
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": lambda z, y: F.smooth_l1_loss(z, y, beta=1.0),
}


class Draw:
    """Tensors from an explicit seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def classes(self, *shape: int, classes: int) -> Tensor:
        return torch.randint(classes, shape, generator=self.generator)

    def target(self, loss: str, *shape: int, features: int) -> Tensor:
        if loss == "cross_entropy":
            return self.classes(*shape, classes=features)
        y = self.normal(*shape, features)
        return (y > 0).to(self.dtype) if loss == "bce_with_logits" else y

    def batch(self, loss: str, tasks: int, rows: int, queries: int, sizes: tuple) -> TaskBatch:
        x, q = self.normal(tasks, rows, sizes[0]), self.normal(tasks, queries, sizes[0])
        y = self.target(loss, tasks, rows, features=sizes[-1])
        return TaskBatch(x, y, q, self.target(loss, tasks, queries, features=sizes[-1]))

    def mlp(
        self, sizes: tuple[int, ...], activation: type[nn.Module] = nn.Tanh, bias: bool = True
    ) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o, bias=bias, dtype=self.dtype), activation()]
        return self.initialise(nn.Sequential(*layers[:-1]))

    def initialise(self, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
                parameter.copy_(self.normal(*parameter.shape) / fan_in**0.5)
        return model


def by_graph(
    model: nn.Module,
    batch: TaskBatch,
    loss: str,
    rates: Mapping[str, object] | float,
    inner_steps: int,
    first_order: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean query loss and its gradient by a plain loop with a graph; shares no code with maml_fast.

    The model is copied and its copies' parameters are swapped by hand, task by task.
    """
    model = copy.deepcopy(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        fast: dict[str, Tensor] = dict(named)
        for step in range(inner_steps):
            support_loss = ORACLES[loss](_call(model, fast, support_x), support_y)
            found = torch.autograd.grad(
                support_loss, list(fast.values()), create_graph=True, allow_unused=True
            )
            updated = {}
            for (name, p), g in zip(fast.items(), found, strict=True):
                rate = rates[name] if isinstance(rates, Mapping) else rates
                if isinstance(rate, Tensor) and rate.dim():
                    rate = rate[step]
                g = torch.zeros_like(p) if g is None else g.detach() if first_order else g
                updated[name] = p - rate * g
            fast = updated
        losses.append(ORACLES[loss](_call(model, fast, query_x), query_y))
    total = torch.stack(losses).mean()
    learning = (
        {name: r for name, r in rates.items() if isinstance(r, Tensor) and r.requires_grad}
        if isinstance(rates, Mapping)
        else {}
    )
    wanted = {**named, **{f"rate of {name}": rate for name, rate in learning.items()}}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return total.detach(), {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(wanted.items(), found, strict=True)
    }


def _call(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(parameters), (x,))


def gradients(maml: nn.Module, batch: TaskBatch) -> dict[str, Tensor]:
    """Gradients of the model's parameters, by name, from one fresh meta-step."""
    maml.zero_grad()
    maml(*batch).loss.backward()
    return {name: p.grad for name, p in maml.model.named_parameters() if p.requires_grad}


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float) -> None:
    """Every tensor of `wanted`, by name: ||found - wanted|| <= bound * ||wanted||."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        error = (found[name] - tensor).norm().item()
        assert error <= bound * tensor.norm().item() + 1e-300, (name, error, tensor.norm().item())
