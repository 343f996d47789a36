"""Runs that leave out tasks which are not finite, and count them."""

import dataclasses

import pytest
import torch

from maml_fast.checkpoint import load_checkpoint
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.errors import NonFiniteError, NonFiniteWarning
from maml_fast.run import TASK_SEEDS
from maml_fast.run_sinusoid import SinusoidRun
from maml_fast.tasks import SinusoidTasks
from maml_fast.train import train
from tests.command import run
from tests.image_runs import read_history


@pytest.fixture
def config(tmp_path):
    return SinusoidConfig(
        iterations=9,
        tasks=4,
        shots=3,
        query_shots=3,
        hidden=(4,),
        threads=1,
        log_every=4,
        checkpoint_every=100,
        on_nonfinite="skip",
        output=tmp_path / "run",
    )


def bad_tasks(iteration):
    """Which of the four tasks are spoilt."""
    return {2: [1], 3: [0, 3], 6: [2]}.get(iteration, [])


@pytest.fixture
def spoilt(monkeypatch):
    """Tasks of which some have NaN, in iterations that the stream of tasks tells apart."""
    sample = SinusoidTasks.sample

    def spoil(tasks, *arguments):
        start = tasks.generator.get_state()
        fresh = SinusoidTasks(TASK_SEEDS)
        iteration = 1
        while not torch.equal(fresh.generator.get_state(), start):
            sample(fresh, *arguments)
            iteration += 1
        episodes = sample(tasks, *arguments)
        for task in bad_tasks(iteration):
            episodes.support_y[task, 0] = torch.nan
        return episodes

    monkeypatch.setattr(SinusoidTasks, "sample", spoil)


def test_skipped_tasks_are_counted_by_line(config, spoilt, capsys):
    result = train(config)
    assert result.skipped == 4
    assert [line["skipped_tasks"] for line in read_history(config)] == [3, 1]
    assert torch.isfinite(torch.tensor([line["loss"] for line in read_history(config)])).all()
    assert run("train", "sinusoid", "--resume", "--iterations", 10, "--output", config.output) == 0
    line = "skipped 4 tasks whose loss or gradient was not finite"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_the_step_is_that_of_the_other_tasks(config, spoilt, monkeypatch):
    """Iteration 2 against plain autograd over the three tasks that are left."""
    one, two = SinusoidRun(config), SinusoidRun(config)
    for this in (one, two):
        this.step()
    support_x, support_y, query_x, query_y = two.tasks.sample(4, 3, 3)
    losses = []
    for task in (0, 2, 3):
        fast = dict(two.model.named_parameters())
        out = torch.func.functional_call(two.model, fast, support_x[task])
        gradients = torch.autograd.grad(
            (out - support_y[task]).square().mean(), [*fast.values()], create_graph=True
        )
        fast = {
            name: value - config.inner_lr * gradient
            for (name, value), gradient in zip(fast.items(), gradients, strict=True)
        }
        out = torch.func.functional_call(two.model, fast, query_x[task])
        losses.append((out - query_y[task]).square().mean())
    wanted = torch.autograd.grad(torch.stack(losses).mean(), [*two.model.parameters()])
    one.step()
    found = one.parameters.gradient
    torch.testing.assert_close(
        found, torch.cat([g.reshape(-1) for g in wanted]), rtol=1e-4, atol=1e-6
    )
    assert one.skipped == 1


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6])
def test_a_resumed_run_counts_as_one_never_stopped(config, spoilt, tmp_path, stop):
    wanted = train(config)
    parts = dataclasses.replace(config, output=tmp_path / "parts")
    train(dataclasses.replace(parts, iterations=stop))
    found = train(parts, resume=True)
    assert found.skipped == wanted.skipped == 4
    assert read_history(parts) == read_history(config)
    one, two = (load_checkpoint(result.checkpoint).groups for result in (found, wanted))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[g][n], two[g][n]) for g in two for n in two[g])


def test_a_run_that_raised_goes_on_by_skipping(config, spoilt):
    raises = dataclasses.replace(config, on_nonfinite="raise", checkpoint_every=1)
    with pytest.raises(NonFiniteError):
        train(raises)
    checkpoint = load_checkpoint(config.output / "checkpoint.safetensors")
    assert checkpoint.iteration == 1
    assert "skipped" not in checkpoint.groups  # as in checkpoints from before there was a choice
    result = train(config, resume=True)
    assert result.skipped == 4
    assert [line["skipped_tasks"] for line in read_history(config)] == [3, 1]
    back = dataclasses.replace(raises, iterations=10)  # nothing is bad there: its count stays
    assert train(back, resume=True).skipped == 4


def test_a_run_may_warn(config, spoilt):
    with pytest.warns(NonFiniteWarning, match="left out of the meta-step") as found:
        train(dataclasses.replace(config, on_nonfinite="warn"))
    assert len(found) == 3


def test_where_nothing_is_skipped_the_line_says_so(config, capsys):
    """And to raise, which is the default, writes the lines of old."""
    assert train(config).skipped == 0
    assert [line["skipped_tasks"] for line in read_history(config)] == [0, 0]
    train(dataclasses.replace(config, on_nonfinite="raise"), overwrite=True)
    assert [sorted(line) for line in read_history(config)] == [["iteration", "loss"]] * 2
    groups = load_checkpoint(config.output / "checkpoint.safetensors").groups
    assert groups.keys() == {"model", "optimizer", "tasks", "window"}


def test_if_all_tasks_are_bad_the_run_ends_with_its_last_checkpoint(config, spoilt, monkeypatch):
    monkeypatch.setitem(globals(), "bad_tasks", lambda i: [0, 1, 2, 3] if i == 3 else [])
    with pytest.raises(NonFiniteError):
        train(dataclasses.replace(config, checkpoint_every=1))
    assert load_checkpoint(config.output / "checkpoint.safetensors").iteration == 2
