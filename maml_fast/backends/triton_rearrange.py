"""Where rows lie in memory, and operations that torch does for the Triton layer kernels.

Images lie channels last between convolutions, norms and pools, [T, N, height, width, C], and as
torch has them, [T, N, C, height, width], for flattening and linear layers. A copy turns the one
into the other, where that is not the same. Average pools and means over positions are small and
rare: torch's own operations do them.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from maml_fast.backends.triton_blocks import Block, placed, summed
from maml_fast.kernels.attend import Terms
from maml_fast.ops import Features, Operation, Stage


def is_same(features: Features) -> bool:
    """Whether both orders are one in memory."""
    return len(features) < 2 or features[0] == 1 or math.prod(features[1:]) == 1


class ChannelsLast(Stage):
    """Of the data, once, in front of all: [T, N, C, *positions] -> [T, N, *positions, C]"""

    def forward(self, step: int, x: Tensor) -> tuple[Tensor, Any]:
        return x.movedim(2, -1), None


class TurnBlock(Block):
    """Turns rows of `features` channels last, or back into torch's order."""

    def __init__(self, features: Features, channels_last: bool, precision: str) -> None:
        channels, positions = features[0], math.prod(features[1:])
        self.width = channels * positions
        self.before = (channels, positions) if channels_last else (positions, channels)
        self.precision = precision

    def _turned(self, x: Tensor, before: tuple[int, int], to: Tensor | None = None) -> Tensor:
        """[T, N, C * P], of [*before] turned"""
        turned = x.view(len(x), -1, *before).mT
        out = placed(x, tuple(turned.shape), to).copy_(turned)
        return out.flatten(2)

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Any]:
        return self._turned(x, self.before, to), None

    def backward(self, step: int, saved: Any, dy: Terms, place: str, goes_on: bool) -> Terms | None:
        return Terms(self._turned(summed(dy, self.precision), self.before[::-1]))

    def tangent(self, step: int, saved: Any, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        assert t_x is not None  # the first block adapts
        return self._turned(t_x, self.before, to)

    def tangent_backward(self, step: int, saved: Any, t_dy: Terms, goes_on: bool) -> Terms | None:
        return self.backward(step, saved, t_dy, "", goes_on)


class TorchBlock(Block):
    """An operation of images by torch's own rules, on views of images that lie channels last."""

    def __init__(self, op: Operation, features: Features, precision: str) -> None:
        self.op, self.features, self.precision = op, features, precision
        self.width = features[0]
        self.after = op.out_features(features)

    def _viewed(self, x: Tensor, features: Features) -> Tensor:
        """[T, N, C, height, width], in any memory"""
        channels, *positions = features
        return x.view(len(x), -1, *positions, channels).movedim(-1, 2)

    def _placed(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """[T, N, height, width, C], in memory"""
        x = x.movedim(2, -1)
        return placed(x, tuple(x.shape), to).copy_(x).flatten(1, -2)

    def forward(self, step: int, x: Tensor, place: str, to: Tensor | None) -> tuple[Tensor, Any]:
        y, saved = self.op.forward(step, self._viewed(x, self.features))
        return self._placed(y, to), saved

    def backward(self, step: int, saved: Any, dy: Terms, place: str, goes_on: bool) -> Terms | None:
        back = self._viewed(summed(dy, self.precision), self.after)
        return Terms(self._placed(self.op.backward(step, saved, back)))

    def tangent(self, step: int, saved: Any, t_x: Tensor | None, to: Tensor | None) -> Tensor:
        assert t_x is not None  # the first block adapts
        view = self._viewed(t_x, self.features)
        t_y = self.op.tangent(step, saved, view, view)
        assert t_y is not None
        return self._placed(t_y, to)

    def tangent_backward(self, step: int, saved: Any, t_dy: Terms, goes_on: bool) -> Terms | None:
        # These operations are linear.
        return self.backward(step, saved, t_dy, "", goes_on)
