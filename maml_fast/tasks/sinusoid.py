"""The sinusoid regression tasks of Finn et al. 2017, section 5.1.

A task is a curve y = A sin(x - p): amplitude A from U[0.1, 5], phase p from U[0, pi], and points
x from U[-5, 5]. (The paper leaves the sign of the phase open; minus is its code's choice.)

Dimensions: T tasks, N support rows per task, M query rows per task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Episodes(NamedTuple):
    """A batch of tasks in the order that `MAML` takes: `maml(*episodes)`."""

    support_x: Tensor  # [T, N, 1]
    support_y: Tensor  # [T, N, 1]
    query_x: Tensor  # [T, M, 1]
    query_y: Tensor  # [T, M, 1]


@dataclass(frozen=True)
class Waves:
    """The curves behind a batch of tasks."""

    amplitude: Tensor  # [T, 1, 1]
    phase: Tensor  # [T, 1, 1], radians

    def __call__(self, x: Tensor) -> Tensor:
        """The curves' values at x [T, N, 1]: A sin(x - p), [T, N, 1]."""
        return self.amplitude * torch.sin(x - self.phase)


class SinusoidTasks:
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
        if not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; wanted is a floating type")
        self.device = torch.device(device)
        self.dtype = dtype
        self.amplitude = _interval("amplitude", amplitude)
        self.phase = _interval("phase", phase)
        self.x_range = _interval("x_range", x_range)
        self._generator = torch.Generator(self.device)
        if _whole("seed", seed, least=0) >= 2**63:
            raise ValueError(f"seed is {seed}; wanted is a whole number below 2^63")
        self._generator.manual_seed(seed)

    def sample(self, tasks: int = 25, shots: int = 10, query_shots: int = 10) -> Episodes:
        """`tasks` new tasks with `shots` support rows and `query_shots` query rows each."""
        waves = self.waves(tasks)
        return self.episodes(waves, shots, query_shots)

    def waves(self, tasks: int) -> Waves:
        """`tasks` new curves, for a caller that also wants their amplitudes and phases."""
        _whole("tasks", tasks, least=1)
        return Waves(
            amplitude=self._uniform(self.amplitude, tasks, 1),
            phase=self._uniform(self.phase, tasks, 1),
        )

    def episodes(self, waves: Waves, shots: int = 10, query_shots: int = 10) -> Episodes:
        """New support and query points on the given curves."""
        tasks = len(waves.amplitude)
        support_x = self._uniform(self.x_range, tasks, _whole("shots", shots, least=1))
        query_x = self._uniform(self.x_range, tasks, _whole("query_shots", query_shots, least=1))
        return Episodes(support_x, waves(support_x), query_x, waves(query_x))

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state: after `load_state_dict` the stream goes on from here."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue another stream; it must have been drawn on the same kind of device."""
        if set(state) != {"generator"}:
            raise ValueError(f"state has the keys {sorted(state)}; wanted is ['generator']")
        found, own = state["generator"], self._generator.get_state()
        if found.dtype != own.dtype or found.shape != own.shape:
            raise ValueError(
                f"state['generator'] is {found.dtype} {list(found.shape)}; wanted is {own.dtype} "
                f"{list(own.shape)}, the state of a generator on {self.device.type}"
            )
        self._generator.set_state(found)

    def _uniform(self, interval: tuple[float, float], tasks: int, rows: int) -> Tensor:
        empty = torch.empty(tasks, rows, 1, dtype=self.dtype, device=self.device)
        return empty.uniform_(*interval, generator=self._generator)


def _interval(name: str, interval: tuple[float, float]) -> tuple[float, float]:
    wanted = "wanted are two finite numbers, the lower one first"
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {interval!r}; {wanted}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} is {interval!r}; {wanted}")
    return low, high


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; wanted is a whole number of at least {least}")
    return value
