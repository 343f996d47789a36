"""GPUs: what they reach at best by their makers' data sheets, and what state one is in."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

UNKNOWN = "unknown"
LIMIT_S = 20.0
# What nvidia-smi is asked for, by the names that results have.
QUERIED = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "highest_sm_clock_mhz": "clocks.max.sm",
    "highest_memory_clock_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


class Peak(NamedTuple):
    """Operations a second by the precision of float32 products, dense, and bytes of memory."""

    highest: float  # fused multiply-adds of float32, outside the tensor cores
    high: float  # TF32
    medium: float  # bfloat16
    bytes_per_second: float

    def flops_per_second(self, precision: str) -> float:
        """Of one of torch's names of precisions."""
        return {"highest": self.highest, "high": self.high, "medium": self.medium}[precision]


# By the name that torch gives. Three TF32 products make one that is exact in float32, at a third of
# the TF32 peak, which is more than multiply-adds reach: a share of the floor above 1 is possible.
PEAKS = {
    "NVIDIA H200": Peak(66.9e12, 494.7e12, 989.4e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(66.9e12, 494.7e12, 989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(51.2e12, 378e12, 756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(19.5e12, 156e12, 312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Peak(19.5e12, 156e12, 312e12, 1.555e12),
}


def peak(device: torch.device) -> Peak | None:
    """Of the GPU, or None where it is not in the table."""
    return PEAKS.get(torch.cuda.get_device_name(device))


def state() -> dict[str, str]:
    """Driver, clocks and power of torch's GPU while it works: an idle one lowers its clocks."""
    x = torch.ones(2**24, device="cuda")

    def work() -> None:
        for _ in range(100):
            x.mul_(1.0)
        torch.cuda.synchronize()

    return ask(f"GPU-{torch.cuda.get_device_properties(x.device).uuid}", work)


def ask(gpu: str, meanwhile: Callable[[], None]) -> dict[str, str]:
    """What nvidia-smi says of the GPU; "unknown" is what it does not say, or all if it is missing.

    `meanwhile` is called over and over until it has answered.
    """
    answer = ""
    try:
        with subprocess.Popen(
            [
                "nvidia-smi",
                f"--id={gpu}",
                f"--query-gpu={','.join(QUERIED.values())}",
                "--format=csv,noheader,nounits",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            end = time.monotonic() + LIMIT_S
            while process.poll() is None:
                meanwhile()
                if time.monotonic() > end:
                    process.kill()
            if process.returncode == 0 and process.stdout is not None:
                answer = process.stdout.read()
    except OSError:
        pass
    fields = [field.strip() for field in answer.strip().split(",")]
    if len(fields) != len(QUERIED):
        return dict.fromkeys(QUERIED, UNKNOWN)
    return {
        name: UNKNOWN if not field or field.startswith("[") else field
        for name, field in zip(QUERIED, fields, strict=True)
    }
