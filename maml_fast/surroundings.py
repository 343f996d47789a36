"""What surrounds a call and must not reach into it: modes of torch, and other threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast.plan import PLANNED, Plan

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def using(model: nn.Module, plan: Plan | None = None) -> Iterator[None]:
    """One thread at a time where a backend puts other parameters into the model for a while."""
    if plan is not None and plan.backend in PLANNED:
        yield
        return
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Neither autocast nor inference mode nor a graph: the backends record what they need. Kernels
    are launched on the current device, which is the data's meanwhile."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


def recordable(x: Tensor) -> Tensor:
    """A tensor made in inference mode cannot be recorded by autograd; its copy can."""
    if not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
