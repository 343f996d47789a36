"""All tasks at once with `torch.func`, as in functorch's MAML example: eager, or compiled.

Eager, the outer gradient is autograd's `backward` through vmap: `torch.func.grad` would build a
graph for a further derivative and is up to half slower. Compiled, it is the other way round: the
whole meta-gradient as one graph, outer `torch.func.grad` included, is faster than a compiled loss
with a backward pass of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from benchmarks.cases import Case
from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.networks import LOSSES
from benchmarks.problem import Problem, adapting


def meta_loss(case: Case, model: nn.Module) -> Callable[..., Tensor]:
    """Mean query loss of the adapted tasks, as a function of the adapting parameters by name and
    the four tensors.
    """
    loss, rate = LOSSES[case.network.loss], case.network.inner_lr

    def loss_of(theta: Gradient, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, theta, (x,)), y)

    def task_loss(
        theta: Gradient, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        for _ in range(case.S):
            steps = grad(loss_of)(theta, support_x, support_y)
            theta = {name: value - rate * steps[name] for name, value in theta.items()}
        return loss_of(theta, query_x, query_y)

    batched = vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
    return lambda theta, *episodes: batched(theta, *episodes).mean()


class VmapGrad(Implementation):
    name = "vmap"
    title = "vmap(grad)"
    turn = 0

    def prepare(self, problem: Problem) -> MetaStep:
        model = copy.deepcopy(problem.model)
        theta: Gradient = dict(adapting(model))
        mean_loss = meta_loss(problem.case, model)

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = mean_loss(theta, *problem.episodes)
            loss.backward()
            return loss.detach()

        def read(loss: Tensor) -> tuple[float, Gradient]:
            return loss.item(), {
                name: value.grad for name, value in theta.items() if value.grad is not None
            }

        return MetaStep(run, read)


class CompiledVmapGrad(Implementation):
    """The same through `torch.compile`, compiled anew for each case; with CUDA graphs where there
    is a GPU.
    """

    name = "compile"
    title = "torch.compile(vmap(grad))"
    warm = True
    turn = 1
    seconds_a_pass = 12.0

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def release(self) -> None:
        torch._dynamo.reset()  # and with it the memory of CUDA graphs

    def prepare(self, problem: Problem) -> MetaStep:
        torch._dynamo.reset()
        model = copy.deepcopy(problem.model)
        theta = {name: value.detach() for name, value in adapting(model).items()}
        mode = "reduce-overhead" if problem.episodes.support_x.is_cuda else None
        step = torch.compile(
            grad_and_value(meta_loss(problem.case, model)),
            fullgraph=True,
            dynamic=False,
            backend=self.backend,
            mode=mode,
        )

        def run() -> tuple[Gradient, Tensor]:
            return step(theta, *problem.episodes)

        def read(result: tuple[Gradient, Tensor]) -> tuple[float, Gradient]:
            gradient, loss = result
            return loss.item(), gradient

        run()
        return MetaStep(run, read)
