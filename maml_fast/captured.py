"""A training step on a GPU, sampling and optimiser included, replayed as one CUDA graph.

Where a step's kernels are short the host takes longer to launch them than they run. A graph is
launched at once, without Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

FIRST_STEPS = 3  # run as they are: kernels are compiled, tiles measured, the optimiser's state made


class CapturedStep:
    """Calls `work`, which does a whole step on a device; from the fourth call on as a graph.

    work: takes whether it may look at what it computed, which waits for the device and cannot be
        captured; not to look, it must do the same each time, on tensors that stay where they are.
    generators: that it draws from. A replay moves them on as the step would.
    allowed: False: it is never captured.

    A step that cannot be captured is run as it is from then on, with a warning.
    """

    def __init__(
        self, work: Callable[[bool], None], generators: Sequence[torch.Generator], allowed: bool
    ) -> None:
        self._work, self._generators, self._allowed = work, list(generators), allowed
        self._done = 0
        self._replay: Callable[[], None] | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph by now."""
        return self._replay is not None

    def __call__(self) -> None:
        if self._allowed and self._done == FIRST_STEPS and self._replay is None:
            self._replay = self._capture()
        if self._replay is not None:
            self._replay()
            return
        self._work(True)
        self._done += 1

    def _capture(self) -> Callable[[], None] | None:
        states = [generator.get_state() for generator in self._generators]
        try:
            return record(lambda: self._work(False), self._generators)
        except RuntimeError as error:
            self._allowed = False
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            reason = str(error).partition("\n")[0]
            warnings.warn(
                "the training step could not be captured as a CUDA graph and is launched kernel by "
                f"kernel: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
            return None


def record(work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """A graph of the work, which is not done yet; what is returned does it."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
