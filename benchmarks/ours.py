"""maml_fast's own backends, as a user calls them: forward, then `loss.backward()`."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.problem import Problem
from maml_fast import MAML, UnavailableBackendError, UnsupportedModelError


class OurBackend(Implementation):
    ours = True

    def __init__(self, backend: str) -> None:
        self.name = backend
        self.title = f"maml_fast {backend}"

    def cannot(self, problem: Problem) -> str | None:
        try:
            maml = self._maml(problem, problem.model)
            maml.plan(problem.episodes.support_x, problem.episodes.query_x)
        except (UnavailableBackendError, UnsupportedModelError) as error:
            return str(error)
        return None

    def prepare(self, problem: Problem) -> MetaStep:
        model = copy.deepcopy(problem.model)
        maml = self._maml(problem, model)

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = maml(*problem.episodes).loss
            loss.backward()
            return loss.detach()

        def read(loss: Tensor) -> tuple[float, Gradient]:
            return loss.item(), {
                name: value.grad
                for name, value in model.named_parameters()
                if value.grad is not None
            }

        return MetaStep(run, read)

    def _maml(self, problem: Problem, model: nn.Module) -> MAML:
        network = problem.case.network
        return MAML(
            model,
            loss=network.loss,
            inner_lr=network.inner_lr,
            inner_steps=problem.case.S,
            backend=self.name,
        )
