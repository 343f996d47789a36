"""The fast weights of a layer through a meta-step, one file a kind of layer and form."""

from collections.abc import Callable
from typing import Any

from maml_fast.fast_weights.base import (
    DenseLayer,
    FastLayer,
    LayerSpec,
    LinearSpec,
    Pair,
    Still,
)
from maml_fast.fast_weights.conv import DenseConv, SharedConv
from maml_fast.fast_weights.factored import FactoredInput, FactoredLinear
from maml_fast.fast_weights.linear import DenseLinear, RuledLinear, SharedLinear
from maml_fast.fast_weights.norm import FastNorm, SharedNorm
from maml_fast.fast_weights.still import StepwiseLayer, StillLayer
from maml_fast.ops import BatchNorm, Conv2d, GroupNorm, LayerNorm, Linear
from maml_fast.ops.base import Weighted

# What stands for an operation whose parameters stay, and for one whose fast weights are dense
STAGES: dict[type[Weighted], tuple[Callable[[Any], Still], Callable[[Any], FastLayer]]] = {
    Linear: (SharedLinear, DenseLinear),
    Conv2d: (SharedConv, DenseConv),
    BatchNorm: (SharedNorm, FastNorm),
    GroupNorm: (SharedNorm, FastNorm),
    LayerNorm: (SharedNorm, FastNorm),
}


def shared_stage(spec: LayerSpec) -> Still:
    """A layer that does not adapt."""
    return STAGES[type(spec.op)][0](spec)


def dense_stage(spec: LayerSpec) -> FastLayer:
    """A layer that adapts, with weights formed for each task."""
    if isinstance(spec, LinearSpec) and not spec.plain:
        return RuledLinear(spec)
    return STAGES[type(spec.op)][1](spec)


__all__ = [
    "DenseConv",
    "DenseLayer",
    "DenseLinear",
    "FactoredInput",
    "FactoredLinear",
    "FastLayer",
    "FastNorm",
    "LayerSpec",
    "LinearSpec",
    "Pair",
    "RuledLinear",
    "SharedConv",
    "SharedLinear",
    "SharedNorm",
    "StepwiseLayer",
    "Still",
    "StillLayer",
    "dense_stage",
    "shared_stage",
]
