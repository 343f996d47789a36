"""Tasks for the benchmarks, drawn on the CPU from an explicit generator.

Dimensions: T tasks, N support rows a task, M query rows a task, I/O in/out features, C channels,
H/W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


class Episodes(NamedTuple):
    """The four tensors of a meta-batch."""

    support_x: Tensor  # [T, N, I], or images [T, N, C, H, W]
    support_y: Tensor  # [T, N, O], or class numbers [T, N]
    query_x: Tensor  # [T, M, I], or images [T, M, C, H, W]
    query_y: Tensor  # [T, M, O], or class numbers [T, M]

    @property
    def tasks(self) -> int:
        return self.support_x.shape[0]

    def pick(self, tasks: slice | Tensor) -> Episodes:
        """Some of the tasks."""
        return Episodes(*(tensor[tasks].contiguous() for tensor in self))

    def to(self, device: torch.device, dtype: torch.dtype) -> Episodes:
        """The same tasks elsewhere; class numbers stay integers."""
        return Episodes(
            *(
                tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                for tensor in self
            )
        )


CLASSES = 5  # of each task that classifies
COARSE = 5  # random numbers along a side of a smooth picture
Draw = Callable[[Generator, int, int, int], Episodes]  # generator, T, N, M


def _split(x: Tensor, y: Tensor, support: int) -> Episodes:
    pieces = (x[:, :support], y[:, :support], x[:, support:], y[:, support:])
    return Episodes(*(piece.contiguous() for piece in pieces))


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def sinusoid(generator: Generator, T: int, N: int, M: int) -> Episodes:
    """Finn et al. 2017: y = amplitude sin(x - phase), amplitude [0.1, 5], phase [0, pi], x in [-5,
    5].
    """
    amplitude = _uniform(generator, 0.1, 5.0, T, 1, 1)
    phase = _uniform(generator, 0.0, math.pi, T, 1, 1)
    x = _uniform(generator, -5.0, 5.0, T, N + M, 1)  # [T, N + M, 1]
    return _split(x, amplitude * torch.sin(x - phase), N)


def characters(generator: Generator, T: int, N: int, M: int) -> Episodes:
    """Five classes a task in place of Omniglot's: sparse 28x28 strokes, each row with its own
    noise.
    """
    prototypes = (torch.rand(T, CLASSES, 784, generator=generator) < 0.1).float()
    y = torch.arange(N + M).remainder(CLASSES).expand(T, -1)  # [T, N + M]
    x = prototypes.gather(1, y[:, :, None].expand(-1, -1, 784))  # [T, N + M, 784]
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return _split(x, y, N)


def pictures(channels: int, size: int) -> Draw:
    """Draws five classes a task of square images: each class a smooth picture, each row with its
    own noise, so that no two pixels of a window that is pooled are equal.
    """

    def draw(generator: Generator, T: int, N: int, M: int) -> Episodes:
        coarse = torch.randn(T * CLASSES, channels, COARSE, COARSE, generator=generator)
        smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
        prototypes = smooth.unflatten(0, (T, CLASSES))  # [T, 5, C, H, W]
        y = torch.arange(N + M).remainder(CLASSES)  # [N + M]
        x = prototypes[:, y]  # [T, N + M, C, H, W]
        x = x + 0.5 * torch.randn(x.shape, generator=generator)
        return _split(x, y.expand(T, -1), N)

    return draw


def images(generator: Generator, T: int, N: int, M: int) -> Episodes:
    """Pixels of a smooth picture a task: coordinates in [-1, 1] to three colours in [-1, 1]."""
    frequency = 3.0 * torch.randn(T, 2, 3, generator=generator)
    phase = _uniform(generator, 0.0, 2 * math.pi, T, 1, 3)
    x = _uniform(generator, -1.0, 1.0, T, N + M, 2)  # [T, N + M, 2]
    return _split(x, torch.sin(x @ frequency + phase), N)


def imitation(generator: Generator, T: int, N: int, M: int) -> Episodes:
    """States of 20 numbers to the four actions of a task's own linear controller."""
    controller = torch.randn(T, 20, 4, generator=generator) / math.sqrt(20)
    x = torch.randn(T, N + M, 20, generator=generator)  # [T, N + M, 20]
    return _split(x, torch.tanh(x @ controller), N)
