"""The quickest of a few ways to launch a kernel: measured once, remembered on disk.

The file is `tiles.json` in the folder that MAML_FAST_CACHE_DIR names, or else in the user's cache
folder. A file that cannot be read or written costs measuring again, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "MAML_FAST_CACHE_DIR"
ROUNDS = 7
AGREEMENT = 1e-2  # of results, relative: a ReLU may switch, a wrong kernel shows

_remembered: dict[str, str] = {}


def quickest(
    key: str,
    candidates: Sequence[Any],
    run: Callable[[Any], Tensor],
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> Any:
    """The candidate that runs quickest, of those that give the first one's result.

    key: all that the answer depends on. seconds: measures a call; None: with the GPU's clock.
    """
    by_name = {repr(candidate): candidate for candidate in candidates}
    key = f"{key} {sorted(by_name)} {_versions()}"
    name = _remembered.get(key) or _read().get(key)
    if name not in by_name:
        wanted = run(candidates[0])
        times = {}
        for name, candidate in by_name.items():
            try:
                if _agrees(run(candidate), wanted):
                    times[name] = (seconds or _on_gpu)(lambda c=candidate: run(c))  # type: ignore[misc]
            except (RuntimeError, ValueError):
                if candidate is candidates[0]:
                    raise
                continue  # more registers or shared memory than this GPU has
        name = min(times, key=times.__getitem__) if times else repr(candidates[0])
        _write(key, name)
    _remembered[key] = name
    return by_name[name]


def _agrees(found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.double().norm().item()
    return bool((found.double() - wanted.double()).norm().item() <= AGREEMENT * scale)


def _on_gpu(call: Callable[[], object]) -> float:
    """Seconds, the median of several."""
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def _versions() -> str:
    import triton

    return f"triton {triton.__version__} torch {torch.__version__}"


def path() -> Path:
    """Where choices are remembered."""
    folder = os.environ.get(FOLDER)
    if folder:
        return Path(folder) / "tiles.json"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "maml_fast" / "tiles.json"


def _read() -> dict[str, str]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, name: str) -> None:
    """Another process may do the same: the file changes as a whole, or not."""
    with contextlib.suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path().parent, delete=False, encoding="utf-8"
        ) as file:
            json.dump(_read() | {key: name}, file, indent=0)
        os.replace(file.name, path())
