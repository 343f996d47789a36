"""A meta-step that comes again with data of the same shapes, replayed as a CUDA graph.

Launching a kernel takes the host longer than a small kernel runs; a graph launches all of them at
once. The first call runs as it is, which compiles the kernels; the second is captured, reading its
data from tensors that stay; from then on data are copied there and the graph replayed. Results are
copied out, so they are the caller's own. All graphs of a device work in the same memory, one after
the other.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maml_fast.problem import TaskBatch

Launch = Callable[[TaskBatch], Sequence[Tensor]]

GRAPHS_KEPT = 4  # of one meta-step: for as many sets of parameters
KEYS_KEPT = 64
# A capture fails if another thread captures; replays take turns in the same memory.
_LOCK = threading.RLock()


class Graphs:
    """The captured launches of one prepared meta-step."""

    def __init__(self, allowed: bool = True) -> None:
        self.allowed = allowed
        self._captured: OrderedDict[object, Captured] = OrderedDict()
        # Keys that came before; whether their graph had to make room for others
        self._seen: OrderedDict[object, bool] = OrderedDict()

    def run(
        self,
        key: object | None,
        batch: TaskBatch,
        launch: Launch,
        reads: Callable[[], object] = lambda: None,
    ) -> Sequence[Tensor]:
        """The results of `launch(batch)`. It must do the same for all data of these shapes while
        the key is the same; None: it may not be captured. The current device is the data's.

        reads: gives what a captured launch reads beside its data and that its caller may let go of
        before the graph: the graph knows addresses, and keeps nothing alive.
        """
        if not self.allowed or key is None or not on_gpu(batch):
            return launch(batch)
        with _LOCK:
            captured = self._captured_for(key, batch, launch, reads)
            if captured is not None:
                return captured.replay(batch)
        return launch(batch)

    def _captured_for(
        self, key: object, batch: TaskBatch, launch: Launch, reads: Callable[[], object]
    ) -> Captured | None:
        key = key, tuple((t.shape, t.dtype, t.device) for t in batch.tensors)
        captured = self._captured.pop(key, None)
        if captured is None:
            made_room = self._seen.pop(key, None)
            self._seen[key] = bool(made_room)
            if len(self._seen) > KEYS_KEPT:
                self._seen.popitem(last=False)
            if made_room is None or made_room:  # else keys in turn would be captured at every call
                return None
            try:
                captured = Captured(batch, launch)
            except RuntimeError as error:  # no memory, or something that cannot be captured
                self.allowed = False
                warnings.warn(
                    "a meta-step could not be captured as a CUDA graph and is launched kernel by "
                    f"kernel from now on: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            captured.alive = reads()
        self._captured[key] = captured  # the latest last
        if len(self._captured) > GRAPHS_KEPT:
            oldest, _ = self._captured.popitem(last=False)
            self._seen[oldest] = True
        return captured


def on_gpu(batch: TaskBatch) -> bool:
    return batch.support_x.device.type == "cuda"


@functools.cache
def _shared(device: int) -> tuple[Any, torch.cuda.Event]:
    """The memory of a device's graphs, and when the latest replay's results were copied out."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Event()


class Captured:
    """One graph, with the tensors that its data come in and its results go out by."""

    alive: object = None  # what it reads beside them

    def __init__(self, batch: TaskBatch, launch: Launch) -> None:
        pool, self.free = _shared(torch.cuda.current_device())
        self.batch = batch.map(lambda t: t.clone(memory_format=torch.contiguous_format))
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(self.free)
        with torch.cuda.stream(stream):
            launch(self.batch)  # libraries set up on this stream what may not be captured
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self.results = launch(self.batch)

    def replay(self, batch: TaskBatch) -> list[Tensor]:
        torch.cuda.current_stream().wait_event(self.free)  # this call's stream may be another
        torch._foreach_copy_(self.batch.tensors, batch.tensors)
        self.graph.replay()
        results = [tensor.clone() for tensor in self.results]
        self.free.record()
        return results
