"""`torch.ops.maml_fast.meta_step`: the meta-step as one operation that torch.compile leaves whole.

Inside a compiled function `MAML` calls this operation. It looks at nothing while torch traces; when
it runs, it does all that `MAML` does elsewhere, checks included.

T tasks, N support rows, M query rows, S inner steps.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

_NUMBERS = itertools.count()
_MODULES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Module(Protocol):
    """What the operation asks of a `MAML`."""

    model: nn.Module

    def run_whole(self, *batch: Tensor, gradient: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Loss, task losses, support losses and query outputs; gradients of `inputs`."""

    def inputs(self) -> list[Tensor]:
        """The parameters and rates that get a gradient."""


def number_of(module: Any) -> int:
    """A number by which the operation finds the module as long as it lives. Tensors and numbers are
    all that an operation takes, and torch.compile makes sure that a number is the one it traced."""
    number = next(_NUMBERS)
    _MODULES[number] = module
    return number


@torch.library.custom_op("maml_fast::meta_step", mutates_args=())
def meta_step(
    inputs: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    module: int,
    inner_steps: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss [], task losses [T], support losses [T, S], query outputs [T, M, ...], and, if
    `gradient`, the gradient of the loss for each of `inputs`, which are `MAML.inputs()`.
    inner_steps: those of the module, so that a compiled caller notices if they change."""
    results, gradients = _MODULES[module].run_whole(
        support_x, support_y, query_x, query_y, gradient=gradient
    )
    loss, task_losses, support_losses, outputs = map(_own, results)
    return loss, task_losses, support_losses, outputs, [_own(tensor) for tensor in gradients]


def _own(tensor: Tensor) -> Tensor:
    """A copy without gaps, as the fake results are."""
    return tensor.clone(memory_format=torch.contiguous_format)


@meta_step.register_fake
def _(
    inputs: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    module: int,
    inner_steps: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    maml = _MODULES[module]
    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for name, tensor in itertools.chain(
            maml.model.named_parameters(), maml.model.named_buffers()
        )
    }
    with torch.no_grad():
        row = functional_call(maml.model, state, (torch.empty_like(query_x[0]),))
    tasks = len(support_x)
    return (
        row.new_empty(()),
        row.new_empty(tasks),
        row.new_empty(tasks, inner_steps),
        row.new_empty(tasks, *row.shape),
        [tensor.new_empty(tensor.shape) for tensor in inputs] if gradient else [],
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:4], *output[4])
    ctx.save_for_backward(*output[4])
    ctx.count = len(inputs[0])


@once_differentiable
def _scale(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = [gradient * d_loss for gradient in ctx.saved_tensors] or [None] * ctx.count
    return gradients, None, None, None, None, None, None, None


meta_step.register_autograd(_scale, setup_context=_keep)
