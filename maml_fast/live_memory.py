"""How many bytes of tensors a call keeps alive at most, and whose they are."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Within, the bytes of all tensors that torch's operations make, as long as they live.

    peak: the most there were at once.
    at_peak: {owner: bytes} then; `owner` says whose a tensor is when it is made.
    """

    def __init__(self, owner: Callable[[], Any]) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak: dict[Any, int] = {}
        self._owner = owner
        self._now: Counter[Any] = Counter()
        self._total = 0
        self._known: dict[int, weakref.finalize[..., Any]] = {}  # by address, while they live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = set(map(_address, pytree.tree_leaves(args)))
        result = func(*args, **(kwargs or {}))
        for found in pytree.tree_leaves(result):
            address = _address(found)
            if address and address not in self._known and address not in before:  # not a view
                self._note(address, found.untyped_storage())
        return result

    def _note(self, address: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        owner = self._owner()
        ending = weakref.finalize(storage, self._forget, address, owner, size)
        ending.atexit = False
        self._known[address] = ending
        self._now[owner] += size
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self._now)

    def _forget(self, address: int, owner: Any, size: int) -> None:
        self._known.pop(address, None)
        self._now[owner] -= size
        self._total -= size


def _address(x: object) -> int:
    """Where a tensor's memory begins; 0 of what has none, as the zeros of forward mode."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x._is_zerotensor():
        return 0
    return x.untyped_storage().data_ptr()
