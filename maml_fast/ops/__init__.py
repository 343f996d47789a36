"""The operations that the planned backends know; adding one adds its file and a line here."""

from maml_fast.ops.base import Features, Operation, Stage, Weighted
from maml_fast.ops.conv import Conv2d
from maml_fast.ops.linear import Linear
from maml_fast.ops.norm import BatchNorm, GroupNorm, LayerNorm, Norm
from maml_fast.ops.pointwise import (
    GELU,
    LeakyReLU,
    ReLU,
    Scale,
    Sigmoid,
    SiLU,
    Sine,
    Softplus,
    Tanh,
)
from maml_fast.ops.pool import AveragePool, GlobalMean, MaxPool
from maml_fast.ops.reshape import Flatten, MergeRows, Reshape, SplitRows, Squeeze

OPERATIONS: list[type[Operation]] = [
    ReLU,
    LeakyReLU,
    Tanh,
    Sigmoid,
    SiLU,
    GELU,
    Softplus,
    Sine,
    Scale,
    Reshape,
    Flatten,
    Squeeze,
    MaxPool,
    AveragePool,
    GlobalMean,
]
WEIGHTED: list[type[Weighted]] = [Linear, Conv2d, BatchNorm, GroupNorm, LayerNorm]

__all__ = [
    "OPERATIONS",
    "WEIGHTED",
    "AveragePool",
    "BatchNorm",
    "Conv2d",
    "Features",
    "Flatten",
    "GlobalMean",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "MergeRows",
    "Norm",
    "Operation",
    "Reshape",
    "SplitRows",
    "Stage",
    "Weighted",
]
