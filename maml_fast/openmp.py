"""The OpenMP that torch computes with, so that backend "cpu" can run on its threads.

Threads of its own would compete with torch's, which spin for milliseconds after each operation.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def parallel_entry() -> int:
    """The address of GOMP_parallel in the GNU OpenMP that torch has loaded; 0 where that is not
    what torch uses, or cannot be told."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return 0
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
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
