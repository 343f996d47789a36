"""The OpenMP that torch computes with, so that backend "cpu" can run on its threads.

Threads of its own would compete with torch's, which spin for milliseconds after each operation.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

IMPORTED_IN = os.getpid()


def parallel_entry() -> int:
    """The address of GOMP_parallel in the GNU OpenMP that torch has loaded; 0 where that is not
    what torch uses, or cannot be told, or in the child of a fork, which OpenMP does not survive."""
    if os.getpid() != IMPORTED_IN:
        return 0
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return 0
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = {Path(path).name for path in loaded}
    if any(name.startswith(("libiomp", "libomp")) for name in names):
        return 0  # torch may use that one, and the GNU library be another package's
    found = {path for path in loaded if Path(path).name.startswith("libgomp")}
    beside_torch = {
        path for path in found if Path(torch.__file__).parent.parent in Path(path).parents
    }
    chosen = beside_torch or found
    if len(chosen) != 1:
        return 0
    try:
        entry = ctypes.CDLL(chosen.pop()).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
