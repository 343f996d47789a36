"""The meta-step as autograd sees it: its gradient is known when its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from maml_fast.problem import FlatGradients, Outcome

# An outcome, the gradients of parameters by name, and those of what else the loss depends on
Found = tuple[Outcome, Mapping[str, Tensor], list[Tensor]]


class MetaStep(torch.autograd.Function):
    """The loss as a function of parameters and rates; its gradient is known when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[], Found],
        reduction: str,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        outcome, found, rates = run()
        if isinstance(found, FlatGradients):
            ctx.like = found.like
            ctx.save_for_backward(found.flat, *rates)
        else:
            ctx.like = None
            ctx.save_for_backward(*found.values(), *rates)
        rest = (outcome.task_losses, outcome.support_losses, outcome.query_outputs)
        ctx.mark_non_differentiable(*rest)
        return reduce(outcome.counted_losses, reduction), *rest

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be lost in silence
            raise RuntimeError("the meta-gradient of MAML cannot be differentiated once more")
        scaled = [gradient * d_loss for gradient in ctx.saved_tensors]
        if ctx.like is not None:
            scaled[:1] = torch._C._nn.unflatten_dense_tensors(scaled[0], ctx.like)
        return None, None, *scaled


def reduce(task_losses: Tensor, reduction: str) -> Tensor:
    """Over tasks: "mean" or "sum"."""
    return task_losses.mean() if reduction == "mean" else task_losses.sum()
