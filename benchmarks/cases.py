"""The cases that are measured: networks, sizes, and the arithmetic each asks for.

Dimensions: T tasks, N support rows a task, M query rows a task, S inner steps, I/O in/out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import episodes
from benchmarks.episodes import Draw

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
}


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron, the loss and inner rate it is adapted with, and where its tasks come
    from.

    Attributes:
        name: first part of the names of its cases.
        sizes: features from input to output.
        activation: between its linear layers, not after the last.
        loss: a key of `LOSSES`; maml_fast knows the same names.
        inner_lr: rate of every inner step.
        draw: draws tasks for it.
        off_kink: whether tasks with a ReLU within rounding of its kink are redrawn (see `problem`).
    """

    name: str
    sizes: tuple[int, ...]
    activation: type[nn.Module]
    loss: str
    inner_lr: float
    draw: Draw
    off_kink: bool = False

    def build(self) -> nn.Sequential:
        """The model with torch's own initialisation, the same each time."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for inputs, outputs in pairwise(self.sizes):
                layers += [nn.Linear(inputs, outputs), self.activation()]
        return nn.Sequential(*layers[:-1])

    @property
    def strict(self) -> bool:
        """Whether correct programs agree to rounding: no ReLU may switch differently in them."""
        return self.off_kink or self.activation is not nn.ReLU

    @property
    def parameters(self) -> int:
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(self.sizes))

    def forward_flops(self, rows: int) -> list[int]:
        """2 n I O of each linear layer."""
        return [2 * rows * inputs * outputs for inputs, outputs in pairwise(self.sizes)]


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
        sizes = "-".join(map(str, network.sizes))
        return (
            f"{self.name}: {sizes} {network.activation.__name__.lower()}, "
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


SINUSOID = Network(
    "sinusoid", (1, 40, 40, 1), nn.ReLU, "mse", 0.01, episodes.sinusoid, off_kink=True
)
OMNIGLOT_FC = Network(
    "omniglot-fc",
    (784, 256, 128, 64, 64, 5),
    nn.ReLU,
    "cross_entropy",
    0.4,
    episodes.characters,
    off_kink=True,
)
# A task passes 2048 rows through 768 units: none stays off every kink, so this one's check is
# looser.
WIDE = Network("wide", (2, 256, 256, 256, 3), nn.ReLU, "mse", 0.01, episodes.images)
POLICY = Network("policy", (20, 100, 100, 4), nn.Tanh, "mse", 0.01, episodes.imitation)

# Twenty inner steps, where autograd keeps a graph of each, `functional` a copy of the parameters.
# Which is smaller depends on what a graph holds: with ten rows at 1-40-40-1 mostly parameters
# (1,761 of them, against 80 units x 10 rows), with two hundred rows (a policy's trajectory) mostly
# activations, as in convolutional networks. Both are shown, with so many tasks that the smaller
# peak stands far above what a process allocates by the way.
LONG = ("functional", "vmap")
LONG_FEW_ROWS = Case(SINUSOID, T=512, S=20, N=10, M=10, only=LONG)
LONG_MANY_ROWS = Case(POLICY, T=32, S=20, N=200, M=200, only=LONG)

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
