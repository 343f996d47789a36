"""The command line under torchrun itself: two ranks, and one that is killed and comes again."""

import pytest
import torch
from safetensors.torch import load_file

from maml_fast.checkpoint import load_checkpoint
from tests.command import run_words
from tests.processes import torchrun

COMMAND = (
    "train sinusoid --iterations 12 --tasks 5 --shots 4 --hidden 6 5 --activation tanh "
    "--threads 1 --log-every 5 --checkpoint-every 4 --output"
)
# Rank 0, which writes, is killed once, between two checkpoints.
KILLED = """
import os, signal, sys
from maml_fast import cli, run

taken = run.Run.step

def step(self):
    taken(self)
    if self.iteration == 10 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

run.Run.step = step
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two ranks, and what torchrun said."""
    output = tmp_path_factory.mktemp("torchrun") / "run"
    return output, torchrun("-m", "maml_fast", *COMMAND.split(), output)


def tensors(output):
    return load_file(output / "checkpoint.safetensors")


def test_two_ranks_are_as_one_process(undisturbed, tmp_path):
    output, ended = undisturbed
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("trained 12 iterations") == 1  # by the first rank alone
    assert ended.stderr.count("12/12") == 1
    assert run_words(COMMAND, tmp_path / "one") == 0
    found, wanted = tensors(output), tensors(tmp_path / "one")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = (found[name].double() - tensor.double()).norm()
        assert difference <= 1e-5 * tensor.double().norm(), name


def test_a_killed_rank_is_restarted_and_the_run_goes_on(undisturbed, tmp_path):
    """--overwrite is meant for what was there before the command, not for its own run."""
    output = tmp_path / "run"
    assert run_words(COMMAND, output, "--seed 9") == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ended = torchrun(script, *COMMAND.split(), output, "--overwrite", restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert "exitcode: -9" in ended.stderr
    assert "restarted by torchrun; going on after iteration 8" in ended.stderr
    assert load_checkpoint(output / "checkpoint.safetensors").config["seed"] == 0
    found, wanted = tensors(output), tensors(undisturbed[0])
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert (output / "history.jsonl").read_bytes() == (
        undisturbed[0] / "history.jsonl"
    ).read_bytes()
