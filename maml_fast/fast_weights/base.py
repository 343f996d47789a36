"""A layer whose parameters adapt: the life of its fast weights and of their adjoint.

T tasks, S inner steps. `weight` and `bias` are those of a linear layer or a convolution, and gamma
and beta of a normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_fast.inner import SGD
from maml_fast.ops.base import Stage, Weighted

Pair = tuple[Tensor | None, Tensor | None]  # of weight and bias; None of none, or of what stays


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a meta-step. Rates are None for what does not adapt."""

    op: Weighted
    weight: Tensor | None
    bias: Tensor | None
    weight_rates: Sequence[float] | Tensor | None  # [S], or [S, *shape]
    bias_rates: Sequence[float] | Tensor | None
    learns_rates: bool  # whether gradients of the rates are wanted
    tasks: int
    inner_steps: int
    rule: SGD = field(default_factory=SGD)  # without clipping

    @property
    def plain(self) -> bool:
        """Whether a step is theta - eta g, with a number eta."""
        rates = self.weight_rates, self.bias_rates
        return self.rule.plain and not any(isinstance(r, Tensor) for r in rates)

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


class Still(Stage):
    """A layer whose parameters stay, the same for every task, and may get a gradient."""

    def gradients(self, saved: Any, dy: Tensor) -> Pair:
        """By weight and bias, of their shapes, summed over tasks; None of none."""
        raise NotImplementedError

    def t_gradients(self, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        """The tangents of `gradients`."""
        raise NotImplementedError


class FastLayer(Stage):
    """A layer that adapts: the four rules, and the life of its weights and of their adjoint."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        zeros = (0.0,) * spec.inner_steps
        # [S] numbers, or [S, *shape] of a rule that is not plain
        self.weight_rates: Any = spec.weight_rates if spec.weight_rates is not None else zeros
        self.bias_rates: Any = spec.bias_rates if spec.bias_rates is not None else zeros
        # Of weight and bias; these inner products cancel, so they are summed in float64.
        self.rate_gradients = [self._no_rate_gradient(r) for r in self._both_rates()]

    def _both_rates(self) -> tuple[Any, Any]:
        return self.weight_rates, self.bias_rates

    def _no_rate_gradient(self, rates: Sequence[float] | Tensor) -> Tensor:
        """[S], or [S, *shape]"""
        shape = rates.shape if isinstance(rates, Tensor) else (self.spec.inner_steps,)
        return self.spec.like.new_zeros(shape, dtype=torch.float64)

    # What `forward` saved comes with the cotangent of the output: of a linear layer, its input x.

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        """Take inner step `step`: W_{k+1} = W_k - eta_k g_k; of a linear layer g_k = D^T A."""
        raise NotImplementedError

    def add_query(self, step: int, saved: Any, dy: Tensor) -> None:
        """Lam gains the gradient of a query loss at the weights before inner step `step`."""
        raise NotImplementedError

    def begin_adjoint(self, saved: Any, dy: Tensor) -> None:
        """Lam is the gradient of the query loss at the adapted weights."""
        self.add_query(self.spec.inner_steps, saved, dy)

    def turn(self, step: int) -> None:
        """Inner step `step` comes next on the way back: choose the direction of its tangents."""

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        """Lam = Lam - H_k v, from the tangents that step k's tangent pass found along v; of a plain
        rule v is eta_k Lam."""
        raise NotImplementedError

    def gradient_sums(self) -> Pair:
        """The adjoint of weight and bias, of their shapes, summed over tasks; None of none."""
        raise NotImplementedError

    def weights(self, step: int) -> Pair:
        """Weight [T, *shape] and bias [T, *shape] before inner step `step`, formed."""
        raise NotImplementedError

    def add_rate_gradients(self, step: int, saved: Any, dy: Tensor) -> None:
        """dloss/deta_k = -<g_k, Lam>, for weight and bias, summed over tasks; before `turn`."""
        raise NotImplementedError


class DenseLayer(FastLayer):
    """Weight and bias [T, *shape] formed at every step but the first, which all tasks share."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.w: list[Tensor | None] = [spec.weight]  # [*shape], then [T, *shape]
        self.b: list[Tensor | None] = [spec.bias]
        self.moves = spec.weight_rates is not None, spec.bias_rates is not None
        self.lam: Pair = None, None
        self.along: Pair = None, None
        # Of a rule with momentum: m_k, the sum of what it gains on the way back, and the steps'
        # directions u_k, which the rates' gradients need.
        self.momentum: list[Tensor | None] = [None, None]
        self.lam_momentum: list[Tensor | None] = [None, None]
        self.taken: list[list[Tensor | None]] = []

    def gradients(self, saved: Any, dy: Tensor) -> Pair:
        """g_k of each task, [T, *shape], of weight and bias where they move."""
        raise NotImplementedError

    def t_gradients(self, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor) -> Pair:
        """The tangents of `gradients`; called right after the step's `tangent`."""
        raise NotImplementedError

    def direction(self, step: int) -> Pair:
        """v, along which tangents are taken; of a plain rule eta_k Lam."""
        return self.along

    def descend(self, step: int, saved: Any, dy: Tensor) -> None:
        taken: list[Tensor | None] = [None, None]
        found = self.gradients(saved, dy)
        for i, (kept, gradient) in enumerate(zip((self.w, self.b), found, strict=True)):
            now = kept[step]
            if now is not None and gradient is not None:
                taken[i] = self._taken(i, now, gradient)
                now = now - self._both_rates()[i][step] * taken[i]
            elif now is not None and not step:
                now = now.expand(self.spec.tasks, *now.shape)
            kept.append(now)
        if self.spec.learns_rates:
            self.taken.append(taken)

    def _taken(self, i: int, now: Tensor, gradient: Tensor) -> Tensor:
        """What is multiplied by the rate, of weight (0) or bias (1)."""
        rule = self.spec.rule
        if rule.weight_decay:
            gradient = gradient + rule.weight_decay * now
        if not rule.momentum:
            return gradient
        before = self.momentum[i]
        after = gradient if before is None else gradient + rule.momentum * before
        self.momentum[i] = after
        return gradient + rule.momentum * after if rule.nesterov else after

    def add_query(self, step: int, saved: Any, dy: Tensor) -> None:
        weight, bias = self.gradients(saved, dy)
        self.lam = added(self.lam[0], weight), added(self.lam[1], bias)

    def turn(self, step: int) -> None:
        found: list[Tensor | None] = [None, None]
        left = list(self.lam)
        rule = self.spec.rule
        for i, lam in enumerate(self.lam):
            if lam is None:
                continue
            along = lam * self._both_rates()[i][step]
            if rule.momentum:  # the transpose of `_taken`
                of_gradient = along if rule.nesterov else 0
                before = self.lam_momentum[i]
                gained = rule.momentum * along if rule.nesterov else along
                total = gained if before is None else before + gained
                self.lam_momentum[i] = rule.momentum * total
                along = total + of_gradient
            if rule.weight_decay:
                left[i] = lam - rule.weight_decay * along
            found[i] = along
        self.along, self.lam = (found[0], found[1]), (left[0], left[1])

    def pull_back(
        self, step: int, saved: Any, dy: Tensor, t_x: Tensor | None, t_dy: Tensor
    ) -> None:
        weight, bias = self.t_gradients(saved, dy, t_x, t_dy)
        self.lam = added(self.lam[0], weight, -1), added(self.lam[1], bias, -1)

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
        for i, (lam, taken) in enumerate(zip(self.lam, self.taken[step], strict=True)):
            if lam is not None and taken is not None:
                total = self.rate_gradients[i][step]
                total -= (taken * lam).double().sum_to_size(total.shape)


def added(a: Tensor | None, b: Tensor | None, sign: int = 1) -> Tensor | None:
    """a + sign b, of what there is."""
    if b is None:
        return a
    if a is None:
        return b if sign == 1 else -b
    return torch.add(a, b, alpha=sign)
