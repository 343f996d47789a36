"""What can go wrong with a run's folder: full disks, damage, two trainers, no permission."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from maml_fast.checkpoint import (
    CheckpointError,
    DamagedError,
    keep_as,
    load_checkpoint,
    write_atomically,
)
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.progress import History
from maml_fast.run_files import FolderInUseError, RunFiles
from maml_fast.run_images import ImageRun
from maml_fast.train import train
from tests.command import error, run
from tests.image_runs import folder_run
from tests.test_train_images_resume import improving


@pytest.fixture
def config(tmp_path):
    return SinusoidConfig(
        iterations=8,
        tasks=2,
        shots=3,
        query_shots=3,
        hidden=(4,),
        threads=1,
        log_every=1,
        checkpoint_every=3,
        output=tmp_path / "run",
    )


def in_python(program, *arguments):
    """A program of its own: its exit status, standard output and error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


# --- the checkpoint before the newest


def test_the_checkpoint_before_the_newest_is_kept(config):
    files = RunFiles(config.output)
    train(config)
    assert load_checkpoint(files.checkpoint).iteration == 8
    assert load_checkpoint(files.previous).iteration == 6
    train(config, resume=True)  # at its end already: the same is no predecessor
    assert load_checkpoint(files.previous).iteration == 6


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(config, capsys, damage):
    wanted = train(config).checkpoint.read_bytes()
    files = RunFiles(config.output)
    history = files.history.read_bytes()
    if damage == "missing":
        files.checkpoint.unlink()
    else:
        bad = (
            wanted[:-1] if damage == "cut" else wanted[:-9] + bytes([wanted[-9] ^ 4]) + wanted[-8:]
        )
        files.checkpoint.write_bytes(bad)
    says = (
        rf"{files.checkpoint}: (damaged|no such).*; the one before it, "
        r"checkpoint.previous.safetensors of iteration 6, is sound: go on from that with --resume "
        r"--previous"
    )
    with pytest.raises(DamagedError, match=says):
        train(config, resume=True)
    capsys.readouterr()
    assert run("train", "sinusoid", "--resume", "--output", config.output) == 2
    assert re.search(says, error(capsys))
    assert run("train", "sinusoid", "--resume", "--previous", "--output", config.output) == 0
    assert files.checkpoint.read_bytes() == wanted
    assert files.history.read_bytes() == history


def test_going_back_that_fails_leaves_the_newest_where_it_is(tmp_path, config):
    files = RunFiles(config.output)
    train(config)
    newest, before = files.checkpoint.read_bytes(), files.previous.read_bytes()
    files.history.write_bytes(b"rubbish\n" + files.history.read_bytes())
    with pytest.raises(ValueError, match="line 1 is no loss record"):
        train(config, resume=True, previous=True)
    assert files.checkpoint.read_bytes() == newest
    assert files.previous.read_bytes() == before


def test_going_back_without_the_best_of_then_leaves_the_newest_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageRun, "validate", improving)
    config = dataclasses.replace(
        folder_run(tmp_path), iterations=4, checkpoint_every=1, validate_every=2
    )
    train(config)
    files = RunFiles(config.output)
    newest = files.checkpoint.read_bytes()
    files.best_previous.unlink()
    with pytest.raises(CheckpointError, match="has the best at iteration 2"):
        train(config, resume=True, previous=True)
    assert files.checkpoint.read_bytes() == newest


def test_a_folder_that_cannot_be_resumed_is_not_said_to_be(config):
    files = RunFiles(config.output)
    train(config)
    with pytest.raises(ConfigError, match="exists already; --resume goes on.*, --overwrite"):
        train(config)
    for path in (files.checkpoint, files.previous):
        path.unlink()
    with pytest.raises(ConfigError, match="exists already; --overwrite deletes it$"):
        train(config)


def test_where_both_are_damaged_no_way_on_is_promised(config):
    files = RunFiles(config.output)
    train(config)
    for path in (files.checkpoint, files.previous):
        path.write_bytes(b"")
    for previous, path in ((False, files.checkpoint), (True, files.previous)):
        with pytest.raises(DamagedError, match=rf"^{path}: damaged[^;]*$"):
            train(config, resume=True, previous=previous)


def test_previous_is_of_resuming_only(config):
    with pytest.raises(ConfigError, match="previous is set without resume"):
        train(config, previous=True)
    assert not config.output.exists()


@pytest.mark.parametrize("stop", [1, 3, 5])  # the one before tells of no best, of one, of another
def test_the_best_checkpoint_goes_back_with_the_previous_one(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(ImageRun, "validate", improving)
    whole = dataclasses.replace(folder_run(tmp_path), checkpoint_every=1, validate_every=2)
    train(whole)
    parts = dataclasses.replace(whole, output=tmp_path / "parts")
    train(dataclasses.replace(parts, iterations=stop + 1))  # with a new best at its end
    files = RunFiles(parts.output)
    assert load_checkpoint(files.best).iteration == stop + 1
    files.checkpoint.write_bytes(b"damaged")
    result = train(parts, resume=True, previous=True)
    assert result.best is not None
    assert result.best.iteration == 6
    assert files.history.read_bytes() == (whole.output / "history.jsonl").read_bytes()
    assert load_checkpoint(files.best).iteration == 6


def test_a_file_gets_a_second_name_without_a_second_write(tmp_path, monkeypatch):
    path, name = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"content")
    for _ in range(2):  # the second time both are one file already
        keep_as(path, name)
        assert os.path.samefile(path, name)
    write_atomically(path, b"new", previous=name)
    assert (path.read_bytes(), name.read_bytes()) == (b"new", b"content")

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # a file system that has none
    write_atomically(path, b"newer", previous=name)
    assert (path.read_bytes(), name.read_bytes()) == (b"newer", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


# --- full disks


@pytest.mark.parametrize("act", ["fsync", "replace", "link"])
def test_a_full_disk_leaves_the_run_as_it_was(config, monkeypatch, act):
    train(dataclasses.replace(config, iterations=4))
    files = RunFiles(config.output)
    before = {path: path.read_bytes() for path in (files.checkpoint, files.previous)}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if act == "link":
            patch.setattr(Path, "read_bytes", full)  # nor can it be copied
        patch.setattr(os, act, full)
        with pytest.raises(OSError, match=r"No space left on device") as found:
            train(config, resume=True)
    if act != "link":
        assert str(config.output) in str(found.value)
    assert {path: path.read_bytes() for path in before} == before
    assert train(config, resume=True).iteration == 8
    assert not list(config.output.glob(".*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"old")
    (tmp_path / f".checkpoint.safetensors.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_atomically(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    history = tmp_path / "history.jsonl"
    history.symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{history}'"),
        History(history) as lines,
    ):
        lines.append(1, loss=1.0)


def test_a_file_that_may_not_grow(config):
    """A real limit of the system: the history is cut in the middle of a line, the run told of."""
    program = """
import resource, sys
from maml_fast.cli import main
flags = "train sinusoid --resume --checkpoint-every 1000 --output".split()
for limit, iterations in zip(sys.argv[2::2], sys.argv[3::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    print(main([*flags, sys.argv[1], "--iterations", iterations]))
"""
    size = train(dataclasses.replace(config, iterations=2)).checkpoint.stat().st_size
    files = RunFiles(config.output)
    limits = 2 * size, 2000, size - 1, 4
    _, printed, errors = in_python(program, config.output, *limits)
    assert printed.split() == ["2", "2"], errors
    assert "Traceback" not in errors
    for path in (files.history, files.checkpoint):
        assert f"File too large: '{path}'" in errors
    assert load_checkpoint(files.checkpoint).iteration == 2
    wanted = dataclasses.replace(config, output=config.output.parent / "whole")
    train(wanted)
    train(config, resume=True)
    assert files.history.read_bytes() == RunFiles(wanted.output).history.read_bytes()


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
def test_a_folder_that_may_not_be_written():
    program = """
import os, sys
from maml_fast.cli import main
if os.getuid() == 0:
    os.setuid(65534)
print(main(["train", "sinusoid", "--iterations", "1", "--threads", "1", "--output", sys.argv[1]]))
print(main(["train", "sinusoid", "--iterations", "1", "--threads", "1", "--output", sys.argv[2]]))
"""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "run")
        there.mkdir()
        os.chmod(there, 0o555)
        os.chmod(folder, 0o555)
        _, printed, errors = in_python(program, there, Path(folder, "new"))
        assert printed.split() == ["2", "2"], errors
        assert f"Permission denied: '{there}/run.lock'" in errors
        assert f"Permission denied: '{folder}/new'" in errors
        assert list(there.iterdir()) == []
        os.chmod(folder, 0o755)


# --- two trainers


HOLDER = """
import sys
from pathlib import Path
from maml_fast.run_files import RunFiles
with RunFiles(Path(sys.argv[1])).locked(print):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_trainer_is_kept_out_while_the_first_lives(config, capsys):
    checkpoint = train(config).checkpoint
    before = checkpoint.read_bytes()
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, config.output],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdout.readline() == "locked\n"
        message = rf"^output: {config.output} is in use by process {first.pid}, which trains in it"
        capsys.readouterr()
        for start in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FolderInUseError, match=message):
                train(config, **start)
            flags = [f"--{name}" for name in start]
            assert run("train", "sinusoid", *flags, "--threads", 1, "--output", config.output) == 2
            assert f"is in use by process {first.pid}" in error(capsys)
        assert checkpoint.read_bytes() == before
        first.kill()  # SIGKILL: the lock goes with it
    assert train(config, resume=True).iteration == 8


def test_two_threads_of_a_process_are_two_trainers(config):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with RunFiles(config.output).locked(print):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(60)
        with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()}"):
            train(config)
    finally:
        leave.set()
        thread.join()
    assert train(config).iteration == 8


def test_a_file_system_without_locks_is_told_of(config, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("maml_fast.run_files.FileLock.acquire", refuse)
    lines = []
    assert train(config, announce=lines.append).iteration == 8
    assert lines == [f"{config.output} cannot be locked: see to it that one process trains in it"]


def test_what_killed_writers_left_is_removed_and_nothing_else(config):
    train(config)
    ours = [".checkpoint.safetensors.12.tmp", ".best.previous.safetensors.7.tmp"]
    others = [".notes.12.tmp", "checkpoint.safetensors.12.tmp", ".checkpoint.safetensors.tmp"]
    for name in ours + others:
        (config.output / name).write_bytes(b"half")
    train(config, resume=True)
    left = {path.name for path in config.output.iterdir()}
    assert not left & set(ours)
    assert set(others) <= left


def test_overwriting_leaves_nothing_of_the_run_before(config):
    train(config)
    (config.output / "plot.png").write_bytes(b"mine")
    train(dataclasses.replace(config, iterations=0), overwrite=True)
    assert {path.name for path in config.output.iterdir()} == {
        *("checkpoint.safetensors", "history.jsonl", "plot.png", "run.lock", "starts.jsonl"),
    }
    assert RunFiles(config.output).history.read_bytes() == b""


def test_another_error_of_a_checkpoint_says_nothing_of_the_one_before(config):
    train(config)
    other = dataclasses.replace(config, seed=4)
    with pytest.raises((ConfigError, CheckpointError)) as found:
        train(other, resume=True)
    assert "previous" not in str(found.value)
