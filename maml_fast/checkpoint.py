"""Checkpoints: one safetensors file, written whole or not at all, read with suspicion.

The file's one metadata entry, "maml_fast", is JSON: format version, configuration, iteration, the
data's classes where there are such, and a digest over those and every tensor. Nothing is pickled,
so reading a stranger's file runs no code. The same state gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT_VERSION = 1
ENTRY = "maml_fast"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


class DamagedError(CheckpointError):
    """There is no whole checkpoint at that place: the file is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `iteration` meta-steps.

    Tensors are grouped by owner, as {"model": {"0.weight": ...}, "optimizer": {...}, ...}. `data`
    says what data the run has, in plain values; empty where it makes its own.
    """

    config: dict[str, Any]
    iteration: int
    groups: dict[str, dict[str, Tensor]]
    data: dict[str, Any] = field(default_factory=dict)

    def group(self, name: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One owner's tensors, whose names, shapes and dtypes must be those of `wanted`."""
        found = self.groups.get(name, {})
        kinds = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}
        for key in sorted(wanted.keys() | found.keys()):
            kind = (wanted[key].dtype, tuple(wanted[key].shape)) if key in wanted else None
            if kinds.get(key) != kind:
                raise ValueError(
                    f"{name}/{key} is {_kind(kinds.get(key))}; wanted is {_kind(kind)}"
                )
        return found


def save_checkpoint(path: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
    """Write the checkpoint; on any error what was at `path` before is still there. Else that is at
    `previous` from then on, if given.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    tensors = {
        # A copy of its own for each: safetensors refuses tensors that share memory.
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, members in checkpoint.groups.items()
        for name, tensor in members.items()
    }
    entry = {
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config,
        "iteration": checkpoint.iteration,
    }
    if checkpoint.data:
        entry["data"] = checkpoint.data
    entry["digest"] = _digest(entry, tensors)
    data = safetensors.torch.save(tensors, {ENTRY: json.dumps(entry, sort_keys=True)})
    write_atomically(path, data, previous)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, all of it, onto the CPU.

    Raises:
        DamagedError: there is none at `path`, or it is damaged. The file is only read.
        CheckpointError: it is of another program or of a newer format.
    """
    try:
        if not path.is_file():
            raise DamagedError(f"{path}: no such checkpoint")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged, or no safetensors file ({error})") from None
    except RuntimeError as error:  # of torch, which finds no tensor of such a shape
        text = str(error).partition("\n")[0]
        raise DamagedError(f"{path}: damaged: a tensor cannot be had ({text})") from None
    if ENTRY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file of another program, not a checkpoint")
    entry = _description(path, metadata[ENTRY])
    digest = entry.pop("digest")
    if digest != _digest(entry, tensors):
        raise DamagedError(f"{path}: damaged: its contents do not match its digest")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return Checkpoint(entry["config"], entry["iteration"], groups, entry.get("data", {}))


def _description(path: Path, text: str) -> dict[str, Any]:
    """What a file says of itself, each part of its type; a CheckpointError where it is none."""
    unreadable = DamagedError(f"{path}: damaged: its description cannot be read")
    try:
        entry = json.loads(text)
        json.dumps(entry)  # as its digest will: what is nested too deeply
    except (ValueError, RecursionError):
        raise unreadable from None
    if not isinstance(entry, dict) or type(entry.get("format_version")) is not int:
        raise unreadable
    if entry["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has checkpoint format {entry['format_version']}, and this maml_fast knows "
            f"only up to {FORMAT_VERSION}: use a newer maml_fast"
        )
    parts = {"digest": str, "config": dict, "iteration": int}
    if any(type(entry.get(name)) is not wanted for name, wanted in parts.items()):
        raise unreadable
    if entry["iteration"] < 0 or not isinstance(entry.get("data", {}), dict):
        raise unreadable
    return entry


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Replace the file at `path` by `data`: after a crash it is the old one or the new, whole. The
    old one is kept as `previous`, if that is given.

    Raises:
        OSError: naming `path`, where the file before still is.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            keep_as(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, nor need it be
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on disk only with its folder
        finally:
            os.close(folder)


def keep_as(path: Path, name: Path) -> None:
    """Have the file at `path` at `name` too, instead of what is there; it is not written again,
    but where the file system has no links.

    Raises:
        OSError: naming the file that could not be written.
    """
    temporary = _temporary(name)
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except FileNotFoundError:
        raise
    except OSError:
        write_atomically(name, path.read_bytes())
        return
    try:
        os.replace(temporary, name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from None
    finally:
        # If both were the same file already, `replace` does nothing, and leaves this name.
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Where a writer that is killed leaves its work: `run_files.RunFiles.sweep` knows the form."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _digest(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kind(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {list(kind[1])}"
