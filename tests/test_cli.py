"""The command line: options and where they come from, messages, exit statuses, signals."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from maml_fast.checkpoint import load_checkpoint
from tests.command import config_of, error, run

SMALL = "--iterations 4 --tasks 2 --shots 3 --hidden 4 4 --threads 1"


def train(output, *arguments):
    return run("train", "sinusoid", "--output", output, *arguments)


def test_training_says_where_the_checkpoint_is_and_how_to_evaluate_it(output, capsys):
    assert train(output, *SMALL.split()) == 0
    checkpoint = output / "checkpoint.safetensors"
    assert load_checkpoint(checkpoint).iteration == 4
    printed = capsys.readouterr().out.splitlines()
    line = rf"trained 4 iterations, loss \d+\.\d{{4}}, saved in {checkpoint}"
    assert re.fullmatch(line, printed[0])
    assert printed[1] == f"evaluate with: maml-fast evaluate {checkpoint}"
    assert len(printed) == 2


def test_every_option_reaches_the_configuration(output):
    flags = (
        "--iterations 3 --tasks 2 --shots 4 --query-shots 5 --inner-lr 0.02 --inner-steps 2 "
        "--first-order --learn-inner-lr --meta-lr 0.003 --clip-gradient 0.5 --clip-norm 0.25 "
        "--on-nonfinite skip --hidden 7 6 5 --activation tanh --seed 9 --backend reference "
        "--device cpu --threads 1 --checkpoint-every 2 --log-every 1 --quiet --tensorboard"
    )
    assert train(output, *flags.split()) == 0
    assert config_of(output) == {
        "kind": "sinusoid",
        "iterations": 3,
        "tasks": 2,
        "shots": 4,
        "query_shots": 5,
        "inner_lr": 0.02,
        "inner_steps": 2,
        "first_order": True,
        "learn_inner_lr": True,
        "meta_lr": 0.003,
        "clip_gradient": 0.5,
        "clip_norm": 0.25,
        "on_nonfinite": "skip",
        "method": "maml",
        "context_size": None,
        "hidden": [7, 6, 5],
        "activation": "tanh",
        "seed": 9,
        "backend": "reference",
        "device": "cpu",
        "threads": 1,
        "checkpoint_every": 2,
        "log_every": 1,
        "output": str(output),
        "tensorboard": True,
        "quiet": True,
    }


def test_flags_beat_the_file_and_the_file_beats_the_defaults(output, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "iterations = 3\ntasks = 2\nhidden = [4, 5]\nfirst_order = true\nmeta_lr = 1\n"
        f'learn_inner_lr = true\nthreads = 1\noutput = "{output}"\n'
    )
    flags = ["--tasks", "3", "--no-first-order", "--hidden", "6"]
    assert run("train", "sinusoid", "--config", file, *flags) == 0
    config = config_of(output)
    assert (config["iterations"], config["learn_inner_lr"], config["meta_lr"]) == (3, True, 1)
    assert (config["tasks"], config["first_order"], config["hidden"]) == (3, False, [6])
    assert (config["shots"], config["inner_lr"]) == (10, 0.01)


def test_resuming_takes_the_options_of_the_run(output, capsys):
    assert train(output, *SMALL.split(), "--seed", "5") == 0
    assert train(output, "--resume", "--iterations", "6") == 0
    checkpoint = load_checkpoint(output / "checkpoint.safetensors")
    assert checkpoint.iteration == 6
    assert (checkpoint.config["seed"], checkpoint.config["hidden"]) == (5, [4, 4])
    capsys.readouterr()
    assert train(output, "--resume", "--iterations", "8", "--shots", "5") == 2
    assert "shots is 5, but the run to resume has 3" in error(capsys)
    assert load_checkpoint(output / "checkpoint.safetensors").iteration == 6


def test_a_run_is_not_overwritten_unasked(output, capsys):
    assert train(output, *SMALL.split()) == 0
    capsys.readouterr()
    assert train(output, *SMALL.split()) == 2
    assert "checkpoint.safetensors exists already; --resume goes on" in error(capsys)
    assert train(output, *SMALL.split(), "--overwrite", "--seed", "1") == 0
    assert config_of(output)["seed"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks 0", "tasks is 0; wanted is a whole number of at least 1"),
        ("--iterations -1", "iterations is -1; wanted"),
        ("--inner-lr nan", "inner_lr is nan; wanted is a finite number"),
        ("--meta-lr inf", "meta_lr is inf; wanted is a finite number"),
        ("--tasks 2.5", "--tasks is 2.5; wanted is a whole number"),
        ("--hidden 4 1.5", "--hidden is 1.5; wanted is a whole number"),
        ("--threads 1.5", "--threads is 1.5; wanted is a whole number"),
        ("--tasks many", 'Invalid value for --tasks: unable to convert "many" into int'),
        ("--hidden 0", "hidden is 0; wanted"),
        ("--backend fast", 'Invalid value "fast" for --backend'),
        ("--device nowhere", "device is 'nowhere', which cannot be used here"),
        ("--tsks 3", "Unknown option: --tsks. Did you mean --tasks?"),
        ("--resume", "checkpoint.safetensors: no such checkpoint"),
        ("--config absent.toml", "No such file or directory: 'absent.toml'"),
    ],
)
def test_bad_options_are_refused_in_one_line(output, capsys, flags, message):
    assert train(output, *flags.split()) == 2
    assert message in error(capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration = 3", "unknown key 'iteration'; the keys are ['iterations', "),
        ("[train]\niterations = 3", "unknown key 'train'"),
        ("resume = true", "unknown key 'resume'"),
        ('iterations = "3"', "iterations is '3'; wanted is a whole number"),
        ("iterations = 3.5", "iterations is 3.5; wanted is a whole number"),
        ("first_order = 1", "first_order is 1; wanted is true or false"),
        ("hidden = 40", "hidden is 40; wanted are sizes"),
        ('inner_lr = "fast"', "inner_lr is 'fast'; wanted is a finite number"),
        ("tasks = 0", "tasks is 0; wanted"),
        ("tasks =", "no valid TOML: Invalid value"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(output, tmp_path, capsys, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert train(output, "--config", file) == 2
    line = error(capsys)
    assert f"{file}: " in line
    assert message in line
    assert not output.exists()


def test_a_damaged_checkpoint_is_refused_in_one_line(output, capsys):
    assert train(output, *SMALL.split()) == 0
    capsys.readouterr()
    checkpoint = output / "checkpoint.safetensors"
    damaged = checkpoint.read_bytes()[:-1]
    checkpoint.write_bytes(damaged)
    for command in (f"evaluate {checkpoint}", f"train sinusoid --resume --output {output}"):
        assert run(*command.split()) == 2
        assert f"{checkpoint}: damaged" in error(capsys)
        assert checkpoint.read_bytes() == damaged


def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_stays(output, capsys, monkeypatch):
    assert train(output, *SMALL.split()) == 0
    capsys.readouterr()
    checkpoint = output / "checkpoint.safetensors"
    before = checkpoint.read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert train(output, "--resume", "--iterations", "8") == 2
    assert f"No space left on device: '{output}" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == version("maml_fast")
    assert run("train", "sinusoid", "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--iterations", "--inner-lr", "--learn-inner-lr", "--config", "--resume"):
        assert flag in text
    assert "70000" in text


def test_a_missing_library_is_told_with_how_to_get_it():
    """In a process of its own, where they appear one after the other; the core needs none."""
    program = """
import sys
libraries = "cyclopts", "rich", "safetensors", "filelock", "matplotlib", "jinja2"
sys.modules.update(dict.fromkeys(libraries))  # None there means: not to be found
import maml_fast, maml_fast.models, maml_fast.tasks
for library in libraries[:4]:
    try:
        import maml_fast.cli
    except SystemExit as exit:
        print(exit.code)
    del sys.modules[library]
from maml_fast.cli import main
print(main(["evaluate", "checkpoint", "--plot-dir", "plots"]))
del sys.modules["matplotlib"]
print(main(["report", "folder"]))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.stderr.splitlines() == [
        f'maml-fast: {library} is missing; try: pip install "maml_fast[train]"'
        for library in ("cyclopts", "rich", "safetensors", "filelock", "matplotlib", "jinja2")
    ]
    assert result.stdout.split() == ["2"] * 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(output, tmp_path, capsys, number):
    options = ["--tasks", "2", "--hidden", "4", "--threads", "1", "--log-every", "1"]
    program = "import sys; from maml_fast.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", program, "train", "sinusoid", *options]
    process = subprocess.Popen(
        [*command, "--iterations", "1000000", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    history = output / "history.jsonl"
    deadline = time.monotonic() + 60
    while not (history.exists() and history.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    # Asked by a scheduler, it has done as asked; Ctrl-C is told as shells tell of it.
    assert process.returncode == (0 if number == signal.SIGTERM else 130)
    assert "Traceback" not in errors
    checkpoint = output / "checkpoint.safetensors"
    stopped = load_checkpoint(checkpoint).iteration
    assert printed.splitlines() == [
        f"stopped after iteration {stopped} of 1000000, saved in {checkpoint}",
        f"go on with: maml-fast train sinusoid --resume --output {output}",
    ]
    assert len(history.read_text().splitlines()) == stopped

    end = ["--iterations", str(stopped + 3)]
    assert train(output, "--resume", *end) == 0
    assert train(tmp_path / "whole", *options, *end) == 0
    found, wanted = load_file(checkpoint), load_file(tmp_path / "whole" / "checkpoint.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert history.read_text() == (tmp_path / "whole" / "history.jsonl").read_text()
