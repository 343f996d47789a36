"""Processes of torch.distributed as the tests start them: one thread each, and an end."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]


def spawn(function, count, folder, *arguments, seconds=120):
    """`function(rank, folder, *arguments)` in `count` processes of one group; a TimeoutError if
    they do not end in so many seconds."""
    workers = mp.spawn(_member, (count, function, folder, *arguments), nprocs=count, join=False)
    deadline = time.monotonic() + seconds
    while not workers.join(timeout=5):
        if time.monotonic() > deadline:
            for process in workers.processes:
                process.kill()
            raise TimeoutError("the processes did not end")


def _member(rank, count, function, folder, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    function(rank, folder, *arguments)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def torchrun(*arguments, processes=2, restarts=0, seconds=120):
    """torchrun with these arguments, ended."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
