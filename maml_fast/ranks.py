"""The processes that train one run together: whose tasks are whose, and what they tell each other.

torchrun starts them, and torch.distributed connects them: gloo for what is on CPUs, nccl for what
is on GPUs. Every rank draws the numbers of all tasks and takes a share of the tasks; one collective
an iteration sums the gradients, and carries what else all must know. So the ranks' parameters stay
the same bits, without being sent.

What torchrun says of itself is in the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT, TORCHELASTIC_USE_AGENT_STORE.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maml_fast.checkpoint import write_atomically
from maml_fast.config import ConfigError, check_device
from maml_fast.errors import NonFiniteError
from maml_fast.tasks.episodes import EVERY

# How long a rank waits for the others. Longer than loading data, validating or writing takes one of
# them while the others wait; a process that dies is noticed at once, without it.
PATIENCE = timedelta(minutes=10)
STORE_PATIENCE = timedelta(minutes=1)  # for torchrun's own store, which is there before any rank
# Numbers behind the gradient in the one collective: sum of the losses, tasks, ranks asked to stop
EXTRA = 3
LAUNCH = "launch.json"

T = TypeVar("T")


class RankError(ConnectionError):
    """Another rank has ended, or does not answer, or has another state than this one."""


class Stop(Protocol):
    """What asks to stop: `signal` is the number of the signal that did, or 0."""

    signal: int


class Ranks:
    """This process among those that train together; by itself it is the only one.

    rank: of this process, from 0; count: of processes; local: rank among those of this machine.
    launch: names the launch of torchrun, the same after restarts; None without torchrun.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, local: int = 0, launch: str | None = None
    ) -> None:
        self.rank, self.count, self.local, self.launch = rank, count, local, launch
        self._asked: Stop | None = None
        self._agreed = 0

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of that name; of several processes on "cuda", each has its own.

        Raises:
            ConfigError: there is none for this process.
        """
        found = check_device(name)
        if self.count == 1 or found.type == "cpu":
            return found
        if name != "cuda":
            raise ConfigError(
                f"device is {name!r}, and there are {self.count} processes; wanted is 'cpu' or "
                "'cuda', of which each process takes its own"
            )
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"device is 'cuda', of which this machine has {torch.cuda.device_count()}, and "
                f"process {self.local + 1} on it has none left; start fewer with --nproc-per-node"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def share(self, tasks: int) -> slice:
        """The tasks of this rank: shares differ by one task at most, and may be empty."""
        if self.count == 1:
            return EVERY
        return slice(self.rank * tasks // self.count, (self.rank + 1) * tasks // self.count)

    def combine(self, gradient: Tensor, loss: Tensor | None, tasks: int) -> tuple[Tensor, int]:
        """The mean loss of all ranks' tasks, and their number; in place, the gradient becomes that
        of it.

        The one collective of an iteration. It also tells whether a rank was asked to stop: then
        all stop after this iteration.

        gradient: [P + EXTRA], of this rank's mean loss, and room for what else is told.
        loss: this rank's mean loss, over so many `tasks`; None where it has none.

        Raises:
            NonFiniteError: there is no task, as all were left out.
        """
        if self.count == 1:
            assert loss is not None
            return loss, tasks
        own, rest = gradient[:-EXTRA], gradient[-EXTRA:]
        own.mul_(tasks)
        rest.zero_()
        if loss is not None:
            torch.mul(loss, tasks, out=rest[0])
        rest[1] = tasks
        if self._asked is not None and self._asked.signal:
            rest[2] = 1
        with self._together():
            dist.all_reduce(gradient)
        total, stop = rest[1:].tolist()
        if stop:
            self._agreed = (self._asked.signal if self._asked else 0) or signal.SIGTERM
        if not total:
            raise NonFiniteError(f"{self}: a loss or gradient of every task is not finite", [])
        own.div_(total)
        return rest[0] / total, int(total)

    def watch(self, stop: Stop) -> Callable[[], int]:
        """What says by which signal all ranks are to stop, or 0; `stop` asks this one.

        Among several, that is what they agreed on in the last iteration: a rank that left the loop
        by itself would leave the others waiting.
        """
        self._asked = stop
        return (lambda: stop.signal) if self.count == 1 else (lambda: self._agreed)

    def of_first(self, function: Callable[[], T]) -> T:
        """What the function returns on the first rank; the others do not call it."""
        if self.count == 1:
            return function()
        found: list[T | None] = [function() if self.first else None]
        with self._together():
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]  # type: ignore[return-value]

    def check_same(self, what: str, content: bytes) -> None:
        """Raise a RankError on all ranks where they do not have the same content."""
        if self.count == 1:
            return
        digest = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        both = torch.tensor([digest, -digest])
        with self._together():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        largest, smallest = both[0].item(), -both[1].item()
        if largest != smallest:
            raise RankError(f"{self}: the ranks do not have the same {what}")

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            with self._together():
                dist.all_reduce(torch.zeros(()))

    def explained(self, error: NonFiniteError, tasks: int) -> NonFiniteError:
        """The error with the tasks' places among those of all ranks."""
        if self.count == 1:
            return error
        start = self.share(tasks).start
        place = [start + task for task in error.tasks]
        among = f", of all {tasks} tasks: {', '.join(map(str, place))}" if place else ""
        return NonFiniteError(f"{self}: {error}{among}", place)

    def began(self, folder: Path) -> bool:
        """Whether the run in the folder was begun by this launch of torchrun, before a restart."""
        try:
            found = json.loads((folder / LAUNCH).read_text(encoding="utf-8"))["launch"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.launch is not None and found == self.launch

    def mark(self, folder: Path) -> None:
        """Write which launch begins the run in the folder, for `began`."""
        if self.launch is None:
            (folder / LAUNCH).unlink(missing_ok=True)
        else:
            write_atomically(folder / LAUNCH, json.dumps({"launch": self.launch}).encode())

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # Of gloo's lines the middle: "[file:line] reason. advice"
            reason = str(error).partition("\n")[0].partition(". ")[0].rpartition(".cc:")[2]
            reason = reason.partition("] ")[2] or reason
            raise RankError(
                f"{self}: another rank has ended, or did not answer in "
                f"{PATIENCE.total_seconds():.0f} s; its own message says why ({reason})"
            ) from None


ALONE = Ranks()


def label() -> str:
    """What a message of this process begins with, "rank 1: "; "" for the first and for the only."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" or os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {rank}: "


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Within, the process is connected with those that torchrun started along with it, if any did.

    device: name of what is computed on. A process group that is there already is used, and left.

    Raises:
        ConfigError: the environment names ranks but is not whole.
        RankError: the others did not come.
    """
    if not dist.is_available():  # some builds of torch have no torch.distributed
        yield ALONE
        return
    if dist.is_initialized():
        rank, count = dist.get_rank(), dist.get_world_size()
        yield Ranks(rank, count, _number("LOCAL_RANK", rank))
        return
    count = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    if not 0 <= rank < count:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {count}; wanted is what torchrun sets")
    if count == 1:
        ranks = Ranks()
        with ranks._together():
            ranks.launch = _launch(_agent_store())
        yield ranks
        return
    ranks = Ranks(rank, count, _number("LOCAL_RANK", rank))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    with ranks._together():
        store = _agent_store()
        if store is None:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            # The agent's store outlives a restart, and in it the addresses of ranks that are dead:
            # each attempt has names of its own.
            own = dist.PrefixStore(  # type: ignore[attr-defined]
                f"maml_fast/{_number('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
            dist.init_process_group(
                backend, timeout=PATIENCE, store=own, rank=rank, world_size=count
            )
    ranks.launch = _launch(store)
    try:
        yield ranks
    except BaseException:
        # Gloo's closed connections end the others. Of nccl a pending collective would be waited
        # for; there the end of the process does it.
        if backend == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _agent_store() -> Any:
    """The store of torchrun itself; None where there is no torchrun, or it keeps none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    try:
        host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", None)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; wanted is what torchrun sets") from None
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}; wanted is a port, as torchrun sets it")
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, timeout=STORE_PATIENCE
    )


def _launch(store: Any) -> str | None:
    """A name for this launch of torchrun: the first that one of its processes thought of. Without
    its store the id that the user gave it, or may have given to an earlier one too."""
    if store is None:
        name = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return None if name in ("", "none") else name  # "none" is torchrun's own word for no id
    found: bytes = store.compare_set("maml_fast/launch", "", uuid.uuid4().hex)
    return found.decode()


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; wanted is the number that torchrun sets") from None
