"""When and where a run was begun and gone on with: a JSON line for each start, for its report."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from maml_fast.checkpoint import write_atomically


def record_start(path: Path, iteration: int, device: str) -> None:
    """Add a line to the file at `path`.

    Raises:
        OSError: naming the file, which is then as it was.
    """
    start = {
        "iteration": iteration,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "maml_fast": version("maml_fast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    lines = [json.dumps(line) + "\n" for line in [*read_starts(path), start]]
    write_atomically(path, "".join(lines).encode())


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; none where it is missing, and without those that are no such lines."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            start = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(start, dict):
            found.append(start)
    return found


def _hardware(device: str) -> str:
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if kind == "cpu" else kind
