"""Linear layers: z = x W^T + b, by nn.Linear or F.linear.

The rules live in `maml_fast.fast_weights`, once for each form that a layer's weights take.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from maml_fast.ops.base import Features


@dataclass(frozen=True)
class Linear:
    """A linear layer of a plan. Names are those of `model.named_parameters()`."""

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

    @staticmethod
    def oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features_}"
