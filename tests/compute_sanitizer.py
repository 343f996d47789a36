"""Some tests of the kernels under NVIDIA's compute-sanitizer: `python -m tests.compute_sanitizer`.

memcheck finds accesses outside of tensors, racecheck those of shared memory without a barrier
between them. It is also a plugin of pytest for these runs, in which nothing becomes a CUDA graph:
each tensor has memory of its own from CUDA, or what lies beside one would be another, and such
memory cannot be had while a graph is captured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("memcheck", "racecheck")
FOUND, INTERRUPTED = 77, 2  # exit statuses: of the sanitizer that found something, of pytest
# Kernels one by one, then whole steps in the fused kernel and in those of layers
TESTS = [
    *(f"tests/test_{name}.py" for name in ("matmul", "attend", "losses_triton", "norm_triton")),
    "tests/test_conv_triton.py",
    *("tests/test_triton.py::test_rows", "tests/test_triton.py::test_widths"),
    "tests/test_triton_layers.py",
]


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    """Every launch as it is; measured tiles too."""
    from maml_fast.backends.cuda_graphs import Graphs

    monkeypatch.setattr(Graphs, "run", lambda self, key, batch, launch, *reads: launch(batch))


def find() -> str | None:
    """Where the sanitizer is: on the path, or where CUDA is installed."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(sanitizer: str, tool: str, seconds: int, arguments: list[str]) -> list[str]:
    """Ends in time: an interrupt has pytest, and then the sanitizer, say what was found so far."""
    return [
        *("timeout", "--signal=INT", "--kill-after=30", "--preserve-status", str(seconds)),
        *(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--launch-timeout", "0"),
        *("--target-processes", "all", "--report-api-errors", "no"),  # torch asks and is refused
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *("-p", "tests.compute_sanitizer", *TESTS, *arguments),
    ]


def main() -> int:
    """Run all tools; 1 where one found something, or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=150, help="of each tool")
    options, arguments = parser.parse_known_args()
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer is not here: nothing was checked. It comes with the CUDA toolkit.")
        return 0
    failed = 0
    for tool in TOOLS:
        line = command(sanitizer, tool, options.seconds, arguments)
        status = subprocess.run(line, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if status.returncode == INTERRUPTED:
            print(f"{tool}: the time is up, with nothing found so far")
        elif status.returncode:
            print(f"{tool}: failed with status {status.returncode}")
            failed = 1
        else:
            print(f"{tool}: nothing found")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
