"""What the numbers were measured with: versions, commit, processor, threads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu

PACKAGES = (
    "maml_fast",
    "torch",
    "triton",
    "numpy",
    "jax",
    "jaxlib",
    "parallel-metalearn",
    "pytest-benchmark",
)
# Instruction sets that decide how fast float32 arithmetic can be.
FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "amx_bf16",
    "asimd",
    "sve",
    "sve2",
)
CPUINFO = Path("/proc/cpuinfo")


def describe(device: str) -> dict[str, Any]:
    """All of it, ready for JSON; to be called before the run, for the load that others cause."""
    found: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in _flags()],
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "cuda": torch.version.cuda,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "peak": peak._asdict() if (peak := gpu.peak(torch.device("cuda"))) else None,
            "before": gpu.state(),
        }
    return found


def save(folder: Path, described: dict[str, Any], **figures: Any) -> Path:
    """Write figures, and what they were measured with, as JSON named by device and day."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{described['device']}-{described['date'][:10]}.json"
    path.write_text(json.dumps({"machine": described, **figures}, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit measured, "+" if files have changed since; "unknown" outside a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_field(name: str) -> str:
    if not CPUINFO.exists():
        return ""
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _flags() -> set[str]:
    return set((_cpu_field("flags") or _cpu_field("Features")).split())
