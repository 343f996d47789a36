"""Any module, all tasks at once by torch.func, with the adjoint by forward-over-reverse.

lam = grad L_query(theta_S); for k down to 0: lam = lam - H_k (eta_k * lam), where the
Hessian-vector product is the tangent of the gradient: jvp(grad(L_support))(theta_k; eta_k * lam).
What is kept is theta_k of each step, one copy of the parameters a task, and no graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.nn import functional as F

from maml_fast.errors import UnsupportedModelError
from maml_fast.norm_calls import OwnStatistics
from maml_fast.ops.norm import batch_statistics
from maml_fast.problem import Problem, TaskBatch, one_loss

Parameters = dict[str, Tensor]  # {name: [T, *shape]}, or [*shape] while the tasks share it
Fast = tuple[Parameters, bool]  # the parameters, and whether the tasks still share them
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


class FunctionalStepper:
    """The meta-step of one chunk of tasks, for `stepping.drive`."""

    def __init__(self, problem: Problem, batch: TaskBatch, forward_mode: bool = True) -> None:
        self.problem, self.batch = problem, batch
        self.forward_mode = forward_mode
        self.loss_fn = FORMULAS[problem.loss] if isinstance(problem.loss, str) else problem.loss
        self.frozen = {
            name: tensor
            for name, tensor in problem.parameters.items()
            if name not in problem.rates.values
        }
        self.rate_gradients: dict[str, Tensor] = {
            name: batch.support_x.new_zeros(problem.inner_steps, dtype=tensor.dtype)
            for name, tensor in problem.parameters.items()
            if name in problem.rates.learning
        }

    def predict(self, theta: Parameters, x: Tensor) -> Tensor:
        """The model's output for one task."""
        model = self.problem.model
        with batch_statistics(model), OwnStatistics():
            # A copy of the data: a first layer may work in place.
            return functional_call(model, {**theta, **self.frozen}, (x.clone(),))

    def _loss(self, theta: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = self.predict(theta, x)
        return one_loss(self.loss_fn, output, y), output

    def _gradient(
        self, theta: Parameters, x: Tensor, y: Tensor, shared: bool
    ) -> tuple[Parameters, tuple[Tensor, Tensor]]:
        gradient = grad_and_value(self._loss, has_aux=True)
        return _guard(
            self.problem, lambda: vmap(gradient, in_dims=(_axis(shared), 0, 0))(theta, x, y)
        )

    def start(self) -> Fast:
        theta = {name: self.problem.parameters[name] for name in self.problem.adapting}
        return theta, True

    def inner_step(self, fast: Fast, step: int) -> tuple[Tensor, Fast, Fast]:
        theta, shared = fast
        x, y = self.batch.support_x, self.batch.support_y
        gradient, (losses, _) = self._gradient(theta, x, y, shared)
        rates = self.problem.rates.values
        updated = {name: theta[name] - rates[name][step] * gradient[name] for name in theta}
        return losses, (updated, False), fast

    def query(self, fast: Fast, gradient: bool) -> tuple[Tensor, Tensor, Parameters | None]:
        theta, shared = fast
        x, y = self.batch.query_x, self.batch.query_y
        if gradient:
            adjoint, (losses, outputs) = self._gradient(theta, x, y, shared)
            return losses, outputs, adjoint
        losses, outputs = _guard(
            self.problem, lambda: vmap(self._loss, in_dims=(_axis(shared), 0, 0))(theta, x, y)
        )
        return losses, outputs, None

    def pull_back(self, adjoint: Parameters, trace: Fast, step: int) -> Parameters:
        (theta, shared), rates = trace, self.problem.rates.values
        if self.problem.first_order:
            if self.rate_gradients:
                x, y = self.batch.support_x, self.batch.support_y
                self._rate_gradients(self._gradient(theta, x, y, shared)[0], adjoint, step)
            return adjoint

        direction = {name: rates[name][step] * adjoint[name] for name in adjoint}
        gradient, product = self._hessian_vector(theta, direction, shared)
        self._rate_gradients(gradient, adjoint, step)
        return {name: adjoint[name] - product[name] for name in adjoint}

    def _hessian_vector(
        self, theta: Parameters, direction: Parameters, shared: bool
    ) -> tuple[Parameters, Parameters]:
        """The support gradient at theta, and the Hessian there times direction."""
        x, y = self.batch.support_x, self.batch.support_y

        def forward_over_reverse(
            theta: Parameters, direction: Parameters, x: Tensor, y: Tensor
        ) -> tuple[Parameters, Parameters]:
            gradient = functools.partial(self._bare_gradient, x, y)
            return jvp(gradient, (theta,), (direction,))  # type: ignore[return-value]

        def reverse_over_reverse(
            theta: Parameters, direction: Parameters, x: Tensor, y: Tensor
        ) -> tuple[Parameters, Parameters]:
            gradient, pull = vjp(functools.partial(self._bare_gradient, x, y), theta)  # type: ignore[misc]
            return gradient, pull(direction)[0]

        axes = (_axis(shared), 0, 0, 0)
        if self.forward_mode:
            try:
                return vmap(forward_over_reverse, in_dims=axes)(theta, direction, x, y)
            except (NotImplementedError, RuntimeError) as error:
                # Some of torch's operations lack forward mode, or its zero tensors; the Hessian
                # is symmetric, so reverse mode gives the same product, with one step's graph.
                if not any(mark in str(error) for mark in ("forward AD", "ZeroTensor")):
                    raise _unsupported(self.problem, error) from error
                self.forward_mode = False
        return _guard(
            self.problem,
            lambda: vmap(reverse_over_reverse, in_dims=axes)(theta, direction, x, y),
        )

    def _bare_gradient(self, x: Tensor, y: Tensor, theta: Parameters) -> Parameters:
        return grad(self._loss, has_aux=True)(theta, x, y)[0]

    def _rate_gradients(self, gradient: Parameters, adjoint: Parameters, step: int) -> None:
        for name, total in self.rate_gradients.items():
            total[step] -= torch.sum(gradient[name] * adjoint[name])

    def gradients(self, adjoint: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {name: lam.sum(0) for name, lam in adjoint.items()}, self.rate_gradients

    def adapted(self, fast: Fast, support_losses: Tensor) -> AdaptedByFunctional:
        return AdaptedByFunctional(self, fast, support_losses)


class AdaptedByFunctional:
    """Adapted parameters of all tasks, stacked."""

    def __init__(self, stepper: FunctionalStepper, fast: Fast, support_losses: Tensor) -> None:
        self.stepper, self.support_losses = stepper, support_losses
        self.theta, self.shared = fast

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        batched = vmap(self.stepper.predict, in_dims=(_axis(self.shared), 0))
        return _guard(self.stepper.problem, lambda: batched(self.theta, query_x))

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        tasks = self.stepper.batch.tasks
        shared = {**self.stepper.frozen, **(self.theta if self.shared else {})}
        return {
            name: shared[name].expand(tasks, *shared[name].shape)
            if name in shared
            else self.theta[name]
            for name in self.stepper.problem.parameters
        }


def _axis(shared: bool) -> int | None:
    return None if shared else 0


def _guard(problem: Problem, call: Callable[[], Answer]) -> Answer:
    """Run `call`; what vmap or forward mode cannot do becomes an error that says what to change."""
    try:
        return call()
    except (RuntimeError, NotImplementedError) as error:
        raise _unsupported(problem, error) from error


def _unsupported(problem: Problem, error: Exception) -> Exception:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return error
    hint = next((hint for mark, hint in HINTS if mark in text), "the cause is below")
    return UnsupportedModelError(
        f"backend 'functional' cannot run {type(problem.model).__name__}: {hint}; or take "
        f"backend='reference', which runs any module one task at a time. torch said: {text}"
    )
