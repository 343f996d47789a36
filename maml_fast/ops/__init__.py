"""The operations that the planned backends know; adding one adds its file and a line here."""

from maml_fast.ops.base import Features, Operation, Stage
from maml_fast.ops.linear import Linear
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
]

__all__ = [
    "OPERATIONS",
    "Features",
    "Flatten",
    "Linear",
    "MergeRows",
    "Operation",
    "Reshape",
    "SplitRows",
    "Stage",
]
