"""One task after the other with `torch.autograd`: what most MAML code does.

It is also what errors are measured against.

A task's graph is freed by its own backward pass before the next task begins.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.networks import LOSSES
from benchmarks.problem import Problem, adapting


class AutogradLoop(Implementation):
    name = "loop"
    title = "autograd loop"
    one_by_one = True
    turn = 0

    def prepare(self, problem: Problem) -> MetaStep:
        case, episodes = problem.case, problem.episodes
        model = copy.deepcopy(problem.model)
        loss, rate = LOSSES[case.network.loss], case.network.inner_lr
        theta: dict[str, Tensor] = dict(adapting(model))

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            total = episodes.support_x.new_zeros(())
            for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
                fast = theta
                for _ in range(case.S):
                    support_loss = loss(functional_call(model, fast, (support_x,)), support_y)
                    steps = torch.autograd.grad(
                        support_loss, list(fast.values()), create_graph=True
                    )
                    fast = {
                        name: value - rate * step
                        for (name, value), step in zip(fast.items(), steps, strict=True)
                    }
                query_loss = (
                    loss(functional_call(model, fast, (query_x,)), query_y) / episodes.tasks
                )
                query_loss.backward()
                total += query_loss.detach()
            return total

        def read(total: Tensor) -> tuple[float, Gradient]:
            return total.item(), {
                name: value.grad for name, value in theta.items() if value.grad is not None
            }

        return MetaStep(run, read)
