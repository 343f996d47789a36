"""The command line on images: bad options and files are refused in one line, and the help."""

import pytest
import torch

from tests.command import error
from tests.command import run_words as run
from tests.pictures import make_folder

SMALL = "--ways 3 --tasks 2 --validate-every 2 --validation-tasks 3 --threads 1 --backend reference"
TINY = f"{SMALL} --query-shots 2 --image-size 16 --filters 3 --inner-steps 1 --evaluation-steps 2"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", classes=8)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("omniglot", "--ways 0", "ways is 0; wanted is a whole number of at least 1"),
        ("omniglot", "--ways 2.5", "--ways is 2.5; wanted is a whole number"),
        ("omniglot", "--ways many", 'Invalid value for --ways: unable to convert "many" into int'),
        ("omniglot", "--model fc --filters 7", "filters is 7, but the model fc has none; leave"),
        ("images", "--model fc --filters 64", "filters is 64, but the model fc has none; leave"),
        ("omniglot", "--model resnet", 'Invalid value "resnet" for --model'),
        ("omniglot", "--validation-classes -1", "validation_classes is -1; wanted"),
        ("omniglot", "--validation-tasks 1", "validation_tasks is 1; wanted"),
        ("omniglot", "--data absent.zip", "absent.zip"),
        ("omniglot", "--hidden 3", "Unknown option: --hidden"),
        ("images", "", "data is []; wanted is one folder"),
        ("images", "--data absent", "absent"),
        ("images", "--channels 2", "channels is 2; wanted is 1 or 3"),
        ("images", "--image-size 0", "image_size is 0; wanted"),
    ],
)
def test_bad_options_are_refused_in_one_line(output, capsys, command, flags, message):
    assert run("train", command, flags, "--output", output) == 2
    assert message in error(capsys)
    assert not output.exists()


def test_without_data_and_network_it_says_what_to_give(output, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MAML_FAST_OMNIGLOT_URL", "http://127.0.0.1:9/")  # where nobody answers
    assert run("train omniglot --download", tmp_path / "archives", "--output", output) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("maml-fast: http://127.0.0.1:9/images_background.zip: ")
    assert line.endswith("(--data takes archives or folders that are there)")
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ways = 0", "ways is 0; wanted"),
        ('data = "a.zip"', "data is 'a.zip'; wanted are paths"),
        ("data = [1]", "data is (1,); wanted are paths"),
        ('model = "resnet"', "model is 'resnet'; wanted is one of"),
        ("rotations = 1", "rotations is 1; wanted is true or false"),
        ("hidden = [4]", "unknown key 'hidden'"),
        ('kind = "omniglot"', "unknown key 'kind'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(output, tmp_path, capsys, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert run("train omniglot --config", file, "--output", output) == 2
    line = error(capsys)
    assert f"{file}: " in line
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data images.zip", "data is for runs on images; "),
        ("--classes all", "classes is for runs on images; "),
        ("--rotations", "rotations is for runs on images; "),
    ],
)
def test_a_sinusoid_has_no_images(output, capsys, flags, message):
    options = "--iterations 1 --tasks 2 --hidden 4 --threads 1"
    assert run("train sinusoid", options, "--output", output) == 0
    capsys.readouterr()
    assert run("evaluate", output / "checkpoint.safetensors", flags) == 2
    assert message in error(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--query-shots 6", "has 6 images; wanted are at least shots + query_shots = 1 + 6 = 7"),
        ("--query-shots 0", "query_shots is 0; wanted"),
        ("--tasks 1", "tasks is 1; wanted are at least 2"),
        ("--steps -1", "steps is (-1,); wanted"),
        ("--inner-lr -1", "inner_lr is -1.0; wanted is a finite number of at least 0"),
        ("--inner-lr nan", "inner_lr is nan; wanted is a finite number of at least 0"),
        ("--classes some", 'Invalid value "some" for --classes'),
        ("--data absent", "absent"),
    ],
)
def test_an_evaluation_refuses_bad_options_in_one_line(folder, output, capsys, flags, message):
    assert run("train images", TINY, "--iterations 0 --data", folder, "--output", output) == 0
    capsys.readouterr()
    assert run("evaluate", output / "checkpoint.safetensors", flags) == 2
    assert message in error(capsys)


def test_too_little_memory_is_told_in_one_line(folder, output, capsys):
    flags = "--image-size 512 --tasks 100000 --query-shots 1 --filters 2 --ways 2 --threads 1"
    assert run("train images", flags, "--data", folder, "--output", output) == 2
    printed = capsys.readouterr().err
    wanted = 4 * 3 * 512**2 * 2 * 100_000  # the support images in float32
    line = f"maml-fast: out of memory: {wanted:,} bytes were wanted at once; less is needed with "
    assert printed.splitlines()[-1].startswith(line)
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("std::bad_alloc"), "out of memory: std::bad_alloc; less is needed"),
        (MemoryError(), "out of memory: no more is had; less is needed"),
        (
            torch.OutOfMemoryError("CUDA out of\nmemory."),
            "out of memory: CUDA out of memory.; less",
        ),
    ],
)
def test_memory_may_run_out_elsewhere(folder, output, capsys, monkeypatch, error, message):
    def fail(run):
        raise error

    monkeypatch.setattr("maml_fast.run.Run.step", fail)
    assert run("train images", TINY, "--data", folder, "--output", output) == 2
    assert f"maml-fast: {message}" in capsys.readouterr().err


def test_an_error_of_the_program_is_no_lack_of_memory(folder, output, monkeypatch):
    def fail(run):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("maml_fast.run.Run.step", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("train images", TINY, "--data", folder, "--output", output)


def test_the_help_says_how_rates_compare(capsys):
    assert run("train omniglot --help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the original code's rates 0.4 (5 ways) and 0.1 (20 ways) are both 2.0 here" in text
    assert "[default: 2]" in text
    assert run("train images --help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "original code's rate 0.01 is 0.01 ways here, 0.05" in text
    assert "()" not in text  # a list without a default shows none
