"""The command line on images: training, recipes, resuming and evaluation."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from maml_fast.checkpoint import load_checkpoint
from maml_fast.evaluate_images import answer_task, evaluate_images
from maml_fast.image_data import evaluation_images
from maml_fast.kinds import load_trained
from tests.command import config_of, error
from tests.command import run_words as run
from tests.pictures import characters, make_archive, make_folder

SMALL = "--ways 3 --tasks 2 --validate-every 2 --validation-tasks 3 --threads 1 --backend reference"
TINY = f"{SMALL} --query-shots 2 --image-size 16 --filters 3 --inner-steps 1 --evaluation-steps 2"


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "small.zip", {"Greek": 4, "Latin": 3, "Korean": 3})


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", classes=8)


def test_omniglot_from_training_to_pictures(archive, output, tmp_path, capsys):
    flags = "--iterations 4 --model fc --inner-lr 0.4 --alphabets-for-validation Korean"
    assert run("train omniglot", SMALL, flags, "--data", archive, "--output", output) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "training on 7 classes x 4 rotations, 42 images; 3 held out for validation (Korean)\n"
    )
    trained, best, evaluate = captured.out.splitlines()
    checkpoint = output / "best.safetensors"
    last = output / "checkpoint.safetensors"
    assert re.fullmatch(rf"trained 4 iterations, loss \d+\.\d{{4}}, saved in {last}", trained)
    number = r"\d+\.\d\d% at iteration [24], saved in "
    assert re.fullmatch(rf"best in validation: {number}{checkpoint}", best)
    assert evaluate == f"evaluate with: maml-fast evaluate {checkpoint}"

    file, plots = tmp_path / "evaluation.json", tmp_path / "plots"
    flags = "--shots 1 2 --tasks 4 --seed 3 --threads 1 --backend reference"
    assert run("evaluate", checkpoint, flags, "--json", file, "--plot-dir", plots) == 0
    table = capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document.keys() == {
        *("checkpoint", "iteration", "config", "classes", "paper", "evaluations"),
    }
    assert document["config"] == config_of(output)
    assert document["classes"] == {
        "which": "held-out",
        "names": characters({"Korean": 3}),
        "chose_checkpoint": True,
    }
    assert "they chose best.safetensors" in " ".join(table.split())
    assert document["paper"] == [None, None]  # which has no 3 ways
    model = load_trained(checkpoint)
    held_out = evaluation_images(model.config, model.data, (), "held-out")
    for shots, found in zip((1, 2), document["evaluations"], strict=True):
        wanted = evaluate_images(
            model.model,
            0.4,
            held_out,
            ways=3,
            shots=shots,
            query_shots=6 - shots,
            steps=(0, 1, 3),
            tasks=4,
            seed=3,
            backend="reference",
        )
        assert found == json.loads(json.dumps(wanted.to_dict()))
        for row in wanted.accuracies:
            assert f"{100 * row.accuracy:.2f} ± {100 * row.ci95:.2f}" in table
    assert sorted(path.name for path in plots.iterdir()) == ["adaptation.png", "episode.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in plots.iterdir())
    assert answer_task(model.model, 0.4, held_out, ways=3, query_shots=5).predicted.shape == (15,)


def test_a_folder_of_images_from_training_to_json(folder, output, capsys):
    assert run("train images", TINY, "--iterations 2 --data", folder, "--output", output) == 0
    capsys.readouterr()
    checkpoint = output / "checkpoint.safetensors"
    assert run("evaluate", checkpoint, "--tasks 3 --backend reference --json -") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [row["steps"] for row in document["evaluations"][0]["accuracies"]] == [0, 1, 2]
    assert document["evaluations"][0]["query_shots"] == 5
    assert document["paper"] == [None]
    assert "Accuracy in %" in captured.err
    names = document["classes"]["names"]
    assert len(names) == 3
    for which, count in (("train", 5), ("all", 8)):
        flags = f"--tasks 2 --backend reference --classes {which} --steps 1 --json -"
        assert run("evaluate", checkpoint, flags) == 0
        found = json.loads(capsys.readouterr().out)["classes"]
        assert len(found["names"]) == count
        assert found["chose_checkpoint"] == (which == "all")
        assert (set(names) <= set(found["names"])) == (which == "all")


def test_other_images_are_evaluated_on(archive, output, tmp_path, capsys):
    options = "--model fc --iterations 0 --validation-classes 0"
    assert run("train omniglot", SMALL, options, "--data", archive, "--output", output) == 0
    checkpoint = output / "checkpoint.safetensors"
    other = make_archive(tmp_path / "other.zip", {"Greek": 2, "Tibetan": 3})
    capsys.readouterr()
    assert run("evaluate", checkpoint, "--tasks 2 --threads 1") == 2
    assert "classes is 'held-out', of which the data has 0" in error(capsys)
    flags = "--tasks 2 --steps 0 --rotations --backend reference --json -"
    assert run("evaluate", checkpoint, flags, "--data", other) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["classes"]["names"] == characters({"Tibetan": 3})
    assert document["classes"]["chose_checkpoint"] is False
    assert "they chose" not in " ".join(captured.err.split())
    assert document["evaluations"][0]["rotations"] is True


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--ways 5", {"tasks": 32, "query_shots": 1, "inner_steps": 1, "evaluation_steps": 3}),
        (
            "--ways 20 --shots 2",
            {"tasks": 16, "query_shots": 2, "inner_steps": 5, "evaluation_steps": 5},
        ),
        ("--ways 20 --inner-steps 2 --tasks 3", {"tasks": 3, "inner_steps": 2, "shots": 1}),
    ],
)
def test_the_papers_settings_go_with_the_ways_unless_told_otherwise(
    output, tmp_path, flags, wanted
):
    archive = make_archive(tmp_path / "many.zip", {"Greek": 45}, drawings=4)
    options = "--iterations 0 --model fc --threads 1"
    assert run("train omniglot", options, flags, "--data", archive, "--output", output) == 0
    config = config_of(output)
    assert {name: config[name] for name in wanted} == wanted
    assert (config["inner_lr"], config["meta_lr"], config["kind"]) == (2.0, 0.001, "omniglot")


def test_a_file_has_any_option_and_its_ways_choose_the_settings(output, tmp_path):
    archive = make_archive(tmp_path / "many.zip", {"Greek": 30, "Latin": 20}, drawings=4)
    file = tmp_path / "run.toml"
    file.write_text(
        f'ways = 20\niterations = 0\nmodel = "fc"\nthreads = 1\ninner_steps = 4\n'
        f'data = ["{archive}"]\nalphabets_for_validation = ["Latin"]\noutput = "{output}"\n'
    )
    assert run("train omniglot --tasks 7 --config", file) == 0
    config = config_of(output)
    assert (config["ways"], config["inner_steps"], config["evaluation_steps"]) == (20, 4, 5)
    assert (config["tasks"], config["data"]) == (7, [str(archive)])
    assert config["alphabets_for_validation"] == ["Latin"]


def test_images_of_more_ways_have_the_original_codes_rate(folder, output):
    flags = "--ways 4 --shots 2 --iterations 0 --image-size 16 --filters 2 --channels 1"
    rest = "--query-shots 3 --validation-classes 4 --threads 1"
    assert run("train images", flags, rest, "--data", folder, "--output", output) == 0
    config = config_of(output)
    assert config["inner_lr"] == pytest.approx(0.04)
    assert config["clip_gradient"] == pytest.approx(10 * 2 / (4 * 3))  # 3 query images, not 15
    assert (config["channels"], config["model"], config["kind"]) == (1, "conv4-pool", "images")


def test_resuming_takes_the_options_of_the_run(folder, output, capsys):
    assert (
        run("train images", TINY, "--iterations 4 --seed 5 --data", folder, "--output", output) == 0
    )
    assert run("train images --resume --iterations 6 --output", output) == 0
    checkpoint = load_checkpoint(output / "checkpoint.safetensors")
    assert checkpoint.iteration == 6
    assert (checkpoint.config["seed"], checkpoint.config["filters"]) == (5, 3)
    capsys.readouterr()
    for flags, message in (
        ("--ways 2", "ways is 2, but the run to resume has 3"),
        ("--iterations 3", "iterations is 3, but the run to resume is already at 6"),
    ):
        assert run("train images --resume", flags, "--output", output) == 2
        assert message in capsys.readouterr().err
    assert run("train omniglot --resume --output", output) == 2
    assert "a run of kind 'images'; resume it with: maml-fast train images --resume" in error(
        capsys
    )


def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(folder, output, tmp_path, capsys):
    options = f"{TINY} --log-every 1 --data {folder}"
    program = "import sys; from maml_fast.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", program, "train", "images", *options.split()]
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
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors
    checkpoint = output / "checkpoint.safetensors"
    stopped = load_checkpoint(checkpoint).iteration
    assert printed.splitlines() == [
        f"stopped after iteration {stopped} of 1000000, saved in {checkpoint}",
        f"go on with: maml-fast train images --resume --output {output}",
    ]

    end = f"--iterations {stopped + 3}"
    assert run("train images --resume", end, "--output", output) == 0
    assert run("train images", options, end, "--output", tmp_path / "whole") == 0
    for name in ("checkpoint.safetensors", "best.safetensors"):
        found, wanted = load_file(output / name), load_file(tmp_path / "whole" / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert history.read_text() == (tmp_path / "whole" / "history.jsonl").read_text()
