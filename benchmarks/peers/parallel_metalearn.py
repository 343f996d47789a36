"""The parallel-metalearn package: its MAML with its vmap engine, all tasks in one chunk.

Its meta-step ends in the optimiser's; the optimiser given to it here does nothing, so that what is
timed is the loss and the gradient. It ships cross entropy only; mean squared error is a subclass of
its `BaseLoss`, as it asks users to write. Its models take keyword arguments (`training`,
`num_step`), hence the two small wrappers.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.problem import Problem


class ParallelMetalearn(Implementation):
    name = "parallel-metalearn"
    title = "parallel-metalearn"

    def cannot(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("metalearn") is None:
            return "parallel-metalearn is not installed"
        return None

    def prepare(self, problem: Problem) -> MetaStep:
        from metalearn.algorithms import MAML
        from metalearn.inner_optimizers import InnerSGD
        from metalearn.model_wrappers import MAML_Model

        case, episodes = problem.case, problem.episodes
        layers = copy.deepcopy(problem.model)
        model = MAML_Model(backbone=_Body(layers), head=_Head())
        maml = MAML(
            model=model,
            optimizer=_NoOuterStep(model.parameters(), {}),
            inner_optimizer=InnerSGD(
                model.get_fast_weights(), inner_lr=case.network.inner_lr, learn_lr=False
            ),
            support_loss_fn=_loss(case.network.loss),
            inner_steps=case.S,
            chunk_size=episodes.tasks,
            device=episodes.support_x.device,
        )
        targets = [{"labels": y} for y in (episodes.support_y, episodes.query_y)]
        batch = (episodes.support_x, targets[0], episodes.query_x, targets[1])

        def run() -> float:
            loss, _ = maml.step(iter([batch]), training=True)
            return loss

        def read(loss: float) -> tuple[float, Gradient]:
            return loss, {
                name: value.grad
                for name, value in layers.named_parameters()
                if value.grad is not None
            }

        return MetaStep(run, read)


class _Body(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.layers(x)


class _Head(nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


class _NoOuterStep(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:
        return None


def _loss(name: str) -> nn.Module:
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.loss.base import BaseLoss

    class MeanSquaredError(BaseLoss):
        def forward(
            self,
            out_dict: dict[str, Tensor],
            targets: dict[str, Tensor],
            model_states: Any = None,
            **_: Any,
        ) -> tuple[Tensor, Tensor]:
            loss = F.mse_loss(out_dict["logits"], targets["labels"])
            return loss, loss.detach()  # its metric is the loss

    return {"mse": MeanSquaredError, "cross_entropy": lambda: CrossEntropy(CategoricalAccuracy())}[
        name
    ]()
