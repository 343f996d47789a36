"""Whether the C++ extension ``maml_fast._cpu`` is there or why not, and what this CPU can run."""

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from maml_fast import openmp
from maml_fast.errors import UnavailableBackendError

FORCED = "MAML_FAST_INSTRUCTION_SET"


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why."""
    try:
        return importlib.import_module("maml_fast._cpu"), ""
    except ModuleNotFoundError as error:
        if error.name != "maml_fast._cpu":
            return None, f"it was built, but does not load: {error}"
    except ImportError as error:  # built for another system, or a library it needs is missing
        return None, f"it was built, but does not load: {error}"
    return None, f"it was not built: {_reason_left_by_the_build()}"


def _reason_left_by_the_build() -> str:
    # An editable install has two folders: the checkout and the one that CMake installs to.
    for folder in importlib.import_module("maml_fast").__path__:
        note = Path(folder) / "_cpu_missing.txt"
        if note.is_file():
            return note.read_text(encoding="utf-8").strip()
    return "most likely no C++ compiler was found when maml_fast was installed"


def available() -> bool:
    """Whether ``maml_fast._cpu`` can be imported."""
    return _load()[0] is not None


def instruction_sets() -> list[str]:
    """The instruction sets of this processor, from lowest to highest; empty without the extension.

    "baseline", then of "avx2" (with FMA), "avx512" (F, BW, DQ and VL) and "neon" those it has.
    """
    extension, _ = _load()
    return [] if extension is None else list(extension.instruction_sets())


def why_missing() -> str:
    """Why ``maml_fast._cpu`` is not there and what to do, for an error message; empty if it is."""
    extension, reason = _load()
    if extension is not None:
        return ""
    return (
        f"the C++ extension maml_fast._cpu is missing: {reason}. Install a C++17 compiler (GCC, "
        "Clang or MSVC) and Python's headers, then install maml_fast again with pip's options "
        "--no-cache-dir --force-reinstall --no-deps."
    )


@functools.cache
def extension() -> Any:
    """``maml_fast._cpu``, on torch's threads where it can; UnavailableBackendError where it is
    missing, with what to do."""
    found, _ = _load()
    if found is None:
        raise UnavailableBackendError(why_missing())
    found.share_openmp(openmp.parallel_entry())
    return found


@functools.cache
def engines() -> dict[str, int]:
    """The instruction sets that backend "cpu" can use here, from lowest to highest, each with the
    bytes of its vectors; empty without the extension."""
    found, _ = _load()
    return {} if found is None else dict(found.engines())


def instruction_set() -> str:
    """The one that backend "cpu" uses: the highest, or what MAML_FAST_INSTRUCTION_SET names.

    Raises ValueError where that is none of `engines`.
    """
    known = list(engines())
    forced = os.environ.get(FORCED)
    if not forced:
        return known[-1]
    if forced not in known:
        raise ValueError(f"{FORCED} is {forced!r}; wanted is one of {known}")
    return forced
