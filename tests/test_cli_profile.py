"""The command line `maml-fast profile`."""

import json

import pytest

from maml_fast.recorder import PASSES
from tests.command import error
from tests.command import run_words as run
from tests.pictures import make_folder

FEW = "--repeats 1 --threads 1"
SINUSOID = f"sinusoid --tasks 2 --shots 3 --hidden 4 4 {FEW}"
IMAGES = "--ways 3 --tasks 2 --image-size 16 --filters 3 --inner-steps 1 --query-shots 2"


def test_a_table_and_the_parts_of_an_iteration(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("profile", SINUSOID) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].startswith("backend ")
    heads = [line.split("  ")[0] for line in lines]
    for name in ("0", "2", "4", "rest", "sampling", "meta-step and gradient", "optimiser"):
        assert name in heads
    assert heads[-1].startswith("peak of the process: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["cpu", "torch", "functional", "reference"])
def test_json(capsys, tmp_path, backend, extension):
    file = tmp_path / "deep" / "profile.json"
    assert run("profile", SINUSOID, "--backend", backend, "--json", file) == 0
    document = json.loads(file.read_text())
    assert document["config"]["hidden"] == [4, 4]
    assert document["profile"]["backend"] == backend
    iteration = document["iteration_ms"]
    parts = ("sampling", "meta-step and gradient", "optimiser", "rest")
    assert sum(iteration[name] for name in parts) == pytest.approx(iteration["iteration"])
    assert document["process_peak_bytes"] > 2**20
    assert document["profile"]["by_pass_ms"].keys() == set(PASSES)
    assert capsys.readouterr().out


def test_json_on_the_standard_output(capsys):
    assert run("profile", SINUSOID, "--json -") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["profile"]["repeats"] == 1
    assert printed.err.startswith("backend ")


@pytest.mark.parametrize(
    "command",
    [f"images {IMAGES}", "omniglot --ways 3 --tasks 2 --filters 3", "omniglot --model fc"],
)
def test_images_without_data(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert run("profile", command, FEW) == 0
    assert "batch norm" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_gives_options_and_model(capsys, tmp_path, output):
    flags = "--iterations 2 --learn-inner-lr --tasks 2 --shots 3 --hidden 5 --threads 1"
    assert run("train sinusoid", flags, "--output", output) == 0
    file = tmp_path / "profile.json"
    checkpoint = output / "checkpoint.safetensors"
    flags = f"--checkpoint {checkpoint} --tasks 4 --repeats 1 --json {file}"
    assert run("profile sinusoid", flags) == 0
    document = json.loads(file.read_text())
    assert (document["config"]["hidden"], document["config"]["tasks"]) == ([5], 4)
    assert document["checkpoint"] == str(checkpoint)
    capsys.readouterr()

    assert run("profile sinusoid --hidden 6 --checkpoint", checkpoint) == 2
    assert f"{checkpoint}: model/" in error(capsys)
    assert run("profile omniglot --checkpoint", checkpoint) == 2
    wanted = "a run of kind 'sinusoid'; profile it with: maml-fast profile sinusoid --checkpoint"
    assert wanted in error(capsys)


def test_a_checkpoint_of_images_whose_data_are_gone(capsys, tmp_path, output):
    folder = make_folder(tmp_path / "images", classes=8)
    flags = "--iterations 1 --evaluation-steps 1 --validation-classes 0 --backend reference"
    assert run("train images", IMAGES, flags, "--data", folder, "--output", output) == 0
    folder.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    checkpoint = output / "checkpoint.safetensors"
    assert run("profile images --repeats 1 --checkpoint", checkpoint) == 0
    assert capsys.readouterr().out.startswith("backend reference: 2 tasks")
    given = f"--data {tmp_path / 'elsewhere'} --backend auto"
    assert run("profile images --repeats 1 --checkpoint", checkpoint, given) == 0
    assert "conv 3x3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sinusoid --repeats 0", "repeats is 0; wanted is a whole number of at least 1"),
        ("sinusoid --repeats 2.5", "--repeats is 2.5; wanted is a whole number"),
        ("sinusoid --tasks 0", "tasks is 0; wanted is a whole number of at least 1"),
        ("sinusoid --checkpoint absent", "absent"),
        ("images --channels 2", "channels is 2; wanted is 1 or 3"),
        ("images --data absent", "absent"),
        ("sinusoid --device nowhere", "device is 'nowhere', which cannot be used here"),
        ("sinusoid --resume", "Unknown option: --resume"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, command, message):
    assert run("profile", command) == 2
    assert message in error(capsys)
