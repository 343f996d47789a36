"""Is it right? Each result is held to a float64 gradient, tensor by tensor, before it is timed.

The error of a tensor is ||g - g64|| / ||g64||; of one whose gradient is zero, such as a bias before
batch norm, that of which both have rounding only is set against the largest tensor's. Ours may have
at most twice the error that autograd itself makes on that tensor in float32, or 1e-6; a peer may
have 1e-3, and its error is shown. Where ReLU and pools cannot be kept off their kinks, float32 says
little of either: ours may then have as much as a peer, and must be exact in float64 on some tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.cases import named
from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.peers.autograd_loop import AutogradLoop
from benchmarks.peers.vmap_grad import meta_loss
from benchmarks.problem import Problem, adapting, load, tasks_at_once

LOOP_TASKS = 256  # the autograd loop itself is the reference up to here
COMPARED_TASKS = 8  # above, what stands in for it is compared with it on so many
STAND_IN_ERROR = 1e-11
DOUBLE_TASKS = 2  # ours are run in float64 on so many where a network has kinks
EXACT = 1e-9  # and may have this error
VANISHES = 1e-10  # a norm of this part of the largest, in float64, is rounding
FLOOR = 1e-6
TWICE = 2.0
REDUCED = {"high": 0.1, "medium": 0.3}  # TF32 and bfloat16: shown, and held to be no nonsense

Errors = dict[str, float]  # relative error by tensor; "loss" is one of them


@dataclass(frozen=True)
class Reference:
    """The right answer of a case, what float32 may lose on the way, and how both were computed."""

    loss: float
    gradient: Gradient  # float64, on the CPU
    autograd: Errors  # of the same computation in float32
    how: str
    loose: float  # see `networks.Network`
    few: Reference | None = None  # of the first tasks, where ours are run in float64

    def errors(self, loss: float, gradient: Gradient) -> Errors:
        """Relative errors of a result by tensor, and of its loss.

        Raises:
            ValueError: the result lacks a gradient, or has one too many, or one of the wrong shape.
        """
        if gradient.keys() != self.gradient.keys():
            raise ValueError(f"gradients of {sorted(gradient)}, wanted of {sorted(self.gradient)}")
        errors = {"loss": abs(loss - self.loss) / abs(self.loss)}
        largest = _largest(self.gradient)
        for name, right in self.gradient.items():
            found, wanted = list(gradient[name].shape), list(right.shape)
            if found != wanted:
                raise ValueError(f"the gradient of {name} is {found}, wanted {wanted}")
            errors[name] = relative(gradient[name], right, largest)
        return errors

    def bounds(self, *, strict: bool, precision: str = "highest") -> Errors:
        """What each error may be at most; strict is for ours, on networks where it can be asked."""
        if precision in REDUCED:
            return dict.fromkeys(self.autograd, REDUCED[precision])
        if strict:
            return {name: max(TWICE * error, FLOOR) for name, error in self.autograd.items()}
        return dict.fromkeys(self.autograd, self.loose)

    def allowance(self, *, strict: bool) -> str:
        """What `bounds` asks of ours, in words."""
        name, error = worst(self.autograd)
        own = f"float32 autograd's own worst error is {error:.1e} ({name})"
        if strict:
            return (
                f"{own}, ours may have {TWICE:g} times its error on each tensor, or {FLOOR:g}; "
                f"peers {self.loose:g}"
            )
        return (
            f"{own}, ours and peers may have {self.loose:g}, as no task stays off all kinks; ours "
            f"may have {EXACT:g} in float64, on {DOUBLE_TASKS} tasks"
        )


def worst(errors: Errors) -> tuple[str, float]:
    """The tensor with the largest error; one that is not a number is worse than any other."""
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def broken(errors: Errors, bounds: Errors) -> str | None:
    """What is wrong with the worst tensor that is beyond its bound, or None if none is."""
    beyond = {name: error for name, error in errors.items() if not error <= bounds[name]}
    if not beyond:
        return None
    name, error = worst(beyond)
    return f"the error of {name} is {error:.1e}, allowed {bounds[name]:.1e}"


@cache
def problem_and_reference(case_name: str, device_name: str) -> tuple[Problem, Reference]:
    """A case's problem with its right answer, kept."""
    problem = load(named(case_name), torch.device(device_name))
    return problem, reference(problem)


def reference(problem: Problem) -> Reference:
    """Compute the right answer, by the autograd loop where that takes seconds.

    Raises:
        RuntimeError: for many tasks vmap stands in for the loop, and the two disagree on the first
            tasks.
    """
    if problem.episodes.tasks <= LOOP_TASKS:
        how = "autograd loop in float64"
        (loss, right), (loss32, gradient32) = (_by_loop(p) for p in (problem.double(), problem))
    else:
        few = problem.double().first(COMPARED_TASKS)
        right = _on_cpu(_by_loop(few)[1])
        largest = _largest(right)
        difference = max(
            relative(value, right[name], largest) for name, value in _by_vmap(few)[1].items()
        )
        if not difference <= STAND_IN_ERROR:
            raise RuntimeError(
                f"{problem.case.name}: vmap and the loop differ by {difference:.1e} in float64"
            )
        how = (
            f"vmap in float64, within {difference:.0e} of the autograd loop "
            f"on the first {COMPARED_TASKS} tasks"
        )
        (loss, right), (loss32, gradient32) = (_by_vmap(p) for p in (problem.double(), problem))
    exact = Reference(
        loss, _on_cpu(right), {}, how, problem.case.network.loose, _first_tasks(problem)
    )
    return replace(exact, autograd=exact.errors(loss32, gradient32))


def _first_tasks(problem: Problem) -> Reference | None:
    """The right answer of a network with kinks on the tasks that ours are run on in float64."""
    if problem.case.network.strict:
        return None
    loss, gradient = _by_loop(problem.double().first(DOUBLE_TASKS))
    how = "autograd loop in float64"
    return Reference(loss, _on_cpu(gradient), {}, how, problem.case.network.loose)


def in_double(measured: Implementation, problem: Problem, reference: Reference) -> Errors | None:
    """Errors of an implementation that runs the problem's first tasks in float64; None where it
    cannot, or where the reference has no such tasks.
    """
    if reference.few is None:
        return None
    double = problem.double().first(DOUBLE_TASKS)
    if measured.cannot(double):
        return None
    step = measured.prepare(double)
    return reference.few.errors(*step.read(step.run()))


def _on_cpu(gradient: Gradient) -> Gradient:
    return {name: value.cpu() for name, value in gradient.items()}


def _largest(gradient: Gradient) -> float:
    return max(value.norm().item() for value in gradient.values())


def relative(gradient: Tensor, right: Tensor, largest: float) -> float:
    """||gradient - right|| / ||right||, or over the largest tensor's norm where right is zero."""
    norm = right.norm().item()
    difference = (gradient.detach().cpu().double() - right).norm().item()
    return difference / (norm if norm > VANISHES * largest else largest)


def _by_loop(problem: Problem) -> tuple[float, Gradient]:
    step: MetaStep = AutogradLoop().prepare(problem)
    return step.read(step.run())


def _by_vmap(problem: Problem) -> tuple[float, Gradient]:
    """By vmap, some tasks at a time, in the precision of the problem."""
    mean_loss = meta_loss(problem.case, problem.model)
    theta = {
        name: value.detach().clone().requires_grad_()
        for name, value in adapting(problem.model).items()
    }
    total, tasks = 0.0, problem.episodes.tasks
    chunk = tasks_at_once(problem.case, problem.episodes.support_x.device)
    for start in range(0, tasks, chunk):
        part = problem.episodes.pick(slice(start, start + chunk))
        loss = mean_loss(theta, *part) * (part.tasks / tasks)
        loss.backward()
        total += loss.item()
    return total, {name: value.grad for name, value in theta.items() if value.grad is not None}
