"""The networks that are measured, and what a forward pass of each takes.

Dimensions: I/O in/out features, C channels, H/W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import episodes
from benchmarks.episodes import Draw
from maml_fast import models

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
}
KINKED = (nn.ReLU, nn.MaxPool2d)
SWITCHED = 0.05  # what a few switches in a convolutional network change at most


@dataclass(frozen=True)
class Network:
    """A network, the loss and inner rate it is adapted with, and where its tasks come from.

    Attributes:
        name: first part of the names of its cases.
        title: what it is, for tables.
        make: makes the model; called with torch's generator seeded.
        row: shape of a row of its input: [I], or [C, H, W] of an image.
        loss: a key of `LOSSES`; maml_fast knows the same names.
        inner_lr: rate of every inner step.
        draw: draws tasks for it.
        off_kink: whether tasks with a ReLU within rounding of its kink are redrawn (see `problem`).
        loose: relative error that a correct program's gradient may have in float32: of peers, and
            of ours where kinks are not kept off.
    """

    name: str
    title: str
    make: Callable[[], nn.Sequential]
    row: tuple[int, ...]
    loss: str
    inner_lr: float
    draw: Draw
    off_kink: bool = False
    loose: float = 1e-3

    def build(self) -> nn.Sequential:
        """The model, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    @property
    def strict(self) -> bool:
        """Whether correct programs agree to rounding: nothing may switch differently in them."""
        return self.off_kink or not any(isinstance(layer, KINKED) for layer in self._on_paper)

    @cached_property
    def parameters(self) -> int:
        """How many adapt."""
        return sum(value.numel() for value in self._on_paper.parameters() if value.requires_grad)

    @cached_property
    def units(self) -> int:
        """Numbers that the linear layers and convolutions give for one row."""
        return sum(result for result, _ in self._products)

    def forward_flops(self, rows: int) -> list[int]:
        """2 n I O of each linear layer and 2 n H W k^2 C O of each k x k convolution to [O, H, W],
        n rows. Norms, activations and pools are not counted.
        """
        return [2 * rows * result * weights for result, weights in self._products]

    @cached_property
    def _on_paper(self) -> nn.Sequential:
        """The model with shapes but no numbers."""
        return self.build().to("meta")

    @cached_property
    def _products(self) -> list[tuple[int, int]]:
        """Of each layer that multiplies: the numbers it gives for one row, and how many weights
        each takes.
        """
        rows = 2  # batch norm refuses one
        x = torch.empty(rows, *self.row, device="meta")
        found = []
        for layer in self._on_paper:
            x = layer(x)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                found.append((x.numel() // rows, layer.weight[0].numel()))
        return found


def perceptron(
    name: str,
    sizes: tuple[int, ...],
    activation: type[nn.Module],
    loss: str,
    inner_lr: float,
    draw: Draw,
    *,
    off_kink: bool = False,
) -> Network:
    """Linear layers of these sizes with torch's own initialisation, an activation between them."""

    def make() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1])

    title = f"{'-'.join(map(str, sizes))} {activation.__name__.lower()}"
    return Network(name, title, make, sizes[:1], loss, inner_lr, draw, off_kink)


SINUSOID = perceptron(
    "sinusoid", (1, 40, 40, 1), nn.ReLU, "mse", 0.01, episodes.sinusoid, off_kink=True
)
OMNIGLOT_FC = perceptron(
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
WIDE = perceptron("wide", (2, 256, 256, 256, 3), nn.ReLU, "mse", 0.01, episodes.images)
POLICY = perceptron("policy", (20, 100, 100, 4), nn.Tanh, "mse", 0.01, episodes.imitation)

# The networks of the MAML paper: batch norm by the statistics of a task's own rows, of which beta
# alone is learned. A task of a convolutional one passes a million numbers through ReLU and pools,
# and none stays off every kink; where one switches that few others follow, as behind the last
# pools, autograd itself is wrong by 1e-2 in float32. So ours must be exact in float64 too. The rate
# is one at which they do learn as they are initialised.
OMNIGLOT_FC_NORM = Network(
    "omniglot-fc-norm",
    "784-256-128-64-64-5 batch norm relu",
    models.omniglot_mlp,
    (784,),
    "cross_entropy",
    0.4,
    episodes.characters,
    off_kink=True,
)
CONV4 = Network(
    "conv4",
    "four times conv 64, batch norm, relu, max pool; 1x28x28 to 5",
    lambda: models.omniglot_conv4(pooling=True),
    (1, 28, 28),
    "cross_entropy",
    0.1,
    episodes.pictures(1, 28),
    loose=SWITCHED,
)
CONV4_STRIDED = Network(
    "conv4-strided",
    "four times conv 64 by stride 2, batch norm, relu; mean; 1x28x28 to 5",
    models.omniglot_conv4,
    (1, 28, 28),
    "cross_entropy",
    0.1,
    episodes.pictures(1, 28),
    loose=SWITCHED,
)
CONV4_MINI = Network(
    "conv4-miniimagenet",
    "four times conv 32, batch norm, relu, max pool; 3x84x84 to 5",
    models.miniimagenet_conv4,
    (3, 84, 84),
    "cross_entropy",
    0.01,
    episodes.pictures(3, 84),
    loose=SWITCHED,
)
