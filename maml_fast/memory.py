"""Memory: how much is at hand, and errors that tell of too little."""

from __future__ import annotations

import re

import torch


def at_hand(device: torch.device) -> int:
    """Bytes of a GPU that this process can still have: free ones, and those that torch's allocator
    keeps for it and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


def refused_bytes(error: BaseException) -> int | None:
    """Of an error that tells of too little memory, how many bytes were asked for at once, 0 where
    it does not say; None of any other error.

    On a CPU torch raises a plain RuntimeError, known by its text alone.
    """
    asked = re.search(r"you tried to allocate (\d+) bytes", " ".join(str(error).split()))
    if isinstance(error, RuntimeError) and asked:
        return int(asked[1])
    return 0 if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else None
