"""The sinusoid regression tasks of Finn et al. 2017, section 5.1.

A task is a curve y = A sin(x - p): amplitude A from U[0.1, 5], phase p from U[0, pi], and points
x from U[-5, 5]. (The paper leaves the sign of the phase open; minus is its code's choice.)

Dimensions: T tasks, N support rows per task, M query rows per task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_fast.tasks.episodes import EVERY, Episodes, TaskStream, whole


@dataclass(frozen=True)
class Waves:
    """The curves behind a batch of tasks."""

    amplitude: Tensor  # [T, 1, 1]
    phase: Tensor  # [T, 1, 1], radians

    def __call__(self, x: Tensor) -> Tensor:
        """The curves' values at x [T, N, 1]: A sin(x - p), [T, N, 1]."""
        return self.amplitude * torch.sin(x - self.phase)


class SinusoidTasks(TaskStream):
    """A seeded stream of sinusoid tasks; the same seed and calls give the same bits.

    Args:
        seed: of a generator of this object's own, on `device`; torch's global one is not touched.
        device: where the tasks are drawn and stay.
        dtype: a floating type.
        amplitude, phase, x_range: (low, high) of the uniform distributions; phase in radians.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is wanted.
    """

    def __init__(
        self,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        super().__init__(seed, device, dtype)
        self.amplitude = _interval("amplitude", amplitude)
        self.phase = _interval("phase", phase)
        self.x_range = _interval("x_range", x_range)

    def sample(
        self, tasks: int = 25, shots: int = 10, query_shots: int = 10, own: slice = EVERY
    ) -> Episodes:
        """`tasks` new tasks with `shots` support rows and `query_shots` query rows each; of them
        those of the slice `own` alone, while the stream moves on by all."""
        waves = self.waves(tasks)
        return self.episodes(waves, shots, query_shots, own)

    def waves(self, tasks: int) -> Waves:
        """`tasks` new curves, for a caller that also wants their amplitudes and phases."""
        whole("tasks", tasks, least=1)
        return Waves(
            amplitude=self._uniform(self.amplitude, tasks, 1),
            phase=self._uniform(self.phase, tasks, 1),
        )

    def episodes(
        self, waves: Waves, shots: int = 10, query_shots: int = 10, own: slice = EVERY
    ) -> Episodes:
        """New support and query points on the given curves, `own` as in `sample`."""
        tasks = len(waves.amplitude)
        support_x = self._uniform(self.x_range, tasks, whole("shots", shots, least=1))
        query_x = self._uniform(self.x_range, tasks, whole("query_shots", query_shots, least=1))
        if own != EVERY:
            waves = Waves(waves.amplitude[own], waves.phase[own])
            support_x, query_x = support_x[own], query_x[own]
        return Episodes(support_x, waves(support_x), query_x, waves(query_x))

    def _uniform(self, interval: tuple[float, float], tasks: int, rows: int) -> Tensor:
        empty = torch.empty(tasks, rows, 1, dtype=self.dtype, device=self.device)
        return empty.uniform_(*interval, generator=self.generator)


def _interval(name: str, interval: tuple[float, float]) -> tuple[float, float]:
    wanted = "wanted are two finite numbers, the lower one first"
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {interval!r}; {wanted}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} is {interval!r}; {wanted}")
    return low, high
