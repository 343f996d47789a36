"""Inner rules that are linear in gradients and parameters, spelled out.

    theta_k = a_k theta_0 - sum_{j<k} c_kj g_j
whatever rates, momentum, Nesterov's variant and weight decay are: so a factored layer's weights
stay sums of outer products. With Lam_k what the loss gains of theta_k directly, g_j's cotangent is
-sum_{k>j} c_kj Lam_k, and theta_0's is sum_k a_k Lam_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_fast.inner import SGD


@dataclass(frozen=True)
class Coefficients:
    """Of one parameter, S inner steps."""

    kept: Tensor  # a [S + 1]
    moved: Tensor  # c [S + 1, S]

    @classmethod
    def of(cls, rule: SGD, rates: Sequence[float], like: Tensor) -> Coefficients:
        """Of a rule without clipping, with one rate a step; in the dtype and place of `like`."""
        assert rule.linear
        steps = len(rates)
        theta = torch.zeros(steps + 1, dtype=torch.float64)  # a, then -c by gradient
        theta[0] = 1
        momentum, path = torch.zeros_like(theta), [theta]
        for step, rate in enumerate(rates):
            change = rule.weight_decay * theta
            change[step + 1] += 1
            momentum = rule.momentum * momentum + change
            along = change + rule.momentum * momentum if rule.nesterov else momentum
            theta = theta - rate * along
            path.append(theta)
        table = torch.stack(path).to(like)
        return cls(table[:, 0], -table[:, 1:])
