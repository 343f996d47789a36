"""Peak memory of one meta-step: on a CPU in a process of its own, on a GPU as allocators count it.

As a program, on a CPU: `python -m benchmarks.memory CASE IMPLEMENTATION`.

The order: load the data; run the implementation on two tasks, so that libraries are loaded; prepare
the case (where torch compiles it, this runs it once); give free memory back; note the memory in
use; one meta-step; the peak of the resident set above that. On a GPU it is the first meta-step of
the run itself, and libraries have their memory since the right answer was computed. Where the peak
cannot be taken the answer is the reason.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc keeps what was freed unless told otherwise, which would hide a peak below an earlier one.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
FEW_TASKS = 2
MARK = "peak memory: "


@dataclass(frozen=True)
class Peak:
    """Bytes above what was in use before, or None with the reason; died: the process was killed."""

    bytes: int | None
    reason: str = ""
    died: bool = False


def measure(case: str, implementation: str, limit_s: float) -> Peak:
    """Take the peak in a child process."""
    command = [sys.executable, "-m", "benchmarks.memory", case, implementation]
    root = str(Path(__file__).resolve().parent.parent)
    try:
        child = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Peak(None, f"not within {limit_s:.0f} s")
    answers = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and answers:
        return Peak(**json.loads(answers[-1].removeprefix(MARK)))
    if child.returncode < 0:
        return Peak(
            None, f"killed by signal {-child.returncode} while its memory was measured", died=True
        )
    return Peak(None, (child.stderr.strip().splitlines() or ["no answer"])[-1])


def main(case_name: str, name: str) -> Peak:
    """The child's work."""
    import torch

    from benchmarks.cases import named
    from benchmarks.problem import load
    from benchmarks.registry import implementation

    measured = implementation(name)
    problem = load(named(case_name), torch.device("cpu"))
    with measured.around():
        if not measured.warm:
            measured.prepare(problem.first(FEW_TASKS)).run()
        step = measured.prepare(problem)
        gc.collect()
        return resident(step.run)


def resident(run: Callable[[], Any]) -> Peak:
    """Of one call in this process, which was started with ENVIRONMENT."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR.write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
    except OSError as error:
        return Peak(None, f"the system does not tell ({error.strerror})")
    del result
    return Peak(max(0, peak - before))


def on_gpu(run: Callable[[], Any], name: str) -> tuple[Any, Peak]:
    """One meta-step's result, and its peak."""
    if name == "jax":
        return _by_jax(run)
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, Peak(max(0, torch.cuda.max_memory_allocated() - before))


def _by_jax(run: Callable[[], Any]) -> tuple[Any, Peak]:
    """jax counts from when it started and cannot be told to start again."""
    import jax

    gpu = jax.devices("gpu")[0]
    before = gpu.memory_stats()
    result = run()
    after = gpu.memory_stats()
    if not before or not after:
        return result, Peak(None, "jax does not tell")
    peak = after["peak_bytes_in_use"]
    if peak <= before["peak_bytes_in_use"]:
        return result, Peak(None, "jax had used more before, while it compiled")
    return result, Peak(max(0, peak - before["bytes_in_use"]))


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    answer = main(*sys.argv[1:])
    print(MARK + json.dumps({"bytes": answer.bytes, "reason": answer.reason}))
