"""A meta-step that comes again with data of the same shapes, replayed as a CUDA graph.

Launching a kernel takes the host longer than a small kernel runs; a graph launches all of them at
once. The first call runs as it is, which compiles and tunes the kernels; the second is captured,
reading its data from tensors that stay; from then on data are copied there and the graph replayed.
Results are copied out, so they are the caller's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maml_fast.problem import TaskBatch

Launch = Callable[[TaskBatch], Sequence[Tensor]]

GRAPHS_KEPT = 4  # of one meta-step: for as many sets of parameters
SEEN_KEPT = 16


class Graphs:
    """The captured launches of one prepared meta-step. Callers take turns."""

    def __init__(self, allowed: bool = True) -> None:
        self.allowed = allowed
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._captured: OrderedDict[object, Captured] = OrderedDict()

    def run(self, key: object | None, batch: TaskBatch, launch: Launch) -> Sequence[Tensor]:
        """The results of `launch(batch)`. It must do the same for all data of these shapes while
        the key is the same; None: it may not be captured."""
        if not self._can_capture(key, batch):
            return launch(batch)
        key = key, tuple((t.shape, t.dtype, t.device) for t in batch)
        captured = self._captured.pop(key, None)
        if captured is None:
            if key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > SEEN_KEPT:
                    self._seen.popitem(last=False)
                return launch(batch)
            captured = Captured(batch, launch)
        self._captured[key] = captured  # the latest last
        if len(self._captured) > GRAPHS_KEPT:
            self._captured.popitem(last=False)
        return captured.replay(batch)

    def _can_capture(self, key: object | None, batch: TaskBatch) -> bool:
        return (
            self.allowed
            and key is not None
            and batch.support_x.device.type == "cuda"
            and not torch.cuda.is_current_stream_capturing()  # the caller's own graph has it then
        )


class Captured:
    """One graph, with the tensors that its data come in and its results go out by."""

    def __init__(self, batch: TaskBatch, launch: Launch) -> None:
        self.batch = TaskBatch(*(t.clone(memory_format=torch.contiguous_format) for t in batch))
        self.graph = torch.cuda.CUDAGraph()
        self.free = torch.cuda.Event()  # once the results of the latest replay were copied out
        device = batch.support_x.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                launch(self.batch)  # libraries set up on this stream what may not be captured
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.results = launch(self.batch)
            self.free.record()

    def replay(self, batch: TaskBatch) -> list[Tensor]:
        with torch.cuda.device(batch.support_x.device):
            torch.cuda.current_stream().wait_event(self.free)  # this call's stream may be another
            torch._foreach_copy_(list(self.batch), list(batch))
            self.graph.replay()
            results = [tensor.clone() for tensor in self.results]
            self.free.record()
        return results
