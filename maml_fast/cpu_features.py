"""Whether the C++ extension ``maml_fast._cpu`` is there or why not, and what this CPU can run."""

import importlib
from pathlib import Path
from types import ModuleType


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
