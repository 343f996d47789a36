"""The figures of a run as TensorBoard event files, beside its history."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from maml_fast.config import ConfigError
from maml_fast.progress import naming

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Raise a ConfigError where the package that writes event files is missing."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is true, but the package tensorboard is missing; try: "
            'pip install "maml_fast[tensorboard]"'
        )


class EventFiles:
    """Scalars by the names that they have in the history; nothing at all where not `wanted`.

    Each start of a run writes a file of its own, and tells the reader to forget what others have
    behind `iteration`, where a run that was killed had been already.
    """

    def __init__(self, folder: Path, iteration: int, wanted: bool) -> None:
        self._folder, self._iteration, self._wanted = folder, iteration, wanted
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> EventFiles:
        if self._wanted:
            from torch.utils.tensorboard import SummaryWriter

            with naming(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=self._iteration + 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()

    def append(self, iteration: int, **figures: float) -> None:
        """Add a point to the curve of each figure."""
        if self._writer is not None:
            with naming(self._folder):
                for name, value in figures.items():
                    self._writer.add_scalar(name, value, iteration)

    def sync(self) -> None:
        """Have every point in the file: those before a checkpoint are not written again."""
        if self._writer is not None:
            with naming(self._folder):
                self._writer.flush()
