"""Any module, all tasks at once by torch.func, with the adjoint by forward-over-reverse.

With theta_{k+1} = step(theta_k, g_k), of a plain rule theta_k - eta_k g_k, and lam the cotangent of
theta_{k+1}, the rule's own transpose gives what lam is of theta_k directly, and v of g_k; then
    lam_k = (direct) + H_k v,   H_k v = jvp(grad(L_support))(theta_k; v)
and the same tangent, of the gradient by parameters that do not adapt or by the rows, is what theirs
gains. What is kept is theta_k of each step, one copy of the parameters a task, and no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from maml_fast.backends.conjugate import conjugate_gradients
from maml_fast.errors import UnsupportedModelError
from maml_fast.inner import SGD
from maml_fast.memory import refused_bytes
from maml_fast.norm_calls import OwnStatistics
from maml_fast.ops.norm import batch_statistics
from maml_fast.outer import Implicit
from maml_fast.problem import Outcome, Problem, TaskBatch, one_loss

Parameters = dict[str, Tensor]  # {name: [T, *shape]}, or [*shape] while the tasks share it
# By what moves, what stays, and the rows of the data where that is asked for
Gradients = tuple[Any, ...]
Answer = TypeVar("Answer")


def _huber(z: Tensor, y: Tensor) -> Tensor:
    difference = z - y
    bounded = difference.clamp(-1, 1)
    return (bounded * (difference - 0.5 * bounded)).mean()


# torch's own mse_loss and huber_loss lack forward-over-reverse.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda z, y: (z - y).square().mean(),
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": _huber,
}
IN_PLACE = "replace the in-place operation by one that returns a new tensor"
ON_VALUES = (
    "keep values in tensors: torch.where instead of `if`, so that all tasks take one path, and no "
    ".item()"
)
HINTS = (
    ("randomness", "it draws at random, and passes would differ: call model.eval() or set p=0"),
    ("inplace", IN_PLACE),
    ("in-place", IN_PLACE),
    (".item()", ON_VALUES),
    ("data-dependent control flow", ON_VALUES),
)


@dataclass
class Fast:
    """The parameters that move before an inner step, whether the tasks still share them, and what
    the rule keeps."""

    theta: Parameters
    shared: bool
    state: Any
    step: int

    @property
    def axis(self) -> int | None:
        return None if self.shared else 0


@dataclass
class Adjoint:
    """The cotangents of a step's parameters [T, *shape] and of the rule's state; of parameters that
    stay, summed over tasks; of the rows of support and query."""

    moving: Parameters
    state: Any
    still: Parameters
    support_x: Tensor | None
    query_x: Tensor | None


class FunctionalStepper:
    """The meta-step of one chunk of tasks, for `stepping.drive`."""

    def __init__(self, problem: Problem, batch: TaskBatch, forward_mode: bool = True) -> None:
        self.problem, self.batch = problem, batch
        self.forward_mode = forward_mode
        self.loss_fn = FORMULAS[problem.loss] if isinstance(problem.loss, str) else problem.loss
        moving, parameters = problem.rates.values, {**problem.parameters, **problem.by_step}
        self.still = {name: parameters[name] for name in problem.learned if name not in moving}
        self.frozen = {
            name: tensor
            for name, tensor in parameters.items()
            if name not in moving and name not in self.still
        }
        self.rates = [self._rates_at(step) for step in range(problem.inner_steps)]
        self.rate_gradients = {
            name: batch.support_x.new_zeros(
                problem.inner_steps, *self.rates[0][name].shape, dtype=parameters[name].dtype
            )
            for name in (problem.rates.learning if self.rates else ())
        }
        self.by_step = problem.by_step
        self.plain = isinstance(problem.rule, SGD) and problem.rule.plain
        self.argnums = (0, 1, 2) if problem.wants_inputs else (0, 1)

    def _rates_at(self, step: int) -> Parameters:
        return {
            name: torch.as_tensor(
                values[step],
                dtype=self.problem.parameters[name].dtype,
                device=self.problem.parameters[name].device,
            )
            for name, values in self.problem.rates.values.items()
        }

    def _still_at(self, step: int) -> Parameters:
        """What stays, with an inner step's values of those that have some for each."""
        return {
            name: p[min(step, len(p) - 1)] if name in self.by_step else p
            for name, p in self.still.items()
        }

    def _summed_still(self, found: Parameters, step: int) -> Parameters:
        """The transpose of `_still_at`, summed over tasks."""
        total = _summed(found)
        for name, whole in self.by_step.items():
            if name in total:
                spread = torch.zeros_like(whole)
                spread[min(step, len(whole) - 1)] = total[name]
                total[name] = spread
        return total

    def predict(self, theta: Parameters, still: Parameters, x: Tensor) -> Tensor:
        """The model's output for one task."""
        model = self.problem.model
        with batch_statistics(model), OwnStatistics():
            # A copy of the data: a first layer may work in place.
            return functional_call(model, {**theta, **still, **self.frozen}, (x.clone(),))

    def _loss(
        self, theta: Parameters, still: Parameters, x: Tensor, y: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = self.predict(theta, still, x)
        if weight is None:
            return one_loss(self.loss_fn, output, y), output
        by_row = vmap(lambda z, target: one_loss(self.loss_fn, z[None], target[None]))(output, y)
        return (by_row * weight).sum() / weight.sum(), output

    # ---- of all tasks

    def _batched(self, function: Callable[..., Answer], fast: Fast, *more: Any) -> Answer:
        """`function(theta, still, *more)` of each task; `more` are tensors of tasks, or None."""
        axes = tuple(None if part is None else 0 for part in more)
        call = vmap(function, in_dims=(fast.axis, None, *axes))
        still = self._still_at(fast.step)
        return _guard(self.problem, lambda: call(fast.theta, still, *more))

    def _rows(self, query: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        b = self.batch
        if query:
            return b.query_x, b.query_y, b.query_weight
        return b.support_x, b.support_y, b.support_weight

    def _gradient(self, fast: Fast, query: bool) -> tuple[Gradients, tuple[Tensor, Tensor]]:
        gradient = grad_and_value(self._loss, self.argnums, has_aux=True)
        return self._batched(gradient, fast, *self._rows(query))

    def start(self) -> Fast:
        theta = {name: self.problem.parameters[name] for name in self.problem.adapting}
        return Fast(theta, True, self.problem.rule.start(theta), 0)

    def inner_step(self, fast: Fast, step: int) -> tuple[Tensor, Fast, Fast]:
        (gradient, *_), (losses, _) = self._gradient(fast, query=False)
        if self.plain:
            rates = self.rates[step]
            moved = {name: p - rates[name] * gradient[name] for name, p in fast.theta.items()}
            return losses, Fast(moved, False, fast.state, step + 1), fast
        axes = (fast.axis, 0, None, fast.axis)
        moving = vmap(self.problem.rule.step, in_dims=axes)
        moved, state = _guard(
            self.problem, lambda: moving(fast.theta, gradient, self.rates[step], fast.state)
        )
        return losses, Fast(moved, False, state, step + 1), fast

    def query(
        self, fast: Fast, weight: float, gradient: bool, adjoint: Adjoint | None
    ) -> tuple[Tensor, Tensor, Adjoint | None]:
        if not gradient:
            losses, outputs = self._batched(self._loss, fast, *self._rows(query=True))
            return losses, outputs, None
        found, (losses, outputs) = self._gradient(fast, query=True)
        if weight != 1:
            found = pytree.tree_map(lambda tensor: tensor * weight, found)
        by_x = found[2] if len(found) > 2 else None
        still = self._summed_still(found[1], fast.step)
        if adjoint is None:
            state = pytree.tree_map(torch.zeros_like, fast.state)
            return losses, outputs, Adjoint(found[0], state, still, None, by_x)
        adjoint.moving = _sum_of(adjoint.moving, found[0])
        adjoint.still = _sum_of(adjoint.still, still)
        if by_x is not None:
            adjoint.query_x = by_x if adjoint.query_x is None else adjoint.query_x + by_x
        return losses, outputs, adjoint

    def pull_back(self, adjoint: Adjoint, fast: Fast, step: int) -> Adjoint:
        first_order, gradient = self.problem.first_order, None
        lam = adjoint.moving
        if not lam:  # nothing moved, and the query depends on no support row
            return adjoint
        if not self.plain or (first_order and self.rate_gradients):
            gradient = self._gradient(fast, query=False)[0][0]
        if self.plain:
            direction = {name: -self.rates[step][name] * lam[name] for name in lam}
        else:
            assert gradient is not None
            lam, direction, by_rate, adjoint.state = self._pull_rule(adjoint, fast, gradient, step)
            for name, total in self.rate_gradients.items():
                total[step] += by_rate[name]
        if not first_order:
            gradients, tangents = self.tangents_of_gradient(fast, direction)
            gradient = gradients[0]
            gained = self._summed_still(tangents[1], step)
            adjoint.still = _sum_of(adjoint.still, gained)
            if len(tangents) > 2:
                by_x = tangents[2]
                adjoint.support_x = by_x if adjoint.support_x is None else adjoint.support_x + by_x
        if self.plain:
            for name, total in self.rate_gradients.items():
                assert gradient is not None
                total[step] -= (gradient[name] * lam[name]).sum_to_size(total[step].shape)
        adjoint.moving = lam if first_order else _sum_of(lam, tangents[0])
        return adjoint

    def _pull_rule(
        self, adjoint: Adjoint, fast: Fast, gradient: Parameters, step: int
    ) -> tuple[Parameters, Parameters, Parameters, Any]:
        """The transpose of the rule's step: cotangents of parameters, gradient, rates and state."""
        rule = self.problem.rule

        def pull(theta: Any, gradient: Any, rates: Any, state: Any, lam: Any, of_state: Any) -> Any:
            _, transposed = vjp(rule.step, theta, gradient, rates, state)  # type: ignore[misc]
            return transposed((lam, of_state))

        axes = (fast.axis, 0, None, fast.axis, 0, 0)
        inputs = fast.theta, gradient, self.rates[step], fast.state, adjoint.moving, adjoint.state
        by_theta, by_gradient, by_rates, by_state = _guard(
            self.problem, lambda: vmap(pull, in_dims=axes)(*inputs)
        )
        return by_theta, by_gradient, _summed(by_rates), by_state

    def _pull_start(self, of_state: Any) -> Parameters:
        """What the rule's first state makes of the parameters it began with, transposed."""
        theta = self.start().theta

        def pull(of_state: Any) -> Any:
            return vjp(self.problem.rule.start, theta)[1](of_state)[0]

        return _guard(self.problem, lambda: vmap(pull)(of_state))

    def tangents_of_gradient(self, fast: Fast, direction: Parameters) -> tuple[Any, Any]:
        """The support loss's gradients at theta, and their tangents where theta moves along
        `direction`: the Hessian-vector product, and what goes with it."""
        rows = self._rows(query=False)

        def gradients(theta: Any, still: Any, x: Any, y: Any, weight: Any) -> Any:
            return grad(self._loss, self.argnums, has_aux=True)(theta, still, x, y, weight)[0]

        def forward_over_reverse(
            theta: Any, still: Any, x: Any, y: Any, weight: Any, along: Any
        ) -> Any:
            return jvp(lambda moved: gradients(moved, still, x, y, weight), (theta,), (along,))

        def reverse_over_reverse(
            theta: Any, still: Any, x: Any, y: Any, weight: Any, along: Any
        ) -> Any:
            # The tangents of all gradients along `along` are the gradients of <g, along>.
            def product(theta: Any, still: Any, x: Any) -> Any:
                found = gradients(theta, still, x, y, weight)
                sums = [(found[0][name] * along[name]).sum() for name in along]
                return torch.stack(sums).sum(), found

            return grad(product, self.argnums, has_aux=True)(theta, still, x)[::-1]

        if self.forward_mode:
            try:
                axes = (fast.axis, None, 0, 0, None if rows[2] is None else 0, 0)
                call = vmap(forward_over_reverse, in_dims=axes)
                return call(fast.theta, self._still_at(fast.step), *rows, direction)
            except (NotImplementedError, RuntimeError) as error:
                # Some of torch's operations lack forward mode, or its zero tensors; second
                # derivatives are symmetric, so reverse mode gives the same, with a step's graph.
                if not any(mark in str(error) for mark in ("forward AD", "ZeroTensor")):
                    raise _unsupported(self.problem, error) from error
                self.forward_mode = False
        return self._batched(reverse_over_reverse, fast, *rows, direction)

    def solve(self, fast: Fast, adjoint: Adjoint) -> tuple[Adjoint, Tensor]:
        """Of theta_S, taken for the minimum of L_support + strength/2 |theta - theta_0|^2, with
        x = (H + strength)^-1 lam: the cotangent of theta_0 is strength x, and what else the support
        loss depends on gains -d<grad L_support, x> (Rajeswaran et al. 2019, equation 6)."""
        outer, rule = self.problem.outer, self.problem.rule
        assert isinstance(outer, Implicit)
        assert isinstance(rule, SGD)
        strength = rule.proximal
        if not adjoint.moving:
            return adjoint, self.batch.support_x.new_zeros(self.batch.tasks)

        def curved(x: Parameters) -> Parameters:
            product = self.tangents_of_gradient(fast, x)[1][0]
            return {name: product[name] + strength * x[name] for name in x}

        x, residuals = conjugate_gradients(
            curved, adjoint.moving, outer.iterations, outer.tolerance
        )
        if adjoint.still or self.problem.wants_inputs:
            tangents = self.tangents_of_gradient(fast, x)[1]
            by_still = self._summed_still(tangents[1], fast.step)
            adjoint.still = {name: p - by_still[name] for name, p in adjoint.still.items()}
            adjoint.support_x = -tangents[2] if len(tangents) > 2 else None
        adjoint.moving, adjoint.state = {name: strength * part for name, part in x.items()}, {}
        return adjoint, residuals

    def finish(self, adjoint: Adjoint, outcome: Outcome) -> None:
        learned = self.problem.learned
        if self.rates and pytree.tree_leaves(adjoint.state):
            adjoint.moving = _sum_of(adjoint.moving, self._pull_start(adjoint.state))
        moving = _summed({name: t for name, t in adjoint.moving.items() if name in learned})
        found = {**moving, **adjoint.still}
        outcome.gradients = {name: found[name] for name in learned}
        rates = self.rate_gradients
        outcome.rate_gradients = {
            name: rates[name] if name in rates else self.batch.support_x.new_zeros(0)
            for name in self.problem.rates.learning
        }
        if self.problem.wants_inputs:
            outcome.input_gradients = tuple(  # type: ignore[assignment]
                torch.zeros_like(x) if by_x is None else by_x
                for x, by_x in (
                    (self.batch.support_x, adjoint.support_x),
                    (self.batch.query_x, adjoint.query_x),
                )
            )

    def adapted(self, fast: Fast, support_losses: Tensor) -> AdaptedByFunctional:
        return AdaptedByFunctional(self, fast, support_losses)


class AdaptedByFunctional:
    """Adapted parameters of all tasks, stacked."""

    def __init__(self, stepper: FunctionalStepper, fast: Fast, support_losses: Tensor) -> None:
        self.stepper, self.support_losses, self.fast = stepper, support_losses, fast

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        return self.stepper._batched(self.stepper.predict, self.fast, query_x)

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        tasks, stepper = self.stepper.batch.tasks, self.stepper
        own = {} if self.fast.shared else self.fast.theta
        of_all = {**stepper.problem.parameters, **stepper._still_at(self.fast.step)}
        return {
            name: own[name] if name in own else tensor.expand(tasks, *tensor.shape)
            for name, tensor in of_all.items()
        }


def _summed(by_task: Parameters) -> Parameters:
    return {name: tensor.sum(0) for name, tensor in by_task.items()}


def _sum_of(a: Parameters, b: Parameters) -> Parameters:
    return {name: a[name] + b[name] for name in a}


def _guard(problem: Problem, call: Callable[[], Answer]) -> Answer:
    """Run `call`; what vmap or forward mode cannot do becomes an error that says what to change."""
    try:
        return call()
    except (RuntimeError, NotImplementedError) as error:
        raise _unsupported(problem, error) from error


def _unsupported(problem: Problem, error: Exception) -> Exception:
    text = str(error)
    if refused_bytes(error) is not None:
        return error
    hint = next((hint for mark, hint in HINTS if mark in text), "the cause is below")
    return UnsupportedModelError(
        f"backend 'functional' cannot run {type(problem.model).__name__}: {hint}; or take "
        f"backend='reference', which runs any module one task at a time. torch said: {text}"
    )
