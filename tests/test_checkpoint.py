"""Checkpoints: nothing is lost, nothing is half written, and nothing damaged is believed."""

import errno
import json
import os
import re

import pytest
import safetensors.torch
import torch

from maml_fast.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)


def example(iteration=7):
    generator = torch.Generator().manual_seed(iteration)
    flat = torch.randn(12, generator=generator)
    return Checkpoint(
        config={"tasks": 25, "inner_lr": 0.01, "output": "runs/é"},
        iteration=iteration,
        groups={
            # Views of one tensor, one of them transposed: neither may upset the file.
            "model": {"0.weight": flat[:6].view(2, 3).t(), "0.bias": flat[6:8]},
            "optimizer": {"step": torch.tensor(float(iteration))},
            "tasks": {"generator": torch.arange(5, dtype=torch.uint8)},
            "moments": {"a": torch.randn(3, generator=generator, dtype=torch.float64)},
        },
    )


def assert_same(found, wanted):
    assert found.config == wanted.config
    assert found.iteration == wanted.iteration
    assert found.groups.keys() == wanted.groups.keys()
    for group, members in wanted.groups.items():
        assert found.groups[group].keys() == members.keys()
        for name, tensor in members.items():
            assert found.groups[group][name].dtype == tensor.dtype
            assert torch.equal(found.groups[group][name], tensor)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, example())
    assert_same(load_checkpoint(path), example())
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, example())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_safetensors_reader_opens_it(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, example())
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["model/0.bias"], example().groups["model"]["0.bias"])
    with safetensors.safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["maml_fast"])
    assert entry["format_version"] == 1
    assert entry["iteration"] == 7
    assert entry["config"]["inner_lr"] == 0.01


def refusal(path):
    """The message with which the file is refused; it names the file, which stays as it is."""
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    assert path.read_bytes() == before
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, example())
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refusal(path)


def test_a_changed_byte_is_refused_wherever_it_is(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, example())
    sound = path.read_bytes()
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # padding of the header, which means nothing
            assert sound[position : position + 1] == b" "
            assert_same(found, example())


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint at all\n", b"PK\x03\x04" + bytes(200), bytes(64)]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert "damaged, or no safetensors file" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_programs_safetensors_file_is_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata)
    assert "a safetensors file of another program" in refusal(path)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    entry = {"format_version": 2, "something": "new"}
    safetensors.torch.save_file({}, path, {"maml_fast": json.dumps(entry)})
    assert "has checkpoint format 2, and this maml_fast knows only up to 1" in refusal(path)


@pytest.mark.parametrize("entry", ["", "{", "[]", "3", "{}", '{"format_version": "one"}'])
def test_a_broken_description_is_refused(tmp_path, entry):
    path = tmp_path / "checkpoint.safetensors"
    safetensors.torch.save_file({}, path, {"maml_fast": entry})
    assert "its description cannot be read" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: no such checkpoint"):
            load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, example(7))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        save_checkpoint(path, example(8))
    monkeypatch.undo()
    assert_same(load_checkpoint(path), example(7))
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the last one is the folder's
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_group_is_checked_against_what_is_wanted():
    checkpoint = example()
    wanted = {"0.weight": torch.empty(3, 2), "0.bias": torch.empty(2)}
    assert checkpoint.group("model", wanted).keys() == wanted.keys()
    with pytest.raises(ValueError, match=r"model/0.weight is torch.float32 \[3, 2\]; wanted is "):
        checkpoint.group("model", wanted | {"0.weight": torch.empty(4, 2)})
    with pytest.raises(ValueError, match=r"model/1.weight is missing; wanted is torch.float32"):
        checkpoint.group("model", wanted | {"1.weight": torch.empty(4)})
    with pytest.raises(ValueError, match=r"model/0.bias is torch.float32 \[2\]; wanted is missing"):
        checkpoint.group("model", {"0.weight": torch.empty(3, 2)})
