"""`check`: the error of a backend on the user's own data, tensor by tensor, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maml_fast import meta_step
from maml_fast.backends import reference
from maml_fast.finite import check_finite
from maml_fast.maml import MAML
from maml_fast.problem import Outcome
from maml_fast.verify import in_float64

SINGLE_BOUND = 1e-6
RATE_BOUND = 5e-6  # inner products cancel
FLOAT64_BOUND = 1e-10
VANISHING = 1e-12  # of all gradients' norm: rounding, in float64
GRADIENT, RATES = "gradient of ", "rates of "


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
    maml: MAML,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
) -> CheckReport:
    """Run one meta-step on this backend and on the reference, in the model's dtype and float64.

    The data are those of `MAML.forward`. In float64 a tensor passes with an error of at most
    1e-10, in other dtypes with at most twice that of autograd in the same dtype, or 1e-6 (rates:
    5e-6) times the tensor's cancellation: the sum of the tasks' norms over the norm of their sum,
    by which any program's rounding grows. A gradient that vanishes, as that of a bias that a norm
    takes away again, is judged by the norm of all gradients, and outputs that nearly cancel by that
    of the targets. Gradients in `.grad` are not touched.
    Raises as `MAML.forward` does. ReLU masks of pre-activations within rounding of 0 may flip
    between two correct programs and show as 1e-5 to 1e-3.
    """
    batch = maml._batch(support_x, support_y, query_x, query_y, support_weight, query_weight)
    planned, problem = maml._prepare(batch, maml.inner_steps)
    plan = planned.plan
    gradient = bool(problem.learned)
    with torch.no_grad():
        ours = meta_step.run(plan, problem, batch, gradient)
        check_finite(plan, problem, batch, ours)
        autograd = reference.meta_step(problem, batch, gradient)
        problem64, batch64 = in_float64(problem, batch)
        by_task = [reference.meta_step(problem64, task, gradient) for task in batch64.chunks(1)]
    exact, cancellation = _summed([_tensors(outcome) for outcome in by_task])
    single = support_x.dtype != torch.float64
    found = []
    scale, rate_scale = _scale(exact, GRADIENT), _scale(exact, RATES)
    for name, wanted in exact.items():
        if name.startswith(RATES):
            least, floor = rate_scale, RATE_BOUND
        else:
            vanishes = name.startswith(GRADIENT) and wanted.norm() <= VANISHING * scale
            least, floor = scale if vanishes else 0.0, SINGLE_BOUND
            if name == "query_outputs" and batch.query_y.is_floating_point():
                least = batch.query_y.double().norm().item()  # what they are compared with
        error, own = (
            _relative(_tensors(outcome)[name], wanted, least) for outcome in (ours, autograd)
        )
        bound = max(2 * own, floor * cancellation[name]) if single else FLOAT64_BOUND
        found.append(TensorError(name, error, own, bound))
    return CheckReport(plan.backend, tuple(found))


def _summed(by_task: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of all tasks together, and how far each gradient's tasks cancel: 1 or more."""
    total, cancellation = {}, {}
    for name in by_task[0]:
        tensors = [task[name] for task in by_task]
        cancellation[name] = 1.0
        if not name.startswith((GRADIENT, RATES)):
            total[name] = torch.cat(tensors)
            continue
        total[name] = torch.stack(tensors).sum(0)
        norm = total[name].norm().item()
        if norm > 0:
            cancellation[name] = sum(tensor.norm().item() for tensor in tensors) / norm
    return total, cancellation


def _tensors(outcome: Outcome) -> dict[str, Tensor]:
    gradients, rates = outcome.gradients or {}, outcome.rate_gradients or {}
    return {
        "task_losses": outcome.task_losses,
        "support_losses": outcome.support_losses,
        "query_outputs": outcome.query_outputs,
        **{GRADIENT + name: tensor for name, tensor in gradients.items()},
        **{RATES + name: tensor for name, tensor in rates.items()},
    }


def _scale(exact: dict[str, Tensor], kind: str) -> float:
    """The norm of all gradients of a kind. A rate's is one inner product, and may cancel to
    nothing: it is judged beside all."""
    gradients = [tensor.flatten() for name, tensor in exact.items() if name.startswith(kind)]
    return torch.cat(gradients).norm().item() if gradients else 0.0


def _relative(found: Tensor, wanted: Tensor, least: float) -> float:
    difference = torch.linalg.vector_norm(found.double() - wanted).item()
    norm = max(torch.linalg.vector_norm(wanted).item(), least)
    return difference / norm if norm > 0 else difference
