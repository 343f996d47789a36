"""Runs on images that are stopped and go on: with the same bits, on the same data only."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maml_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from maml_fast.config import ConfigError
from maml_fast.image_data import DataIdentity, load_images, split_images
from maml_fast.kinds import load_trained
from maml_fast.run_images import ImageRun
from maml_fast.train import train
from tests.archives import encode
from tests.image_runs import folder_run, omniglot_run, read_history
from tests.pictures import make_folder, picture


@pytest.fixture
def config(tmp_path):
    return folder_run(tmp_path)


@pytest.fixture
def omniglot(tmp_path):
    return omniglot_run(tmp_path)


def same_tensors(one, two):
    found, wanted = load_file(one), load_file(two)
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("learn_inner_lr", [False, True])
@pytest.mark.parametrize("stop_at", [0, 3, 4, 5])  # at a line, a validation, and between
def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path, stop_at, learn_inner_lr):
    whole = dataclasses.replace(config, learn_inner_lr=learn_inner_lr)
    wanted = train(whole)
    parts = dataclasses.replace(whole, output=tmp_path / "parts")
    train(dataclasses.replace(parts, iterations=stop_at))
    result = train(parts, resume=True)

    assert same_tensors(result.checkpoint, wanted.checkpoint)
    assert {"validation/best_accuracy", "tasks/generator"} <= load_file(wanted.checkpoint).keys()
    assert same_tensors(parts.output / "best.safetensors", whole.output / "best.safetensors")
    assert (parts.output / "history.jsonl").read_text() == (
        whole.output / "history.jsonl"
    ).read_text()
    assert [line["iteration"] for line in read_history(whole)] == [2, 3, 4, 6, 6]
    assert result.best is not None
    assert (result.best.iteration, result.best.accuracy) == (
        wanted.best.iteration,
        wanted.best.accuracy,
    )


def change_images(folder):
    (folder / "animals" / "0" / "more.png").write_bytes(picture("more", 0, 16, 3))
    return "class 'animals/0' has 7 images, but in the run to resume it has 6 images"


def remove_class(folder):
    shutil.rmtree(folder / "plants" / "1")
    return "class 'plants/1' is missing, but in the run to resume it has 6 images"


def add_class(folder):
    make_folder(folder / "more", classes=1)
    return "class 'more/animals/0' has 6 images, but in the run to resume it is missing"


def paint_images(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(encode(np.full((16, 16, 3), 255, dtype=np.uint8), "RGB"))
    return "the classes are those of the run to resume, but images in them are others"


def swap_images(folder):
    one, two = (folder / "animals" / name / "0.png" for name in "02")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return "the classes are those of the run to resume, but images in them are others"


@pytest.mark.parametrize(
    "change", [change_images, remove_class, add_class, paint_images, swap_images]
)
def test_a_run_is_not_resumed_on_other_data(config, change):
    checkpoint = train(config).checkpoint
    before = checkpoint.read_bytes()
    message = change(config.data[0])
    with pytest.raises(ConfigError, match=f"^data: {message}"):
        train(dataclasses.replace(config, iterations=8), resume=True)
    assert checkpoint.read_bytes() == before


def test_one_pixel_of_a_held_out_image_is_noticed(omniglot):
    training, held_out = split_images(omniglot, load_images(omniglot))
    before = DataIdentity.of(training, held_out)
    assert before == DataIdentity.of(training, held_out.subset(range(len(held_out.names))))
    held_out.images[-1, 0, -1, -1] ^= 1
    with pytest.raises(ConfigError, match=r"sha256 of the pixels [0-9a-f]{12}\.\.\., but there"):
        DataIdentity.of(training, held_out).check_same(before)


def test_a_checkpoint_that_knows_only_the_classes_goes_on(config):
    """As they were before the pixels were looked at."""
    checkpoint = train(dataclasses.replace(config, iterations=3)).checkpoint
    found = load_checkpoint(checkpoint)
    sha256 = found.data["sha256"]
    older = {name: part for name, part in found.data.items() if name != "sha256"}
    save_checkpoint(checkpoint, dataclasses.replace(found, data=older))
    assert train(config, resume=True).iteration == 6
    assert load_checkpoint(checkpoint).data == older | {"sha256": sha256}


def test_the_data_may_have_moved(config, tmp_path):
    train(dataclasses.replace(config, iterations=3))
    moved = config.data[0].rename(tmp_path / "elsewhere")
    result = train(dataclasses.replace(config, data=(moved,)), resume=True)
    assert result.iteration == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ways", 2),
        ("rotations", True),
        ("filters", 5),
        ("validate_every", 3),
        ("validation_classes", 4),
        ("evaluation_steps", 1),
        ("clip_gradient", 1.0),
    ],
)
def test_a_resumed_run_must_have_the_same_configuration(config, field, value):
    train(dataclasses.replace(config, iterations=1))
    with pytest.raises(ConfigError, match=f"^{field} is .*, but the run to resume has"):
        train(dataclasses.replace(config, **{field: value}), resume=True)


def test_runs_of_another_kind_and_lost_files_are_refused(config, omniglot):
    checkpoint = train(config).checkpoint
    other = dataclasses.replace(omniglot, output=config.output)
    with pytest.raises(CheckpointError, match="a run of kind 'images'; wanted is 'omniglot'"):
        train(other, resume=True)
    with pytest.raises(ConfigError, match=r"exists already; --resume goes on"):
        train(config)
    (config.output / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"best.safetensors: no such checkpoint, but"):
        train(config, resume=True)

    found = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, dataclasses.replace(found, config={"kind": "speech"}))
    with pytest.raises(CheckpointError, match="a run of kind 'speech'; wanted is one of"):
        load_trained(checkpoint)
    save_checkpoint(checkpoint, dataclasses.replace(found, data={"training": 3}))
    with pytest.raises(CheckpointError, match="data: its classes cannot be read"):
        train(config, resume=True)
    save_checkpoint(checkpoint, dataclasses.replace(found, data=found.data | {"sha256": 3}))
    with pytest.raises(CheckpointError, match="data: its sha256 is 3; wanted are hexadecimal"):
        train(config, resume=True)


class Killed(Exception):
    pass


@pytest.mark.parametrize("file", ["checkpoint", "best"])
def test_a_run_killed_while_it_writes_its_best_goes_on_to_the_same_bits(
    config, tmp_path, monkeypatch, file
):
    """Of two files, the one is written and the other not: whichever comes first."""
    monkeypatch.setattr(ImageRun, "validate", improving)
    wanted = dataclasses.replace(config, output=tmp_path / "whole", checkpoint_every=100)
    train(wanted)
    save = ImageRun.save

    def kill(run, path, previous=None):
        if run.iteration == 4 and path.stem == file:
            raise Killed
        save(run, path, previous)

    parts = dataclasses.replace(wanted, output=tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(ImageRun, "save", kill)
        with pytest.raises(Killed):
            train(parts)
    lines = []
    result = train(parts, resume=True, announce=lines.append)
    late = f"{result.best.checkpoint} was not there yet, and is written from {result.checkpoint}"
    assert lines[:-1] == ([late] if file == "best" else [])
    for name in ("checkpoint.safetensors", "best.safetensors"):
        assert same_tensors(parts.output / name, wanted.output / name)
    assert load_checkpoint(result.best.checkpoint).iteration == result.best.iteration == 6


def improving(run, validate=ImageRun.validate):
    """A validation that is better each time."""
    found = validate(run)
    if found is not None:
        run._best_accuracy, run._best_iteration = run.iteration / 100, run.iteration
    return found


def test_the_best_checkpoint_belongs_to_the_one_that_is_resumed(config, monkeypatch):
    """Put back to an earlier time alone, a checkpoint tells of another best than there is."""
    monkeypatch.setattr(ImageRun, "validate", improving)
    checkpoint, best = (config.output / f"{n}.safetensors" for n in ("checkpoint", "best"))
    earlier = {}
    for iteration in (1, 3, 6):
        train(dataclasses.replace(config, iterations=iteration), resume=iteration > 1)
        earlier[iteration] = checkpoint.read_bytes(), best.exists() and best.read_bytes()
    after = dataclasses.replace(config, iterations=8)
    for iteration, known in ((1, "has none"), (3, "has the best at iteration 2")):
        checkpoint.write_bytes(earlier[iteration][0])
        message = (
            f"best.safetensors: of iteration 6, but the run .* at iteration {iteration}, {known};"
        )
        with pytest.raises(CheckpointError, match=message):
            train(after, resume=True)
        assert (checkpoint.read_bytes(), best.read_bytes()) == (
            earlier[iteration][0],
            earlier[6][1],
        )
    best.write_bytes(earlier[3][1])  # both of one time
    result = train(dataclasses.replace(config, iterations=5), resume=True)
    assert load_checkpoint(best).iteration == result.best.iteration == 4


def test_overwriting_removes_the_best_checkpoint_too(config):
    train(config)
    train(dataclasses.replace(config, iterations=1), overwrite=True)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "checkpoint.previous.safetensors",  # of iteration 0
        "checkpoint.safetensors",
        "history.jsonl",
        "run.lock",
        "starts.jsonl",
    ]
