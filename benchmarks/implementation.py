"""What is measured: something that prepares a meta-step, runs it, and shows its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from benchmarks.problem import Problem

Gradient = dict[str, Tensor]  # by the parameters' names


class MetaStep(NamedTuple):
    """A meta-step ready to be timed.

    `run` computes the loss and the gradient of every parameter, and returns when they are there (on
    a GPU: when torch's stream is synchronised, which the caller does). `read` turns what `run`
    returned into torch's types.
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[float, Gradient]]


class Ceiling(NamedTuple):
    """How many operations an implementation does, and how many a second its threads could do."""

    flops: int
    flops_per_second: float


class Implementation(ABC):
    """One way to compute a meta-step.

    Attributes:
        name: how the command line and the results name it.
        title: how the tables name it.
        ours: whether it is part of maml_fast.
        one_by_one: whether it takes task after task, so that its time can be foretold from a few.
        warm: whether `prepare` has already run it.
    """

    name: str
    title: str
    ours: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    warm: ClassVar[bool] = False

    def cannot(self, problem: Problem) -> str | None:
        """Why this implementation cannot run the problem on its device, or None if it should."""
        return None

    def ceiling(self, problem: Problem) -> Ceiling | None:
        """What the arithmetic it does could take at best, where that is known."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> MetaStep:
        """Everything that is done once: copies of the parameters, compilation."""
