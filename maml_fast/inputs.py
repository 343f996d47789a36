"""The checked door: what a call brings is looked at here, and trusted further in.

T tasks, N support rows, M query rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_fast.errors import UnsupportedModelError
from maml_fast.norm_calls import OwnStatistics
from maml_fast.problem import Loss, TaskBatch

NAMES = TaskBatch._fields[:4]
REGRESSION_LOSSES = ("mse", "bce_with_logits", "huber")


def check_batch(batch: TaskBatch, model_parameter: Tensor | None) -> None:
    """Types, devices, and the counts of tasks and rows. Raises TypeError or ValueError."""
    for name, tensor in zip(NAMES, batch[:4], strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; wanted is a torch.Tensor")
        if tensor.is_nested or tensor.is_meta or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else "quantized"
            raise TypeError(f"{name} is a {kind} tensor; wanted is a plain one")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; wanted is a dense tensor")
        if tensor.is_complex():
            raise TypeError(f"{name} is {tensor.dtype}; complex numbers are not supported")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted is [tasks, rows, ...]")
        if tensor.requires_grad and torch.is_grad_enabled() and name.endswith("_y"):
            raise ValueError(
                f"{name} requires grad, but gradients with respect to targets are not computed; "
                f"pass {name}.detach()"
            )
        if 0 in tensor.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; every task needs at least one row, and a "
                "batch at least one task"
            )
    support_x, support_y, query_x, query_y = batch[:4]
    for name, tensor in zip(NAMES[1:], batch[1:4], strict=True):
        if len(tensor) != len(support_x):
            raise ValueError(
                f"{name} has {len(tensor)} tasks (shape {list(tensor.shape)}); support_x has "
                f"{len(support_x)}"
            )
    _check_like("support_y", support_y, "rows", support_y.shape[1], "support_x", support_x.shape[1])
    _check_like("query_y", query_y, "rows", query_y.shape[1], "query_x", query_x.shape[1])
    for name, tensor, like_name, like in (
        ("query_x", query_x, "support_x", support_x),
        ("query_y", query_y, "support_y", support_y),
    ):
        features, wanted = list(tensor.shape[2:]), list(like.shape[2:])
        _check_like(name, tensor, "features", features, like_name, wanted)
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; {like_name} is {like.dtype}")
    device = support_x.device if model_parameter is None else model_parameter.device
    for name, tensor in zip(NAMES, batch[:4], strict=True):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; the model is on {device}")
    if (
        model_parameter is not None
        and support_x.is_floating_point()
        and support_x.dtype != model_parameter.dtype
    ):
        raise TypeError(f"support_x is {support_x.dtype}; the model is {model_parameter.dtype}")


def _check_like(
    name: str, tensor: Tensor, what: str, found: object, like: str, wanted: object
) -> None:
    if found != wanted:
        raise ValueError(
            f"{name} has {what} {found} (shape {list(tensor.shape)}); {like} has {what} {wanted}"
        )


def check_query(query_x: Tensor, support_x: Tensor) -> None:
    """Whether query_x [T, M, ...] suits models that were adapted to support_x [T, N, ...]."""
    if not isinstance(query_x, Tensor):
        raise TypeError(f"query_x is {type(query_x).__name__}; wanted is a torch.Tensor")
    tasks, features = len(support_x), list(support_x.shape[2:])
    if query_x.dim() < 2 or 0 in query_x.shape or len(query_x) != tasks:
        raise ValueError(
            f"query_x has shape {list(query_x.shape)}; wanted is [{tasks} tasks, rows, ...], as "
            "support_x had, with at least one row"
        )
    _check_like("query_x", query_x, "features", list(query_x.shape[2:]), "support_x", features)
    if query_x.dtype != support_x.dtype:
        raise TypeError(f"query_x is {query_x.dtype}; support_x was {support_x.dtype}")
    if query_x.device != support_x.device:
        raise ValueError(f"query_x is on {query_x.device}; support_x was on {support_x.device}")


def probe(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The model's prediction for one task's rows, [N, ...] -> [N, ...], on copies of its buffers.

    Raises ValueError or TypeError naming `name` where the model cannot take these rows, and
    UnsupportedModelError where it calls a norm that reads running statistics.
    """
    state = {key: value.detach().clone() for key, value in model.named_buffers()}
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            with OwnStatistics():
                output = functional_call(model, state, (x.clone(),))  # in-place layers write to it
        except UnsupportedModelError:
            raise
        except Exception as error:  # the model's own code: anything may come
            kind = TypeError if not x.is_floating_point() else ValueError
            raise kind(
                f"{name} has rows of shape {list(x.shape[1:])} and type {x.dtype}, which "
                f"{type(model).__name__} cannot take: {error}"
            ) from error
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model returns {type(output).__name__} for {name}; wanted is one tensor [rows, ...]"
        )
    if output.dim() == 0 or len(output) != len(x):
        raise ValueError(
            f"model returns shape {list(output.shape)} for {len(x)} rows of {name}; wanted is "
            "[rows, ...]"
        )
    return output


def check_targets(name: str, y: Tensor, output: Tensor, loss: Loss) -> None:
    """Whether targets [T, N, ...] suit the loss and a prediction [N, ...] of one task."""
    if loss == "cross_entropy":
        if y.dtype != torch.int64:
            raise TypeError(f"{name} is {y.dtype}; loss 'cross_entropy' wants torch.int64 classes")
        if output.dim() != 2:
            raise ValueError(
                f"model returns rows of shape {list(output.shape[1:])}; loss 'cross_entropy' wants "
                "[rows, classes]"
            )
        if y.dim() != 2:
            raise ValueError(
                f"{name} has shape {list(y.shape)}; loss 'cross_entropy' wants [tasks, rows]"
            )
    elif loss in REGRESSION_LOSSES:
        if y.dtype != output.dtype:
            raise TypeError(f"{name} is {y.dtype}; loss {loss!r} wants {output.dtype} targets")
        if y.shape[2:] != output.shape[1:]:
            raise ValueError(
                f"{name} has rows of shape {list(y.shape[2:])}; the model's prediction has "
                f"{list(output.shape[1:])}, and loss {loss!r} wants the same"
            )


def check_classes(batch: TaskBatch, classes: int) -> None:
    """Class numbers are 0 to classes - 1."""
    bounds = [bound for y in (batch.support_y, batch.query_y) for bound in torch.aminmax(y)]
    lows_and_highs = torch.stack(bounds).tolist()  # one wait for the device
    for i, name in enumerate(("support_y", "query_y")):
        low, high = lows_and_highs[2 * i : 2 * i + 2]
        if low < 0 or high >= classes:
            raise ValueError(
                f"{name} has class numbers from {low} to {high}; the model has {classes} classes, "
                f"so wanted is 0 to {classes - 1}"
            )


def check_row_weights(name: str, weight: object, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [T, rows] of a batch's rows in the model's dtype: bool or floating, none below 0, and
    in each task some row above. Raises TypeError or ValueError."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is {type(weight).__name__}; wanted is a torch.Tensor or None")
    if weight.shape != x.shape[:2]:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}; wanted is {list(x.shape[:2])}, tasks and rows"
        )
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}; the rows are on {x.device}")
    if weight.dtype != torch.bool and not weight.is_floating_point():
        raise TypeError(f"{name} is {weight.dtype}; wanted is bool or a floating type")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and no gradient is computed for it; detach it")
    weight = weight.to(dtype)
    if not bool((weight.sum(1).isfinite() & (weight >= 0).all(1)).all()):
        raise ValueError(
            f"{name} holds a negative, infinite or NaN weight, or more than {dtype} can add up; "
            "wanted are 0 or more"
        )
    empty = (weight == 0).all(1).nonzero().flatten().tolist()
    if empty:
        shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        raise ValueError(
            f"{name} is 0 in all rows of task {shown}; wanted is at least one row above 0 in each "
            "task, or leave the task out"
        )
    return weight
