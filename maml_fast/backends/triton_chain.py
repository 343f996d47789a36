"""From a plan's layers to the blocks that the Triton layer kernels run.

Activations join the linear layer or norm before them, a max pool the norm and its activations; what
joins nothing is a block of its own. Where one layer wants rows in another order than the last left
them, a block turns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from maml_fast.backends.triton_blocks import Block, LinearBlock
from maml_fast.backends.triton_conv import ConvBlock
from maml_fast.backends.triton_forms import Form
from maml_fast.backends.triton_norm import NormBlock, NormLayer, Seen
from maml_fast.backends.triton_rearrange import TorchBlock, TurnBlock, is_same
from maml_fast.fast_weights import LayerSpec
from maml_fast.layers import LayerPlan
from maml_fast.ops import (
    AveragePool,
    Conv2d,
    Features,
    GlobalMean,
    LayerNorm,
    Linear,
    MaxPool,
    Norm,
    Operation,
    Weighted,
)
from maml_fast.ops.reshape import Rearrange


class Chain:
    """Collects blocks in order.

    spec_of: a layer's parameters in the meta-step. form_of: of a linear layer, its form; told
    whether it is the first block.
    """

    def __init__(
        self,
        spec_of: Callable[[Weighted], LayerSpec],
        form_of: Callable[[LayerPlan, bool], Form],
        precision: str,
        second_order: bool,
    ) -> None:
        self.spec_of, self.form_of = spec_of, form_of
        self.precision, self.second_order = precision, second_order
        self.blocks: list[Block] = []
        self.channels_last = False  # how the rows lie that come next
        self.takes_channels_last = False  # the first block's

    def of(self, layers: Sequence[LayerPlan]) -> list[Block]:
        """The blocks of layers, of which the first adapts."""
        features: Features = ()
        for layer in layers:
            self._add(layer)
            features = layer.link.op.out_features(layer.features)
        if self.blocks:
            self._turn(features, channels_last=False)
        return self.blocks

    def _turn(self, features: Features, channels_last: bool) -> None:
        """See to it that the rows lie so."""
        if len(features) < 2:
            self.channels_last = False
        elif self.channels_last != channels_last:
            self.channels_last = channels_last
            if not self.blocks:
                self.takes_channels_last = channels_last
            elif not is_same(features):
                self.blocks.append(TurnBlock(features, channels_last, self.precision))

    def _add(self, layer: LayerPlan) -> None:
        op, features, blocks = layer.link.op, layer.features, self.blocks
        if isinstance(op, Linear):
            self._turn(features, channels_last=False)
            form = self.form_of(layer, not blocks)
            blocks.append(LinearBlock(op, form, (), self.precision, self.second_order))
        elif isinstance(op, Rearrange):
            self._turn(features, channels_last=False)
        elif isinstance(op, Conv2d):
            self._turn(features, channels_last=True)
            blocks.append(ConvBlock(self.spec_of(op), features, self.precision))
        elif isinstance(op, Norm):
            self._add_norm(op, features)
        elif isinstance(op, (AveragePool, GlobalMean)):
            self._turn(features, channels_last=True)
            blocks.append(TorchBlock(op, features, self.precision))
        elif isinstance(op, MaxPool):
            self._turn(features, channels_last=True)
            self._add_pool(features)
        else:
            assert isinstance(op, Operation)
            assert op.native is not None  # the plan refuses others
            name, constants = op.native
            self._add_activation((name, *constants), features)

    def _add_norm(self, op: Norm, features: Features) -> None:
        whole = isinstance(op, LayerNorm) and op.shape == features
        if not whole:  # of a whole row, the order is that of gamma and beta
            self._turn(features, channels_last=not isinstance(op, LayerNorm))
        weights = None
        if op.parameters:
            turned = whole and self.channels_last
            positions = math.prod(features[1:]) if turned else 1
            weights = NormLayer(self.spec_of(op), positions)
        seen = Seen.by(op, features, self.channels_last)
        block = NormBlock(seen, self.precision, op, weights)
        last = self.blocks[-1] if self.blocks else None
        # Flattened, a convolution's one channel may be many of the norm's.
        if (
            seen.norm == "batch"
            and isinstance(last, ConvBlock)
            and last.op.out_channels == seen.channels
        ):
            last.follower = block
        self.blocks.append(block)

    def _add_pool(self, features: Features) -> None:
        seen, last = Seen.by(None, features, True), self.blocks[-1]
        if isinstance(last, NormBlock) and last.takes_pool(seen):
            self._replace(last, last.followed_by(pool=True))
        else:
            self.blocks.append(NormBlock(seen, self.precision, pool=True))

    def _add_activation(self, op: tuple[Any, ...], features: Features) -> None:
        last = self.blocks[-1]
        if isinstance(last, LinearBlock):
            ops = (*last.ops, op)
            self.blocks[-1] = LinearBlock(
                last.op, last.form, ops, self.precision, self.second_order
            )
        elif isinstance(last, NormBlock) and not last.pool:
            self._replace(last, last.followed_by((op,)))
        else:
            seen = Seen.by(None, features, self.channels_last)
            self.blocks.append(NormBlock(seen, self.precision, ops=(op,)))

    def _replace(self, last: NormBlock, block: NormBlock) -> None:
        self.blocks[-1] = block
        before = self.blocks[-2] if len(self.blocks) > 1 else None
        if isinstance(before, ConvBlock) and before.follower is last:
            before.follower = block
