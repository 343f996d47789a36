"""What a kernel is launched with, said without data: enough to compile it where no GPU is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel with all that its machine code depends on.

    name         unique; findings and their bounds go by it
    kernel       the function that triton.jit gave
    signature    the type of each argument: "*fp32", "i32", "constexpr", ...; "i32:16" is an
                 integer known to be a multiple of 16. Pointers are aligned to 16 bytes, as torch's
                 are. An argument that constants names may be left out
    constants    the values of the arguments that are constexpr; tuples may be nested
    num_warps, num_stages, grid
                 as at the launch; the grid is none of the machine code's business
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    grid: tuple[int, ...] = ()
