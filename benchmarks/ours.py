"""maml_fast's own backends, as a user calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.implementation import Ceiling, Gradient, Implementation, MetaStep
from benchmarks.problem import Problem
from maml_fast import MAML, UnavailableBackendError, UnsupportedModelError, cpu_features


class OurBackend(Implementation):
    """Forward, then `loss.backward()`."""

    ours = True

    def __init__(self, backend: str) -> None:
        self.backend = self.name = backend
        self.title = f"maml_fast {backend}"
        self.turn = 2 if backend == "functional" else 0

    def cannot(self, problem: Problem) -> str | None:
        if self.backend == "triton" and problem.episodes.support_x.device.type != "cuda":
            return "needs a GPU"  # its interpreter is nothing to measure
        try:
            self._plan(problem)
        except (UnavailableBackendError, UnsupportedModelError) as error:
            return str(error)
        return None

    def ceiling(self, problem: Problem) -> Ceiling | None:
        plan = self._plan(problem)
        if plan.cpu is not None:
            peak = cpu_features.extension().peak(plan.cpu.instruction_set, False)
            return Ceiling(plan.flops, peak * self._threads())
        device = problem.episodes.support_x.device
        if device.type != "cuda" or not plan.flops:
            return None
        best = gpu.peak(device)
        if best is None:
            return Ceiling(plan.flops, None, plan.bytes, None)
        speed = best.flops_per_second(self.precision)
        return Ceiling(plan.flops, speed, plan.bytes, best.bytes_per_second)

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

    device = "cpu"

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name, self.title = f"{backend}-one-thread", f"maml_fast {backend}, one thread"

    def around(self) -> AbstractContextManager[None]:
        return threads(1)

    def _threads(self) -> int:
        return 1


class ValueAndGrad(OurBackend):
    """Without a graph: `value_and_grad`, as the peers give loss and gradient."""

    def __init__(self, backend: str, device: str) -> None:
        super().__init__(backend)
        self.device = device
        self.name, self.title = f"{backend}-value-and-grad", f"maml_fast {backend}, value_and_grad"

    def _run(self, maml: MAML, problem: Problem) -> Callable[[], Any]:
        return lambda: maml.value_and_grad(*problem.episodes)

    def _reader(self, model: nn.Module) -> Callable[[Any], tuple[float, Gradient]]:
        def read(found: Any) -> tuple[float, Gradient]:
            out, gradients = found
            named = {name.removeprefix("model."): g for name, g in gradients.items()}
            return out.loss.item(), named

        return read


class AtPrecision(OurBackend):
    """With less exact float32 products: "high" allows TF32, "medium" bfloat16."""

    device = "cuda"

    def __init__(self, backend: str, precision: str) -> None:
        super().__init__(backend)
        self.precision, self.turn = precision, 2
        self.name = f"{backend}-{precision}"
        self.title = f"maml_fast {backend}, precision {precision}"

    def around(self) -> AbstractContextManager[None]:
        return products(self.precision)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """That precision of torch's float32 products meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
