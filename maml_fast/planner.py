"""Plans that are kept: made once for a model and data of the same shapes, and tried before use."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maml_fast.errors import UnsupportedModelError
from maml_fast.inputs import probe
from maml_fast.layers import Asked, Shapes
from maml_fast.plan import PLANNED, Plan, make_plan
from maml_fast.problem import Loss, Problem, TaskBatch
from maml_fast.refusals import check_statistics
from maml_fast.signature import signature
from maml_fast.verify import verified

PLANS_KEPT = 32


@dataclass
class Planned:
    """A plan, and what came of making it."""

    plan: Plan
    outputs: tuple[Tensor, Tensor]  # predictions for one task's support and query rows
    make: Callable[..., Plan]  # make_plan, all but `refusals`
    alive: list[Any]  # what the plan's key knows by id, so that no other object takes the id
    named: dict[str, nn.Parameter]  # of the model that the key stands for
    sure: bool = False  # whether it was tried against autograd

    def __post_init__(self) -> None:
        asked = self.plan.asked
        self.adapting = {name: self.named[name] for name in asked.adapting}
        self.learned = [self.named[name] for name in asked.learned]
        self.own_names = [f"model.{name}" for name in asked.learned]  # `MAML.named_parameters()`

    def try_out(self, problem: Problem, batch: TaskBatch) -> bool:
        """Try the plan on the first task; "auto" takes functional where a planned one is wrong.

        Returns whether there was something to compare with. Raises UnsupportedModelError if the
        plan disagrees with autograd, and no other may take its place.
        """
        try:
            self.plan, sure = verified(self.plan, problem, batch)
        except UnsupportedModelError as error:
            if self.plan.asked.backend != "auto" or self.plan.backend not in PLANNED:
                raise
            self.plan, sure = verified(self.make(refusals=[str(error)]), problem, batch)
        except Exception as error:  # of a kernel that this GPU cannot run, of any type
            if self.plan.asked.backend != "auto" or self.plan.backend != "triton":
                raise
            reason = f"its kernels fail here: {type(error).__name__}: {error}"
            self.plan, sure = verified(self.make(broken={"triton": reason}), problem, batch)
        return sure


class Planner:
    """The latest plans of one `MAML`. A copy of it begins empty: keys hold ids of this process."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, Planned] = OrderedDict()
        self._calls: OrderedDict[Any, Planned] = OrderedDict()
        self._latest: tuple[Any, Planned | None] = None, None

    def remember(self, call: Any, planned: Planned) -> None:
        """A call that was checked, and whose plan was tried: `recall` gives the plan at once."""
        if call is not None:
            self._latest = call, planned
            self._calls[call] = planned
            if len(self._calls) > PLANS_KEPT:
                self._calls.popitem(last=False)

    def recall(self, call: Any) -> Planned | None:
        """The plan of a call like this one."""
        latest, planned = self._latest
        if call is None:
            return None
        if call == latest:  # most often so, and comparing is quicker than hashing
            return planned
        planned = self._calls.get(call)
        if planned is not None:
            self._latest = call, planned
        return planned

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        return Planner, ()

    def plan_for(self, model: nn.Module, loss: Loss, asked: Asked, batch: TaskBatch) -> Planned:
        """The plan for data of these shapes, made or kept from an earlier call.

        Raises as `check_statistics`, `probe` and `make_plan` do.
        """
        x, q = batch.support_x, batch.query_x
        shapes = Shapes(len(x), tuple(x.shape[1:]), tuple(q.shape[1:]), x.dtype, x.device)
        key = (shapes, asked, signature(model))
        if key not in self._plans:
            check_statistics(model)
            outputs = probe(model, "support_x", x[0]), probe(model, "query_x", q[0])
            named = dict(model.named_parameters())
            make = functools.partial(make_plan, model, asked, shapes, tuple(outputs[1].shape))
            alive = [loss, asked.rule, *model.modules(), *model.parameters()]
            self._plans[key] = Planned(make(), outputs, make, alive, named)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[key]
