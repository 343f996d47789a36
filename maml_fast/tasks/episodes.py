"""What all task samplers share: a batch of episodes, and a seeded stream that draws them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

EVERY = slice(None)  # task of a batch


class Episodes(NamedTuple):
    """A batch of tasks in the order that `MAML` takes: `maml(*episodes)`.

    T tasks, N support rows and M query rows per task. For regression the points are [T, N, 1] and
    the targets too; for images [T, N, C, H, W], and the targets are the int64 classes [T, N].
    """

    support_x: Tensor  # [T, N, ...]
    support_y: Tensor  # [T, N, ...]
    query_x: Tensor  # [T, M, ...]
    query_y: Tensor  # [T, M, ...]


class TaskStream:
    """A stream of tasks from a generator of its own; torch's global one is not touched.

    Args:
        seed: of the generator, a whole number from 0 to 2^63 - 1.
        device: where the tasks are drawn and stay.
        dtype: a floating type.

    Attributes:
        generator: what the stream draws from.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is wanted.
    """

    def __init__(self, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; wanted is a floating type")
        self.device = torch.device(device)
        self.dtype = dtype
        self.generator = torch.Generator(self.device)
        if whole("seed", seed, least=0) >= 2**63:
            raise ValueError(f"seed is {seed}; wanted is a whole number below 2^63")
        self.generator.manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state: after `load_state_dict` the stream goes on from here."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue another stream; it must have been drawn on the same kind of device."""
        if set(state) != {"generator"}:
            raise ValueError(f"state has the keys {sorted(state)}; wanted is ['generator']")
        found, own = state["generator"], self.generator.get_state()
        if found.dtype != own.dtype or found.shape != own.shape:
            raise ValueError(
                f"state['generator'] is {found.dtype} {list(found.shape)}; wanted is {own.dtype} "
                f"{list(own.shape)}, the state of a generator on {self.device.type}"
            )
        try:
            self.generator.set_state(found)
        except RuntimeError as error:  # of the right size, and still none
            self.generator.set_state(own)
            reason = str(error).partition("\n")[0]
            raise ValueError(f"state['generator'] is no state of a generator: {reason}") from None


def whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value`, which must be a whole number of at least `least` and at most `most`."""
    right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not right or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(
            f"{name} is {value!r}; wanted is a whole number of at least {least}{limit}"
        )
    return value
