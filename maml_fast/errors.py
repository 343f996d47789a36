"""The errors that maml_fast raises beside plain ValueError and TypeError.

Every message names the argument or layer, what was found, and what is wanted.
"""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A backend cannot run this model; the message names the layer and the reason."""


class UnavailableBackendError(ValueError):
    """A backend that this installation lacks was asked for; the message says how to get it."""


class NonFiniteError(FloatingPointError, ValueError):
    """A loss or meta-gradient came out as NaN or infinity; `tasks` says from which tasks."""

    def __init__(self, message: str, tasks: list[int]) -> None:
        super().__init__(message)
        self.tasks = tasks


class NonFiniteWarning(UserWarning):
    """Tasks were left out of a meta-step whose loss or gradient came out as NaN or infinity."""


class MemoryWarning(UserWarning):
    """A device ran out of memory; the meta-step goes on with fewer tasks a pass."""


class DataError(ValueError):
    """Data cannot be used; the message names the file or class, what was found and wanted."""
