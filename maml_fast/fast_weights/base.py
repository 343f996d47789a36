"""A layer whose parameters adapt: the life of its fast weights and of their adjoint.

T tasks, S inner steps. `weight` and `bias` are those of a linear layer or a convolution, and gamma
and beta of a normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maml_fast.ops.base import Stage, Weighted

Pair = tuple[Tensor | None, Tensor | None]  # of weight and bias; None of none, or of what stays


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a meta-step. Rates are None for what does not adapt."""

    op: Weighted
    weight: Tensor | None
    bias: Tensor | None
    weight_rates: Sequence[float] | None  # [S]
    bias_rates: Sequence[float] | None  # [S]
    learns_rates: bool  # whether gradients of the rates are wanted
    tasks: int
    inner_steps: int

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""
        found = self.bias if self.weight is None else self.weight
        assert found is not None  # something adapts
        return found


@dataclass(frozen=True)
class LinearSpec(LayerSpec):
    """Of a linear layer: its weight is [O, I]."""

    weight: Tensor


class FastLayer(Stage):
    """A layer that adapts: the four rules, and the life of its weights and of their adjoint."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        zeros = (0.0,) * spec.inner_steps
        self.weight_rates = spec.weight_rates if spec.weight_rates is not None else zeros
        self.bias_rates = spec.bias_rates if spec.bias_rates is not None else zeros
        # Of weight and bias; these inner products cancel, so they are summed in float64.
        self.rate_gradients = spec.like.new_zeros(2, spec.inner_steps, dtype=torch.float64)

    # What `forward` saved comes with the cotangent of the output: of a linear layer, its input x.

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        """Take inner step `step`: W_{k+1} = W_k - eta_k g_k; of a linear layer g_k = D^T A."""
        raise NotImplementedError

    def begin_adjoint(self, saved: Any, dy: Tensor) -> None:
        """Lam is the gradient of the query loss at the adapted weights."""
        raise NotImplementedError

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        """Lam = Lam - H_k (eta_k Lam), from the tangents that step k's tangent pass found."""
        raise NotImplementedError

    def gradient_sums(self) -> Pair:
        """The adjoint of weight and bias, of their shapes, summed over tasks; None of none."""
        raise NotImplementedError

    def weights(self, step: int) -> Pair:
        """Weight [T, *shape] and bias [T, *shape] before inner step `step`, formed."""
        raise NotImplementedError

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        """dloss/deta_k = -<g_k, Lam>, for weight and bias, summed over tasks."""
        raise NotImplementedError


class DenseLayer(FastLayer):
    """Weight and bias [T, *shape] formed at every step but the first, which all tasks share."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.w: list[Tensor | None] = [spec.weight]  # [*shape], then [T, *shape]
        self.b: list[Tensor | None] = [spec.bias]
        self.moves = spec.weight_rates is not None, spec.bias_rates is not None
        self.lam: Pair = None, None

    def gradients(self, saved: Any, dy: Tensor) -> Pair:
        """g_k of each task, [T, *shape], of weight and bias where they move."""
        raise NotImplementedError

    def t_gradients(self, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        """The tangents of `gradients`; called right after the step's `tangent`."""
        raise NotImplementedError

    def direction(self, step: int) -> Pair:
        """eta_k Lam, along which tangents are taken."""
        w, b = self.lam
        return (
            None if w is None else w * self.weight_rates[step],
            None if b is None else b * self.bias_rates[step],
        )

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        rates = self.weight_rates[step], self.bias_rates[step]
        found = self.gradients(saved, dy)
        for kept, gradient, rate in zip((self.w, self.b), found, rates, strict=True):
            now = kept[step]
            if now is not None and gradient is not None:
                now = torch.sub(now, gradient, alpha=rate)
            elif now is not None and not step:
                now = now.expand(self.spec.tasks, *now.shape)
            kept.append(now)

    def begin_adjoint(self, saved: Any, dy: Tensor) -> None:
        self.lam = self.gradients(saved, dy)

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        for lam, tangent in zip(self.lam, self.t_gradients(saved, dy, t_x, t_dy), strict=True):
            if lam is not None and tangent is not None:
                lam -= tangent

    def gradient_sums(self) -> Pair:
        w, b = (None if lam is None else lam.sum(0) for lam in self.lam)
        return w, b

    def weights(self, step: int) -> Pair:
        def formed(kept: Tensor | None) -> Tensor | None:
            if kept is None or step:
                return kept
            return kept.expand(self.spec.tasks, *kept.shape)

        return formed(self.w[step]), formed(self.b[step])

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        for i, (lam, gradient) in enumerate(zip(self.lam, self.gradients(saved, dy), strict=True)):
            if lam is not None and gradient is not None:
                self.rate_gradients[i, step] -= (gradient * lam).sum(dtype=torch.float64)
