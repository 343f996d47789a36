"""Where a tensor's numbers lie, for code that reads memory and not tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None, alive: list[Tensor]) -> int:
    """Of numbers without gaps; 0 for no tensor. `alive` keeps what had to be copied."""
    return 0 if tensor is None else without_gaps(tensor, alive).data_ptr()


def without_gaps(tensor: Tensor, alive: list[Tensor]) -> Tensor:
    """The tensor, or a contiguous copy."""
    tensor = in_memory(tensor, alive)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        alive.append(tensor)
    return tensor


def in_memory(tensor: Tensor, alive: list[Tensor]) -> Tensor:
    """The tensor, or a copy where its memory does not hold its numbers: torch may leave a sign, or
    zeros, to be applied later."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
        alive.append(tensor)
    if tensor.data_ptr() == 0 and tensor.numel():
        if not tensor._is_zerotensor():
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} among the data or the model's parameters "
                "has lost its memory; its storage was resized to nothing"
            )
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        alive.append(tensor)
    return tensor
