"""maml_fast's own backends, as a user calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.implementation import Ceiling, Gradient, Implementation, MetaStep
from benchmarks.problem import Problem
from maml_fast import MAML, UnavailableBackendError, UnsupportedModelError, cpu_features


class OurBackend(Implementation):
    """Forward, then `loss.backward()`."""

    ours = True

    def __init__(self, backend: str) -> None:
        self.backend = self.name = backend
        self.title = f"maml_fast {backend}"

    def cannot(self, problem: Problem) -> str | None:
        try:
            self._plan(problem)
        except (UnavailableBackendError, UnsupportedModelError) as error:
            return str(error)
        return None

    def ceiling(self, problem: Problem) -> Ceiling | None:
        plan = self._plan(problem)
        if plan.cpu is None:
            return None
        peak = cpu_features.extension().peak(plan.cpu.instruction_set, False)
        return Ceiling(plan.flops, peak * self._threads())

    def prepare(self, problem: Problem) -> MetaStep:
        model = copy.deepcopy(problem.model)
        return MetaStep(self._run(self._maml(problem, model), problem), self._reader(model))

    def _run(self, maml: MAML, problem: Problem) -> Callable[[], Any]:
        def run() -> Tensor:
            maml.model.zero_grad(set_to_none=True)
            loss = maml(*problem.episodes).loss
            loss.backward()
            return loss.detach()

        return run

    def _reader(self, model: nn.Module) -> Callable[[Any], tuple[float, Gradient]]:
        def read(loss: Tensor) -> tuple[float, Gradient]:
            return loss.item(), {
                name: value.grad
                for name, value in model.named_parameters()
                if value.grad is not None
            }

        return read

    def _threads(self) -> int:
        return torch.get_num_threads()

    def _plan(self, problem: Problem) -> Any:
        maml = self._maml(problem, problem.model)
        return maml.plan(problem.episodes.support_x, problem.episodes.query_x)

    def _maml(self, problem: Problem, model: nn.Module) -> MAML:
        network = problem.case.network
        return MAML(
            model,
            loss=network.loss,
            inner_lr=network.inner_lr,
            inner_steps=problem.case.S,
            backend=self.backend,
        )


class OnOneThread(OurBackend):
    """The same on one thread."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name, self.title = f"{backend}-one-thread", f"maml_fast {backend}, one thread"

    def _run(self, maml: MAML, problem: Problem) -> Callable[[], Any]:
        run = super()._run(maml, problem)

        def run_on_one() -> Any:
            with threads(1):
                return run()

        return run_on_one

    def _threads(self) -> int:
        return 1


class ValueAndGrad(OurBackend):
    """Without a graph: `value_and_grad`, as the peers give loss and gradient."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name, self.title = f"{backend}-value-and-grad", f"maml_fast {backend}, value_and_grad"

    def _run(self, maml: MAML, problem: Problem) -> Callable[[], Any]:
        return lambda: maml.value_and_grad(*problem.episodes)

    def _reader(self, model: nn.Module) -> Callable[[Any], tuple[float, Gradient]]:
        def read(found: Any) -> tuple[float, Gradient]:
            out, gradients = found
            named = {name.removeprefix("model."): g for name, g in gradients.items()}
            return out.loss.item(), named

        return read


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
