"""A new plan is tried on one task against autograd before it is used.

torch.fx and torch.func see what a model computes, not all that it is: gradients switched off by
`torch.no_grad` or `.data`, a forward that asks for a tensor's type, and the like go past them in
silence. One task's losses, outputs and meta-gradient tell.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maml_fast import meta_step
from maml_fast.backends import reference
from maml_fast.cpu_plan import IMAGES
from maml_fast.errors import UnsupportedModelError
from maml_fast.ops import Norm
from maml_fast.plan import PLANNED, Plan
from maml_fast.problem import Outcome, Problem, RateTable, TaskBatch

SINGLE_BOUND, DOUBLE_BOUND = 1e-3, 1e-6
MOST_AMPLIFIED = 1e6
NORM_MODULES = (_NormBase, nn.GroupNorm, nn.LayerNorm)
KINK_BOUND = 0.3  # what a ReLU or a maximum that switches may do to the gradient of a single task
REASON = (
    "gives another result than autograd on the first task: the model or its loss does something "
    "that {eyes} does not see, such as torch.no_grad, .data, a test of a tensor's type, or a draw "
    "at random"
)


def verified(plan: Plan, problem: Problem, batch: TaskBatch) -> tuple[Plan, bool]:
    """The plan, if its meta-gradient of the first task is autograd's; else one that is.

    False beside it: autograd's own is not finite, so that nothing could be compared. A plan of
    backend functional may give up forward mode, which does not heed `torch.no_grad`. Raises
    UnsupportedModelError where none of the backend's ways agrees.
    """
    if plan.backend == "reference":
        return plan, True
    verdict = agrees(plan, problem, batch)
    if verdict is False and plan.backend == "functional":
        plan = dataclasses.replace(plan, forward_mode=False)
        verdict = agrees(plan, problem, batch)
    if verdict is not False:
        return plan, bool(verdict)
    eyes = "torch.fx" if plan.backend in PLANNED else "torch.func"
    raise UnsupportedModelError(f"backend {plan.backend!r} {REASON.format(eyes=eyes)}")


def agrees(plan: Plan, problem: Problem, batch: TaskBatch) -> bool | None:
    """Whether the first task's meta-step, with at most one inner step, is autograd's.

    None where autograd's is not finite.
    """
    problem = dataclasses.replace(
        problem,
        inner_steps=(steps := min(1, problem.inner_steps)),
        rates=_first_rates(problem.rates),
        outer=None,
        step_weights=((0.25, 0.75) if steps else (1.0,)) if problem.step_weights else (),
    )
    batch = batch.map(operator.itemgetter(slice(0, 1)))
    if plan.cpu is not None and plan.cpu.layout == IMAGES:
        batch = _with_few_queries(batch)
    plan = _exact(plan)
    with _exact_products():
        distance = _distance(plan, problem, batch)
    bound = DOUBLE_BOUND if batch.support_x.dtype == torch.float64 else SINGLE_BOUND
    if distance is None or distance <= bound:
        return None if distance is None else True
    try:  # rounding, or a kink, may be to blame: float64 decides
        shapes = dataclasses.replace(plan.shapes, dtype=torch.float64)
        exact = dataclasses.replace(plan, shapes=shapes, programs={})
        if plan.backend == "triton":  # has no float64: torch shows if the chain is right, and
            if not (_has_kink(plan) and distance <= KINK_BOUND):  # a kink may explain the rest
                return False
            exact = dataclasses.replace(exact, backend="torch", triton=None)
        distance = _distance(exact, *in_float64(problem, batch))
        return distance is not None and distance <= DOUBLE_BOUND
    except (RuntimeError, TypeError, ValueError):
        return False


def _with_few_queries(batch: TaskBatch) -> TaskBatch:
    """No more query rows than support rows, or five: autograd's graph of many large images would
    need more memory than the meta-step that it judges, whose layers treat all rows alike."""
    few = max(batch.support_x.shape[1], 5)
    x, y, weight = batch.query_x, batch.query_y, batch.query_weight
    if weight is None:
        return batch._replace(query_x=x[:, :few], query_y=y[:, :few])
    rows = (weight[0] == 0).sort(stable=True).indices[:few]  # of one task; those that count first
    return batch._replace(query_x=x[:, rows], query_y=y[:, rows], query_weight=weight[:, rows])


def _has_kink(plan: Plan) -> bool:
    natives = (getattr(layer.link.op, "native", None) for layer in plan.layers)
    return plan.asked.loss == "huber" or any(
        native is not None and native[0] in ("relu", "leaky_relu", "max_pool") for native in natives
    )


def _exact(plan: Plan) -> Plan:
    """The plan with products in full precision, launched as they come and not timed."""
    if plan.triton is None:
        return dataclasses.replace(plan, programs={})  # whose memory goes with the trial
    triton = dataclasses.replace(plan.triton, precision="tf32x3", tunes=False)
    asked = dataclasses.replace(plan.asked, cuda_graphs=False)
    return dataclasses.replace(plan, triton=triton, asked=asked, programs={})


@contextmanager
def _exact_products() -> Iterator[None]:
    """The same of torch's products and convolutions, in autograd as in the layer kernels."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn
    rounded = convolutions.allow_tf32
    if before == "highest" and not rounded:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    convolutions.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        convolutions.allow_tf32 = rounded


def _distance(plan: Plan, problem: Problem, batch: TaskBatch) -> float | None:
    """The relative difference of losses and outputs, or of gradients; None if not finite."""
    gradient = bool(problem.learned)
    wanted = _tensors(reference.meta_step(problem, batch, gradient))
    if not all(tensor.isfinite().all() for tensor in wanted.values()):
        return None
    found = _tensors(meta_step.run(plan, problem, batch, gradient))
    # Gradients together: one that cancels to rounding has no relative error of its own.
    rounding = _rounding(wanted, batch) * _amplified(plan, problem.model)
    worst = 0.0
    for names in ([n for n in wanted if n not in problem.parameters], problem.learned):
        scale = _norm([wanted[name] for name in names])
        difference = _norm([found[name] - wanted[name] for name in names])
        if scale > rounding or difference > rounding:
            worst = max(worst, difference / scale if scale else float("inf"))
    return worst


def _rounding(wanted: Mapping[str, Tensor], batch: TaskBatch) -> float:
    """What float64 may leave of gradients that all cancel: a little of what they are made of."""
    outputs = wanted["outputs"]
    if outputs.dtype != torch.float64:
        return 0.0  # float64 decides
    losses = _norm([wanted["support losses"], wanted["task losses"], outputs])
    largest = max(x.abs().max().item() for x in (batch.support_x, batch.query_x))
    return 64 * torch.finfo(torch.float64).eps * (1 + losses) * (1 + largest)


def _amplified(plan: Plan, model: nn.Module) -> float:
    """How much norms may enlarge rounding: each divides by the root of its eps where its rows are
    alike. At most 1e6, so that gradients that are larger than rounding stay to be compared."""
    planned = [op.eps for layer in plan.layers if isinstance(op := layer.link.op, Norm)]
    norms = planned or [m.eps for m in model.modules() if isinstance(m, NORM_MODULES)]
    return min(math.prod(max(eps, 1e-12) ** -0.5 for eps in norms), MOST_AMPLIFIED)


def _norm(tensors: list[Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def _tensors(outcome: Outcome) -> Mapping[str, Tensor]:
    return {
        "support losses": outcome.support_losses,
        "task losses": outcome.task_losses,
        "outputs": outcome.query_outputs,
        **(outcome.gradients or {}),
    }


def _first_rates(rates: RateTable) -> RateTable:
    return RateTable({name: values[:1] for name, values in rates.values.items()})


def in_float64(problem: Problem, batch: TaskBatch) -> tuple[Problem, TaskBatch]:
    """The same problem and data in float64, on copies."""
    loss = problem.loss
    doubled = dataclasses.replace(
        problem,
        model=copy.deepcopy(problem.model).double(),
        parameters={name: p.double() for name, p in problem.parameters.items()},
        loss=copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss,
    )
    spread = {
        name: rates.double() if isinstance(rates, Tensor) else rates
        for name, rates in problem.rates.values.items()
    }
    by_step = {name: values.double() for name, values in problem.by_step.items()}
    table = RateTable(spread, problem.rates.learning)
    doubled = dataclasses.replace(doubled, rates=table, by_step=by_step)
    return doubled, batch.map(lambda t: t.double() if t.is_floating_point() else t)
