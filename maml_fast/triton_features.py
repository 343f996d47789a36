"""Whether Triton's kernels can run: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

INTERPRETER = "TRITON_INTERPRET"


def installed() -> bool:
    """Whether the triton package is there."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are first loaded."""
    return asked_to_interpret() and not loaded_too_early()


def asked_to_interpret() -> bool:
    """Whether the environment asks for the interpreter."""
    if not installed() or not os.environ.get(INTERPRETER):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def loaded_too_early() -> bool:
    """Whether Triton was loaded before it was asked to interpret, and so cannot."""
    import triton
    import triton.language as tl

    return isinstance(tl.sum, triton.JITFunction)


def why_unavailable() -> str:
    """Why backend "triton" can run nothing here and what to do about it; empty if it can."""
    if not installed():
        return "the package triton is not installed (it comes with torch on Linux)"
    if not torch.cuda.is_available() and not interpreted():
        if asked_to_interpret():
            return (
                f"there is no GPU, and {INTERPRETER}=1 came too late: set it before torch or "
                "maml_fast is imported"
            )
        return (
            "there is no GPU; to try its kernels on the CPU, slowly, set the environment variable "
            f"{INTERPRETER}=1 before torch or maml_fast is imported, or take 'cpu' or 'torch'"
        )
    return ""


def why_not_on(device: torch.device) -> str:
    """Why data on this device are not for backend "triton"; empty if they are."""
    if interpreted() and device.type != "cpu":
        return f"the data are on {device}; with {INTERPRETER}=1, kernels take data on the CPU"
    if not interpreted() and device.type != "cuda":
        return f"the data are on {device}; backend 'triton' wants them on a GPU"
    return ""


@dataclass(frozen=True)
class Device:
    """What a plan wants to know of a GPU."""

    name: str
    multiprocessors: int
    cache_bytes: int  # of L2
    clock: float  # Hz


@functools.cache
def device(index: int | None) -> Device:
    """The GPU of that index; where there is none, an H200 to plan for."""
    if interpreted() or not torch.cuda.is_available():
        return Device("H200", 132, 60 << 20, 1.755e9)
    found = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    )
    clock = getattr(found, "clock_rate", 1_755_000) * 1e3
    return Device(found.name, found.multi_processor_count, found.L2_cache_size, clock)
