"""What is measured: something that prepares a meta-step, runs it, and shows its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    """How many operations an implementation does, and how many a second its threads could do; on a
    GPU also the bytes that it must move. None where it is not known.
    """

    flops: int
    flops_per_second: float | None
    bytes: int | None = None
    bytes_per_second: float | None = None


class Implementation(ABC):
    """One way to compute a meta-step.

    Attributes:
        name: how the command line and the results name it.
        title: how the tables name it.
        ours: whether it is part of maml_fast.
        one_by_one: whether it takes task after task, so that its time can be foretold from a few.
        warm: whether `prepare` has already run it.
        waits: whether `run` waits for a GPU by itself.
        precision: of its float32 products, as torch names it; exact but for "high" and "medium".
        device: the kind of device it is measured on, or None for any.
        turn: where time is short, lower ones are measured first (see `budget`).
        seconds_a_pass: that compiling may take for each inner step and for the query, to begin
            with.
    """

    name: str
    title: str
    ours: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    warm: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    precision: str = "highest"
    device: str | None = None
    turn: int = 2
    seconds_a_pass: ClassVar[float] = 0.0

    def cannot(self, problem: Problem) -> str | None:
        """Why this implementation cannot run the problem on its device, or None if it should."""
        return None

    def around(self) -> AbstractContextManager[None]:
        """What holds while it is prepared and runs, such as a precision."""
        return nullcontext()

    def release(self) -> None:
        """Give back the memory of a GPU that it would keep beyond its last meta-step."""
        return None

    def ceiling(self, problem: Problem) -> Ceiling | None:
        """What the arithmetic it does could take at best, where that is known."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> MetaStep:
        """Everything that is done once: copies of the parameters, compilation."""
