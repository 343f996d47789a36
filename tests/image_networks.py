"""Networks of images that the backends' tests share, and their data."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from maml_fast import models
from maml_fast.problem import TaskBatch
from tests.networks import Draw

Shape = tuple[int, int, int]
VANISHING = 1e-12
ROUNDING = 16 * sys.float_info.epsilon
CONDITION = 16  # times what one rounding of the inputs does to the loop


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 5, 1, stride=2, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


def _with(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    """Two convolutions with a norm behind each."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            norm(4),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            norm(6),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )

    return make


def _beta_only(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels, eps=1e-3, track_running_stats=False)
    norm.weight.requires_grad_(False)
    return norm


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "no norm": (_plain, (2, 7, 9)),
    "conv4": (lambda: models.omniglot_conv4(3, 5), (1, 28, 28)),
    "conv4, pooled": (
        lambda: models.omniglot_conv4(3, 4, pooling=True, image_size=17),
        (1, 17, 17),
    ),
    "fully connected": (lambda: models.omniglot_mlp(3, (9, 7), image_size=5), (1, 5, 5)),
    "batch norm": (_with(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), (1, 7, 8)),
    "batch norm of beta": (_with(_beta_only), (1, 7, 7)),
    "batch norm alone": (_with(lambda c: nn.BatchNorm2d(c, affine=False)), (1, 6, 7)),
    "group norm": (_with(lambda c: nn.GroupNorm(2, c)), (1, 7, 6)),
    "layer norm": (
        lambda: nn.Sequential(
            nn.LayerNorm((2, 4, 5)),
            nn.Conv2d(2, 4, 3),
            nn.LayerNorm((2, 3), bias=False),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24, 5, bias=False),
            nn.LayerNorm(5, elementwise_affine=False),
            nn.Tanh(),
            nn.Linear(5, 3),
        ),
        (2, 4, 5),
    ),
    "frozen below": (lambda: _frozen(_with(nn.BatchNorm2d)(), ("0.", "1.")), (1, 7, 7)),
    "frozen between": (lambda: _frozen(_with(nn.BatchNorm2d)(), ("1.weight", "4.")), (1, 7, 7)),
}


def _frozen(model: nn.Module, prefixes: tuple[str, ...]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return model


def random_network(seed: int, layers: int) -> tuple[nn.Module, Shape]:
    """Some of everything: `layers` convolutions, norms and pools where they fit, and a head. None
    has a bias that a norm takes away again."""
    rng = random.Random(seed)
    channels, height, width = shape = rng.choice((1, 2, 3)), rng.randint(4, 11), rng.randint(4, 11)
    found: list[nn.Module] = []
    for _ in range(layers):
        kernel, stride, padding = rng.choice((1, 3)), rng.choice((1, 1, 2)), rng.choice((0, 1))
        sizes = [(n + 2 * padding - kernel) // stride + 1 for n in (height, width)]
        if min(sizes) < 2:
            kernel, stride, padding = 3, 1, 1
            sizes = [height, width]
        outputs = rng.choice((2, 4, 6))
        inputs, channels, (height, width) = channels, outputs, sizes
        norms = [
            nn.BatchNorm2d(channels, affine=rng.random() < 0.7, track_running_stats=False),
            nn.GroupNorm(2, channels),
            nn.LayerNorm((channels, height, width)),
            nn.Identity(),
        ]
        norm = rng.choice(norms)
        removed = isinstance(norm, nn.BatchNorm2d) or (
            isinstance(norm, nn.GroupNorm) and norm.num_groups == channels
        )
        bias = not removed and rng.random() < 0.7
        found.append(nn.Conv2d(inputs, channels, kernel, stride, padding, bias=bias))
        found += [norm, rng.choice((nn.Tanh(), nn.SiLU(), nn.Softplus()))]
        if min(height, width) >= 4 and rng.random() < 0.6:
            found.append(rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2))))
            height, width = height // 2, width // 2
    if rng.random() < 0.5:
        found.append(nn.AdaptiveAvgPool2d(1))
        height = width = 1
    return nn.Sequential(*found, nn.Flatten(), nn.Linear(channels * height * width, 3)), shape


def image_batch(
    draw: Draw, tasks: int, rows: int, queries: int, shape: Shape, classes: int
) -> TaskBatch:
    return TaskBatch(
        draw.normal(tasks, rows, *shape),
        draw.classes(tasks, rows, classes=classes),
        draw.normal(tasks, queries, *shape),
        draw.classes(tasks, queries, classes=classes),
    )


def nudged(draw: Draw, model: nn.Module, batch: TaskBatch) -> tuple[nn.Module, TaskBatch]:
    """A copy of both with every number moved by at most one rounding.

    What that does to a gradient, no float64 engine can be asked to beat.
    """

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x * (1 + torch.finfo(x.dtype).eps * draw.normal(*x.shape).sign().to(x.dtype))

    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(nudge(p))
    return model, batch.map(nudge)


def assert_near(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    bound: float,
    when_nudged: Mapping[str, Tensor] | None = None,
) -> None:
    """Every tensor of `wanted`, by name: ||found - wanted|| <= bound * ||wanted||, and a few
    roundings of the largest more: saturated layers make small gradients of differences that cancel,
    in the loop as well. With the loop's answer to `nudged`, a few times what that changed it more.

    A bias that a norm takes away again has a gradient of 0, of which both have rounding only: one
    below 1e-12 of the largest may differ by as much.
    """
    assert set(found) == set(wanted)
    largest = max(tensor.norm().item() for tensor in wanted.values())
    assert largest > 0
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        error = (found[name] - tensor).norm().item()
        vanishes = tensor.norm().item() <= VANISHING * largest
        allowed = (
            VANISHING * largest if vanishes else bound * tensor.norm().item() + ROUNDING * largest
        )
        if when_nudged is not None:
            allowed += CONDITION * (when_nudged[name] - tensor).norm().item()
        assert error <= allowed, (name, error, tensor.norm().item(), largest)
