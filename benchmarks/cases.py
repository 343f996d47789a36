"""The cases that are measured: networks, sizes, and the arithmetic each asks for.

Dimensions: T tasks, N support rows a task, M query rows a task, S inner steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.networks import (
    CONV4,
    CONV4_MINI,
    CONV4_STRIDED,
    OMNIGLOT_FC,
    OMNIGLOT_FC_NORM,
    POLICY,
    SINUSOID,
    WIDE,
    Network,
)


@dataclass(frozen=True)
class Case:
    """A network with the sizes of a meta-batch.

    Attributes:
        only: implementations to measure, by name; empty for all.
        gpu_only: too large to be worth anyone's time on a CPU.
        quick: part of the quick run.
        early: measured first where time is short.
    """

    network: Network
    T: int
    S: int
    N: int
    M: int
    only: tuple[str, ...] = ()
    gpu_only: bool = False
    quick: bool = False
    early: bool = False

    @property
    def name(self) -> str:
        return f"{self.network.name}-T{self.T}-S{self.S}"

    @property
    def title(self) -> str:
        network = self.network
        return (
            f"{self.name}: {network.title}, "
            f"{network.loss}, T={self.T} S={self.S} N={self.N} M={self.M} rate {network.inner_lr}"
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the meta-gradient with dense fast weights.

        A task takes S(3F_s - F1_s) + (3F_q - F1_q) + S(6F_s - 4F1_s), with F the operations of a
        forward pass, F1 those of its first layer, s the support rows and q the query rows.
        Implementations that need fewer are rated by the same number.
        """
        support, query = self.network.forward_flops(self.N), self.network.forward_flops(self.M)
        adapt = 3 * sum(support) - support[0]
        outer = 3 * sum(query) - query[0]
        tangent = 6 * sum(support) - 4 * support[0]
        return self.T * (self.S * adapt + outer + self.S * tangent)


# Twenty inner steps, where autograd keeps a graph of each, `functional` a copy of the parameters.
# Which is smaller depends on what a graph holds: with ten rows at 1-40-40-1 mostly parameters
# (1,761 of them, against 80 units x 10 rows), with two hundred rows (a policy's trajectory) mostly
# activations, as in convolutional networks. Both are shown, with so many tasks that the smaller
# peak stands far above what a process allocates by the way.
LONG = ("functional", "vmap")
LONG_FEW_ROWS = Case(SINUSOID, T=512, S=20, N=10, M=10, only=LONG)
LONG_MANY_ROWS = Case(POLICY, T=32, S=20, N=200, M=200, only=LONG)
# Five inner steps of a convolutional network, where a graph of each is mostly activations.
CONV4_FIVE_STEPS = Case(CONV4, T=8, S=5, N=5, M=15)

CASES: tuple[Case, ...] = (
    Case(SINUSOID, T=25, S=1, N=10, M=10, quick=True, early=True),
    Case(SINUSOID, T=1_000, S=1, N=10, M=10),
    Case(SINUSOID, T=10_000, S=1, N=10, M=10),
    Case(SINUSOID, T=100_000, S=1, N=10, M=10, gpu_only=True),
    Case(SINUSOID, T=25, S=5, N=10, M=10),
    Case(SINUSOID, T=1_000, S=5, N=10, M=10, quick=True, early=True),
    Case(SINUSOID, T=10_000, S=5, N=10, M=10),
    Case(SINUSOID, T=100_000, S=5, N=10, M=10, gpu_only=True, early=True),
    Case(OMNIGLOT_FC, T=32, S=1, N=5, M=5, quick=True),
    Case(OMNIGLOT_FC, T=512, S=1, N=5, M=5),
    Case(OMNIGLOT_FC, T=128, S=5, N=5, M=15),
    Case(OMNIGLOT_FC, T=1_024, S=5, N=5, M=5, gpu_only=True, early=True),
    Case(OMNIGLOT_FC, T=4_096, S=1, N=5, M=5, gpu_only=True, early=True),
    Case(WIDE, T=16, S=3, N=1_024, M=1_024),
    Case(WIDE, T=64, S=3, N=1_024, M=1_024, gpu_only=True, early=True),
    Case(POLICY, T=40, S=1, N=20, M=20, quick=True),
    Case(OMNIGLOT_FC_NORM, T=512, S=1, N=5, M=5),
    Case(CONV4, T=32, S=1, N=5, M=5),
    CONV4_FIVE_STEPS,
    Case(CONV4, T=32, S=5, N=5, M=5, gpu_only=True, early=True),
    Case(CONV4, T=1_024, S=5, N=5, M=5, gpu_only=True, early=True),
    Case(CONV4_STRIDED, T=32, S=1, N=5, M=5),
    Case(CONV4_MINI, T=4, S=5, N=5, M=75),
    LONG_FEW_ROWS,
    LONG_MANY_ROWS,
)


def choose(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns ("sinusoid*"), or all of them when there is no
    pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} matches none of {', '.join(names)}")
    return [
        name
        for name in names
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
