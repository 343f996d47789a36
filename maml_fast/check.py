"""`check`: the error of a backend on the user's own data, tensor by tensor, against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_fast import meta_step
from maml_fast.backends import reference
from maml_fast.maml import MAML
from maml_fast.problem import Outcome, Problem, TaskBatch

SINGLE_BOUND = 1e-6
RATE_BOUND = 5e-6  # inner products cancel
FLOAT64_BOUND = 1e-10
RATES = "rates of "


@dataclass(frozen=True)
class TensorError:
    """Relative errors ||x - x64|| / ||x64|| of one tensor, and the bound that is wanted.

    For gradients of rates, which are single inner products and may cancel to almost nothing, the
    norm is that of all rates' gradients together.
    """

    name: str
    error: float
    autograd: float  # of autograd in the same dtype
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class CheckReport:
    """The errors of one backend against the float64 reference. `print(report)` shows them."""

    backend: str
    tensors: tuple[TensorError, ...]

    @property
    def passed(self) -> bool:
        """Whether every tensor is within its bound."""
        return all(tensor.passed for tensor in self.tensors)

    def __str__(self) -> str:
        width = max(len(tensor.name) for tensor in self.tensors)
        lines = [f"backend {self.backend} against the float64 reference: relative error"]
        lines.append(f"{'':{width}}  {'this':>9}  {'autograd':>9}  {'bound':>9}")
        for t in self.tensors:
            numbers = f"{t.error:9.2e}  {t.autograd:9.2e}  {t.bound:9.2e}"
            lines.append(f"{t.name:{width}}  {numbers}{'' if t.passed else '  TOO LARGE'}")
        return "\n".join(lines)


def check(
    maml: MAML, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
) -> CheckReport:
    """Run one meta-step on this backend and on the reference, in the model's dtype and float64.

    The data are those of `MAML.forward`. A tensor passes if its error is at most twice that of
    autograd in the same dtype, or 1e-6 (gradients of rates: 5e-6);
    in float64, 1e-10. Gradients in `.grad` are not touched.
    Raises as `MAML.forward` does. ReLU masks of pre-activations within rounding of 0 may flip
    between two correct programs and show as 1e-5 to 1e-3.
    """
    batch = TaskBatch(support_x, support_y, query_x, query_y)
    plan, problem = maml._prepare(batch, maml.inner_steps)
    with torch.no_grad():
        ours = meta_step.run(plan, problem, batch, gradient=True)
        autograd = reference.meta_step(problem, batch, gradient=True)
        exact = reference.meta_step(_in_float64(problem), _data64(batch), gradient=True)
    single = support_x.dtype != torch.float64
    found = []
    scale = _rate_scale(exact)
    for name, wanted in _tensors(exact).items():
        least, floor = (scale, RATE_BOUND) if name.startswith(RATES) else (0.0, SINGLE_BOUND)
        error, own = (
            _relative(_tensors(outcome)[name], wanted, least) for outcome in (ours, autograd)
        )
        bound = max(2 * own, floor) if single else FLOAT64_BOUND
        found.append(TensorError(name, error, own, bound))
    return CheckReport(plan.backend, tuple(found))


def _in_float64(problem: Problem) -> Problem:
    return Problem(
        model=copy.deepcopy(problem.model).double(),
        parameters={name: p.double() for name, p in problem.parameters.items()},
        loss=problem.loss,
        inner_steps=problem.inner_steps,
        first_order=problem.first_order,
        rates=problem.rates,
    )


def _data64(batch: TaskBatch) -> TaskBatch:
    return TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))


def _tensors(outcome: Outcome) -> dict[str, Tensor]:
    assert outcome.gradients is not None and outcome.rate_gradients is not None
    return {
        "task_losses": outcome.task_losses,
        "support_losses": outcome.support_losses,
        "query_outputs": outcome.query_outputs,
        **{f"gradient of {name}": tensor for name, tensor in outcome.gradients.items()},
        **{RATES + name: tensor for name, tensor in outcome.rate_gradients.items()},
    }


def _rate_scale(exact: Outcome) -> float:
    """A rate's gradient is one inner product, and may cancel to nothing: judge it beside all."""
    gradients = list((exact.rate_gradients or {}).values())
    return torch.cat(gradients).norm().item() if gradients else 0.0


def _relative(found: Tensor, wanted: Tensor, least: float) -> float:
    difference = torch.linalg.vector_norm(found.double() - wanted).item()
    norm = max(torch.linalg.vector_norm(wanted).item(), least)
    return difference / norm if norm > 0 else difference
