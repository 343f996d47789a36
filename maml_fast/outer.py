"""Meta-gradients other than the exact one: what stands in for the derivative of the inner loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from maml_fast.inner import SGD, InnerRule


class MetaGradient:
    """What `MAML(meta_gradient=...)` takes."""

    def refusals(self, rule: InnerRule, step_weights: object, learns_rates: bool) -> list[str]:
        """What of the other options it cannot be combined with."""
        return []


@dataclass(frozen=True)
class Reptile(MetaGradient):
    """theta_0 - theta_S, of what adapts (Nichol et al. 2018): the way back from where the inner
    loop has led to. The query rows give the losses alone. What does not adapt gets 0."""

    def refusals(self, rule: InnerRule, step_weights: object, learns_rates: bool) -> list[str]:
        found = []
        if step_weights:
            found.append("step_weights: Reptile looks at no query loss; leave them out")
        if learns_rates:
            found.append("an inner_lr that learns: Reptile gives it no gradient; take a number")
        return found


@dataclass(frozen=True)
class Implicit(MetaGradient):
    """The gradient of the query loss at the minimum of the support loss and the proximal term
    (iMAML, Rajeswaran et al. 2019), by conjugate gradients on Hessian-vector products:

        (I + H / lambda)^-1 grad L_query(theta_S),   H the support loss's Hessian at theta_S

    with lambda the `proximal` of the inner rule. It does not depend on the inner loop's way, and is
    the exact meta-gradient if that has come to the minimum.

    iterations: of conjugate gradients, at most; tolerance: stop where the residual's norm is so
    small beside that of the query gradient, in every task. The result's `residuals` says how far
    that came. Raises TypeError or ValueError naming the argument.
    """

    iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        iterations: Any = self.iterations
        tolerance: Any = self.tolerance
        if isinstance(iterations, bool) or not isinstance(iterations, int):
            raise TypeError(f"iterations is {iterations!r}; wanted is an integer, 1 or more")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; wanted is 1 or more")
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise TypeError(f"tolerance is {tolerance!r}; wanted is a number from 0 up")
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance is {tolerance!r}; wanted is a number from 0 up")

    def refusals(self, rule: InnerRule, step_weights: object, learns_rates: bool) -> list[str]:
        found = []
        if not isinstance(rule, SGD) or not rule.proximal:
            found.append(
                "an inner_optimizer without proximal term: give maml_fast.inner.SGD(proximal=...)"
            )
        elif rule.weight_decay:
            found.append("weight_decay, which would move the minimum: leave it out")
        if step_weights:
            found.append("step_weights: it looks at the last step alone; leave them out")
        if learns_rates:
            found.append("an inner_lr that learns: it does not depend on rates; take a number")
        return found
