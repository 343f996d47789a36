"""A case made concrete: the model and its tasks.

A ReLU whose pre-activation is within rounding of zero may switch differently in two correct
programs, which shows as 1e-5 to 1e-3 in the gradient and would drown the errors this benchmark
looks for. So, where a network says `off_kink`, tasks that come close to a kink anywhere in their
meta-step are left out and others drawn in their place.

Dimensions: T tasks, N support rows a task, M query rows a task.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.cases import Case
from benchmarks.episodes import Episodes
from benchmarks.networks import LOSSES

SEED = 20170309
# Nearest to zero that a pre-activation may come, as a fraction of the largest of its layer and
# pass: twenty times and more what float32 gets wrong.
KINK = 4e-6


@dataclass(frozen=True)
class Problem:
    """A model and the tasks of one meta-step; implementations must leave both as they are."""

    case: Case
    model: nn.Sequential
    episodes: Episodes

    def first(self, tasks: int) -> Problem:
        """The same with the first tasks only."""
        return replace(self, episodes=self.episodes.pick(slice(tasks)))

    def double(self) -> Problem:
        """The same in float64."""
        device = self.episodes.support_x.device
        model = copy.deepcopy(self.model).double()
        return replace(self, model=model, episodes=self.episodes.to(device, torch.float64))


def load(case: Case, device: torch.device, tasks: int | None = None) -> Problem:
    """Draw the case's model and tasks (or fewer tasks, if asked); always the same ones.

    Raises:
        RuntimeError: too few tasks stay off the kinks.
    """
    T = case.T if tasks is None else tasks
    network = case.network
    generator = torch.Generator().manual_seed(SEED)
    model = network.build().to(device)
    drawn = network.draw(generator, T + T // 2 + 8 if network.off_kink else T, case.N, case.M)
    if network.off_kink:
        kept = (distance_to_kink(case, model, drawn) > KINK).nonzero().flatten()[:T]
        if len(kept) < T:
            raise RuntimeError(
                f"{case.name}: only {len(kept)} of {drawn.tasks} drawn tasks stay off the kinks"
            )
        drawn = drawn.pick(kept)
    return Problem(case, model, drawn.to(device, torch.float32))


def distance_to_kink(case: Case, model: nn.Sequential, episodes: Episodes) -> Tensor:
    """How near each task's meta-step comes to a ReLU's kink: min |z| / max |z| of a layer, the
    least over all. [T] Other kinks, such as those of pools, are not looked at.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).double()
    parameters = {name: value.detach() for name, value in adapting(model).items()}
    loss = LOSSES[case.network.loss]

    def forward(theta: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        distances = []
        for name, layer in model.named_children():
            if isinstance(layer, nn.ReLU):
                distances.append(x.abs().amin() / x.abs().amax())
            own = {inner: theta[f"{name}.{inner}"] for inner in adapting(layer)}
            x = functional_call(layer, own, (x,))
        return x, torch.stack(distances).amin()

    def support_loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction, distance = forward(theta, x)
        return loss(prediction, y), distance

    def nearest(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        theta, distances = parameters, []
        for _ in range(case.S):
            step, distance = grad(support_loss, has_aux=True)(theta, support_x, support_y)
            theta = {
                name: value - case.network.inner_lr * step[name] for name, value in theta.items()
            }
            distances.append(distance)
        return torch.stack([*distances, forward(theta, query_x)[1]]).amin()

    doubled = episodes.to(device, torch.float64)
    chunk = tasks_at_once(case, device)
    return vmap(nearest, chunk_size=chunk)(
        doubled.support_x, doubled.support_y, doubled.query_x
    ).cpu()


def tasks_at_once(case: Case, device: torch.device) -> int:
    """Tasks of which 64 MiB of float64 parameters and layers' results can be held, or 256 MiB on a
    GPU.
    """
    network = case.network
    numbers = max(network.parameters, (case.N + case.M) * network.units)
    return max(1, 2 ** (25 if device.type == "cuda" else 23) // numbers)


def adapting(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that adapt and have a gradient, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
