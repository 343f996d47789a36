"""What a backend is asked, and what it answers.

Dimensions: T tasks, N support rows a task, M query rows a task, S inner steps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from maml_fast.inner import SGD, InnerRule
from maml_fast.outer import MetaGradient

Loss = str | Callable[[Tensor, Tensor], Tensor]


class TaskBatch(NamedTuple):
    """The tensors of a meta-step. Weights of rows are None where all count alike."""

    support_x: Tensor  # [T, N, ...]
    support_y: Tensor  # [T, N, ...]
    query_x: Tensor  # [T, M, ...]
    query_y: Tensor  # [T, M, ...]
    support_weight: Tensor | None = None  # [T, N]
    query_weight: Tensor | None = None  # [T, M]

    @property
    def tasks(self) -> int:
        return self.support_x.shape[0]

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """The same tasks in order, `size` at a time."""
        if size >= self.tasks:
            yield self
            return
        for start in range(0, self.tasks, size):
            yield self.map(operator.itemgetter(slice(start, start + size)))

    def map(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The same of each tensor that is there."""
        return TaskBatch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there, in order."""
        return [tensor for tensor in self if tensor is not None]


def one_loss(loss_fn: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """The loss of one task's predictions; a user's own function may return something else."""
    loss = loss_fn(z, y)
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss returns {found} for one task's predictions; wanted is a scalar")
    return loss


@dataclass(frozen=True)
class RateTable:
    """Inner learning rates, spelled out for each adapting parameter and inner step.

    `values` maps a parameter's name to its S rates, or to a tensor [S, *shape] where its numbers
    have rates of their own; its keys are exactly the parameters that adapt.
    `learning` names the parameters whose rates want a gradient.
    """

    values: Mapping[str, tuple[float, ...] | Tensor]
    learning: frozenset[str] = frozenset()

    @property
    def by_number(self) -> frozenset[str]:
        """Names of parameters whose numbers have rates of their own."""
        return frozenset(n for n, rates in self.values.items() if isinstance(rates, Tensor))


@dataclass(frozen=True)
class Problem:
    """A model, its inner loop, and where to linearise: everything but the data."""

    model: nn.Module
    parameters: Mapping[str, Tensor]  # every parameter by name, detached
    loss: Loss
    inner_steps: int
    first_order: bool
    rates: RateTable
    # Parameters that get a meta-gradient, whether they adapt or not; None: those that adapt
    meta: tuple[str, ...] | None = None
    rule: InnerRule = field(default_factory=SGD)
    step_weights: tuple[float, ...] = ()  # [S + 1] of the query losses; (): the last alone

    wants_inputs: bool = False  # gradients by the rows of support and query
    weighted_rows: bool = False  # the batch has weights of rows
    # Of parameters that have values for each step, [S + 1, *shape]; the last goes on beyond
    by_step: Mapping[str, Tensor] = field(default_factory=dict)
    outer: MetaGradient | None = None  # what stands in for the exact meta-gradient

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the parameters that get a meta-gradient."""
        return tuple(self.rates.values) if self.meta is None else self.meta

    @property
    def adapting(self) -> list[str]:
        """Names of the parameters that adapt in the inner loop."""
        return list(self.rates.values)

    def above(self, moving: list[str], wants_inputs: bool) -> Problem:
        """The same of the layers above a body, as the planned backends see it: what learns and does
        not adapt adapts at rate 0, and whatever adapts gets a gradient."""
        names, rates = list(self.rates.values), self.rates
        if moving == names == list(self.learned) and wants_inputs == self.wants_inputs:
            return self
        still = (0.0,) * self.inner_steps
        spread = {name: rates.values.get(name, still) for name in moving}
        table = RateTable(spread, rates.learning & set(moving))
        return replace(self, rates=table, meta=tuple(moving), wants_inputs=wants_inputs)

    def up_to(self, step: int) -> Problem:
        """The same with inner steps up to that one, and the loss behind it."""
        rates = {name: by_step[:step] for name, by_step in self.rates.values.items()}
        table = RateTable(rates, self.rates.learning if step else frozenset())
        of_steps = {name: values[: step + 1] for name, values in self.by_step.items()}
        return replace(self, inner_steps=step, rates=table, step_weights=(), by_step=of_steps)

    def with_values_of_all_steps(self) -> Problem:
        """The same with exactly [inner_steps + 1] of what has values for each step: the last goes
        on, or is not used."""
        steps = self.inner_steps + 1
        if all(len(values) == steps for values in self.by_step.values()):
            return self
        of_steps = {name: values[_places(values, steps)] for name, values in self.by_step.items()}
        return replace(self, by_step=of_steps)

    def like(self, name: str) -> Tensor:
        """A tensor of the shape of a parameter's gradient."""
        return self.by_step[name] if name in self.by_step else self.parameters[name]

    def no_rate_gradient(self, name: str, like: Tensor) -> Tensor:
        """Zeros of the shape of the gradient of a parameter's rates."""
        rates = self.rates.values[name]
        return like.new_zeros(rates.shape if isinstance(rates, Tensor) else len(rates))

    def query_weight_at(self, step: int) -> float:
        """What the query loss before inner step `step`, or behind the last, counts."""
        if self.step_weights:
            return self.step_weights[step]
        return float(step == self.inner_steps)


def _places(values: Tensor, steps: int) -> Tensor:
    """Which of a parameter's values each step has."""
    return torch.arange(steps, device=values.device).clamp_(max=len(values) - 1)


def fold_steps(gradient: Tensor, values: Tensor) -> Tensor:
    """The transpose of `with_values_of_all_steps` for one parameter's gradient."""
    if len(gradient) == len(values):
        return gradient
    return torch.zeros_like(values).index_add_(0, _places(values, len(gradient)), gradient)


class FlatGradients(Mapping[str, Tensor]):
    """Gradients that lie one behind the other in one tensor; views of it, made when asked for."""

    def __init__(self, names: Sequence[str], flat: Tensor, like: list[Tensor]) -> None:
        self.names, self.flat, self.like = names, flat, like  # like: tensors of the shapes
        self._views: dict[str, Tensor] | None = None

    def _made(self) -> dict[str, Tensor]:
        if self._views is None:
            pieces = torch._C._nn.unflatten_dense_tensors(self.flat, self.like)
            self._views = dict(zip(self.names, pieces, strict=True))
        return self._views

    def __getitem__(self, name: str) -> Tensor:
        return self._made()[name]

    def values(self) -> ValuesView[Tensor]:
        return self._made().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Outcome:
    """What a meta-step yields. Gradients are sums over the tasks; None where none was asked for."""

    task_losses: Tensor  # [T], of several weighted steps their sum
    support_losses: Tensor  # [T, S]
    query_outputs: Tensor  # [T, M, ...]
    gradients: Mapping[str, Tensor] | None = None  # {name: the parameter's own shape}
    rate_gradients: dict[str, Tensor] | None = None  # {name: [S] or [S, *shape]}
    # Of the sum over tasks, by support_x and query_x; None where not asked for
    input_gradients: tuple[Tensor, Tensor] | None = None
    residuals: Tensor | None = None  # [T], of the implicit meta-gradient's equations
    finite: bool | None = None  # whether all of it is; None: not looked at yet
    skipped: Tensor | None = None  # places of tasks that do not count, None where all do

    @property
    def counted_losses(self) -> Tensor:
        """`task_losses` of the tasks that count."""
        if self.skipped is None:
            return self.task_losses
        counts = torch.ones_like(self.task_losses, dtype=torch.bool)
        counts[self.skipped] = False
        return self.task_losses[counts]

    @property
    def counted(self) -> int:
        """How many tasks count."""
        return len(self.task_losses) - (0 if self.skipped is None else len(self.skipped))


class AdaptedTasks(Protocol):
    """Adapted models of all tasks of a batch."""

    support_losses: Tensor  # [T, S]

    def predict(self, query_x: Tensor) -> Tensor:  # [T, M, ...] -> [T, M, ...]
        ...

    def parameters(self) -> dict[str, Tensor]:  # {name: [T, *shape]}
        ...


class Stepper(Protocol):
    """A backend in pieces, for `stepping.drive`: fast weights in, losses and adjoints out.

    The types of fast weights, traces and adjoints are the backend's own business.
    """

    def start(self) -> Any:
        """Fast weights at step 0: the meta-parameters themselves."""

    def inner_step(self, fast: Any, step: int) -> tuple[Tensor, Any, Any]:
        """Support losses [T] at `fast`, the fast weights after the step, and its trace."""

    def query(
        self, fast: Any, weight: float, gradient: bool, adjoint: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Query losses [T], outputs [T, M, ...], and, with gradient, the adjoint (None: 0) with
        `weight` times the query gradient added."""

    def pull_back(self, adjoint: Any, trace: Any, step: int) -> Any:
        """The adjoint before inner step `step`; sums the gradients of the rates on the way."""

    def solve(self, fast: Any, adjoint: Any) -> tuple[Any, Tensor]:
        """The implicit meta-gradient: the adjoint at step 0 out of that at the last, and residuals
        [T]. Of backend functional alone; the plan sends nobody else here."""

    def finish(self, adjoint: Any, outcome: Outcome) -> None:
        """Put gradients of parameters and of learning rates, summed over tasks, and what else was
        asked for, into the outcome."""

    def adapted(self, fast: Any, support_losses: Tensor) -> AdaptedTasks:
        """The adapted models at `fast`, and the losses [T, S] on the way there."""
