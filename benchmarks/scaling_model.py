"""What a step of training costs on paper, by the number of processes that share its tasks.

    t(R) = crowd (draw + fixed + task T/R + rest) + allreduce(R)
    allreduce(R) = 2 (R - 1) latency + 2 (R - 1)/R 4 P / bandwidth,   0 for R = 1

Every process draws the numbers of all T tasks, computes its share of the tasks, and updates all P
parameters (of 4 bytes); the gradients go round in a ring, in R - 1 steps of adding and as many of
handing on. Where there are more processes than cores they take turns: crowd is R / cores, or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BYTES = 4  # of a number


@dataclass(frozen=True)
class Network:
    """latency: seconds a message; bandwidth: bytes a second."""

    latency: float
    bandwidth: float

    def allreduce(self, ranks: int, parameters: int) -> float:
        """Seconds until each of the ranks has the sum of so many numbers."""
        moved = 2 * (ranks - 1) / ranks * parameters * BYTES
        return 2 * (ranks - 1) * self.latency + moved / self.bandwidth

    @classmethod
    def fitted(cls, times: Sequence[tuple[int, float]], ranks: int) -> Network:
        """From (numbers, seconds) of collectives: the fewest numbers give the latency, the most
        the bandwidth."""
        few, least = min(times)
        many, most = max(times)
        latency = least / (2 * (ranks - 1))
        moved = 2 * (ranks - 1) / ranks * (many - few) * BYTES
        return cls(latency, moved / max(most - least, 1e-9))


@dataclass(frozen=True)
class Step:
    """A step of one process, in seconds, and its sizes.

    draw: the numbers of all tasks; fixed, task: of a share of n tasks, fixed + n task; rest: the
    update of the parameters, and what is left.
    """

    tasks: int
    parameters: int
    draw: float
    fixed: float
    task: float
    rest: float

    def seconds(self, ranks: int, network: Network, cores: int) -> float:
        """What the step takes with so many processes of one thread each."""
        share = math.ceil(self.tasks / ranks)
        own = self.draw + self.fixed + self.task * share + self.rest
        return max(1.0, ranks / cores) * own + network.allreduce(ranks, self.parameters)


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(at 0, slope) of the least-squares line through (n, seconds); at 0 it is 0 at least."""
    mean_n = sum(n for n, _ in points) / len(points)
    mean_t = sum(t for _, t in points) / len(points)
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    slope = sum((n - mean_n) * (t - mean_t) for n, t in points) / spread
    start = mean_t - slope * mean_n
    if start >= 0:
        return start, slope
    return 0.0, sum(n * t for n, t in points) / sum(n * n for n, _ in points)
