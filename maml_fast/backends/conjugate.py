"""Conjugate gradients of many tasks at once. Dictionaries are {name: [T, *shape]}."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vectors = dict[str, Tensor]


def conjugate_gradients(
    times: Callable[[Vectors], Vectors], b: Vectors, iterations: int, tolerance: float
) -> tuple[Vectors, Tensor]:
    """x of A x = b for each task's symmetric A, and the residuals |b - A x| / |b| [T].

    A task that has come within the tolerance, or whose A turns out not to be positive along the
    direction searched, stays as it is. One whose b is not finite has an x of NaN.
    """
    rest, along = dict(b), dict(b)
    squares = start = _inner(rest, rest)  # [T]
    nowhere = torch.where(start.isfinite(), 0.0, torch.nan)
    x = {name: _of_tasks(nowhere, part).expand_as(part) for name, part in b.items()}
    open_tasks = squares > 0
    for _ in range(iterations):
        open_tasks = open_tasks & (squares > tolerance**2 * start)
        if not open_tasks.any():
            break
        product = times(along)
        curvature = _inner(along, product)
        open_tasks = open_tasks & (curvature > 0)
        step = torch.where(open_tasks, squares / torch.where(open_tasks, curvature, 1), 0)
        x = _plus(x, along, step)
        rest = _plus(rest, product, -step)
        now = torch.where(open_tasks, _inner(rest, rest), squares)
        turned = torch.where(open_tasks, now / torch.where(open_tasks, squares, 1), 0)
        along, squares = _plus(rest, along, turned), now
    return x, (squares / torch.where(start > 0, start, 1)).sqrt()


def _inner(a: Vectors, b: Vectors) -> Tensor:
    """[T]"""
    return torch.stack([(a[name] * b[name]).flatten(1).sum(1) for name in a]).sum(0)


def _plus(a: Vectors, b: Vectors, scale: Tensor) -> Vectors:
    """a + scale b, of each task by its own"""
    return {name: part + _of_tasks(scale, part) * b[name] for name, part in a.items()}


def _of_tasks(values: Tensor, like: Tensor) -> Tensor:
    """[T], as [T, 1, ...] beside a tensor [T, *shape]"""
    return values.view(-1, *(1,) * (like.dim() - 1))
