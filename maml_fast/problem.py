"""What a backend is asked, and what it answers.

Dimensions: T tasks, N support rows a task, M query rows a task, S inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Loss = str | Callable[[Tensor, Tensor], Tensor]


class TaskBatch(NamedTuple):
    """The four tensors of a meta-step."""

    support_x: Tensor  # [T, N, ...]
    support_y: Tensor  # [T, N, ...]
    query_x: Tensor  # [T, M, ...]
    query_y: Tensor  # [T, M, ...]

    @property
    def tasks(self) -> int:
        return self.support_x.shape[0]

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """The same tasks in order, `size` at a time."""
        if size >= self.tasks:
            yield self
            return
        for start in range(0, self.tasks, size):
            yield TaskBatch(*(tensor[start : start + size] for tensor in self))


def one_loss(loss_fn: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """The loss of one task's predictions; a user's own function may return something else."""
    loss = loss_fn(z, y)
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss returns {found} for one task's predictions; wanted is a scalar")
    return loss


@dataclass(frozen=True)
class RateTable:
    """Inner learning rates, spelled out: one number for each adapting parameter and inner step.

    `values` maps a parameter's name to its S rates; its keys are exactly the parameters that adapt.
    `learning` names the parameters whose rates want a gradient.
    """

    values: Mapping[str, tuple[float, ...]]
    learning: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Problem:
    """A model, its inner loop, and where to linearise: everything but the data."""

    model: nn.Module
    parameters: Mapping[str, Tensor]  # every parameter by name, detached
    loss: Loss
    inner_steps: int
    first_order: bool
    rates: RateTable

    @property
    def adapting(self) -> list[str]:
        """Names of the parameters that adapt in the inner loop and get a meta-gradient."""
        return list(self.rates.values)


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

    task_losses: Tensor  # [T]
    support_losses: Tensor  # [T, S]
    query_outputs: Tensor  # [T, M, ...]
    gradients: Mapping[str, Tensor] | None = None  # {name: the parameter's own shape}
    rate_gradients: dict[str, Tensor] | None = None  # {name: [S]}
    finite: bool | None = None  # whether all of it is; None: not looked at yet


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

    def query(self, fast: Any, gradient: bool) -> tuple[Tensor, Tensor, Any]:
        """Query losses [T], outputs [T, M, ...], and the adjoint: the query gradient (or None)."""

    def pull_back(self, adjoint: Any, trace: Any, step: int) -> Any:
        """The adjoint before inner step `step`; sums the gradients of the rates on the way."""

    def gradients(self, adjoint: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of parameters and of learning rates, summed over tasks."""

    def adapted(self, fast: Any, support_losses: Tensor) -> AdaptedTasks:
        """The adapted models at `fast`, and the losses [T, S] on the way there."""
