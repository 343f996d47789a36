"""Linear layers: z = x W^T + b, by nn.Linear or F.linear."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_fast.ops.base import Features, NameOf, Weighted


@dataclass(frozen=True)
class Linear(Weighted):
    """A linear layer of a plan."""

    weight: str
    bias: str | None
    in_features: int
    out_features_: int

    def out_features(self, features: Features) -> Features:
        if not features or features[-1] != self.in_features:
            raise ValueError(
                f"rows have shape {list(features)}, wanted is [.., {self.in_features}]"
            )
        return (*features[:-1], self.out_features_)

    @property
    def shapes(self) -> tuple[Features, Features]:
        return (self.out_features_, self.in_features), (self.out_features_,)

    @classmethod
    def examples(cls) -> Iterable[tuple[Weighted, Features]]:
        yield cls("weight", "bias", 4, 3), (4,)
        yield cls("weight", None, 1, 2), (1,)

    def oracle(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return F.linear(x, weight, bias)

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features_}"


def _call(name_of: NameOf, input: Any, weight: Any, bias: Any = None) -> Linear:
    name = name_of(weight)
    if name is None:
        raise ValueError("its weight is not one of the model's parameters")
    out_features, in_features = weight.shape
    return Linear(name, name_of(bias), in_features, out_features)


Linear.modules = {
    nn.Linear: lambda module, name_of: _call(name_of, None, module.weight, module.bias)
}
Linear.calls = dict.fromkeys((F.linear, torch._C._nn.linear), _call)
