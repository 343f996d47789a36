"""Training: what it computes, and that stopping and going on changes nothing."""

import dataclasses
import json
import math
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from maml_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.evaluate import evaluate_sinusoid
from maml_fast.kinds import load_trained
from maml_fast.models import sinusoid_mlp
from maml_fast.progress import History, stop_on_signals
from maml_fast.run import TASK_SEEDS, DivergedError, FlatParameters
from maml_fast.run_sinusoid import SinusoidRun
from maml_fast.tasks import SinusoidTasks
from maml_fast.train import train


@pytest.fixture
def config(tmp_path):
    """A small run. One thread: the machine may be shared, and the tasks are tiny."""
    return SinusoidConfig(
        iterations=12,
        tasks=3,
        shots=4,
        query_shots=5,
        hidden=(6, 5),
        seed=3,
        threads=1,
        log_every=5,
        checkpoint_every=4,
        output=tmp_path / "run",
    )


def read_history(config):
    text = (config.output / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("learn_inner_lr", [False, True])
def test_training_is_adam_on_the_gradient_through_the_inner_steps(
    config, inner_steps, learn_inner_lr
):
    """The run against a plain loop: autograd task by task, and Adam on separate parameters."""
    config = dataclasses.replace(
        config,
        iterations=4,
        inner_steps=inner_steps,
        learn_inner_lr=learn_inner_lr,
        inner_lr=0.1,
        meta_lr=0.01,
        activation="tanh",  # no kink at which two correct programs may differ
        log_every=1,
    )
    result = train(config)

    model = sinusoid_mlp(config.hidden, "tanh", seed=config.seed)
    rate = torch.tensor(0.1, requires_grad=learn_inner_lr)
    trained = [*model.parameters(), *([rate] if learn_inner_lr else [])]
    optimizer = torch.optim.Adam(trained, lr=config.meta_lr)
    tasks = SinusoidTasks(config.seed + TASK_SEEDS)
    losses = []
    for _ in range(config.iterations):
        episodes = tasks.sample(config.tasks, config.shots, config.query_shots)
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            fast: dict[str, torch.Tensor] = dict(model.named_parameters())
            for _ in range(inner_steps):
                loss = (functional_call(model, fast, support_x) - support_y).square().mean()
                gradients = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
                fast = {
                    name: value - rate * gradient
                    for (name, value), gradient in zip(fast.items(), gradients, strict=True)
                }
            total = total + (functional_call(model, fast, query_x) - query_y).square().mean()
        optimizer.zero_grad()
        (total / config.tasks).backward()
        optimizer.step()
        losses.append((total / config.tasks).item())

    found = load_trained(result.checkpoint)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.model.get_parameter(name), parameter, rtol=0, atol=2e-6)
    assert found.inner_lr == pytest.approx(rate.item(), abs=2e-6)
    assert (found.inner_lr != 0.1) == learn_inner_lr
    history = read_history(config)
    assert [line["loss"] for line in history] == pytest.approx(losses, rel=1e-5)
    if learn_inner_lr:
        assert history[-1]["inner_lr"] == found.inner_lr


def test_flat_adam_is_adam():
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (4,), (), (1, 4)]
    separate = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    viewed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in separate]
    flat = FlatParameters(viewed)
    one = torch.optim.Adam(separate, lr=0.1)
    two = torch.optim.Adam([flat.flat], lr=0.1, fused=True)
    for _ in range(3):
        flat.zero_grad()
        one.zero_grad()
        for parameters in (separate, viewed):
            torch.stack([3 * parameter.sin().sum() for parameter in parameters]).sum().backward()
        one.step()
        two.step()
        for a, b in zip(separate, viewed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(flat.flat, torch.cat([parameter.reshape(-1) for parameter in viewed]))


def test_training_learns_to_adapt(config):
    config = dataclasses.replace(
        config, iterations=600, tasks=10, shots=10, hidden=(40, 40), meta_lr=0.01, log_every=100
    )
    result = train(config)
    history = read_history(config)
    assert [line["iteration"] for line in history] == [100, 200, 300, 400, 500, 600]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert (result.iteration, result.loss, result.stopped_by) == (600, history[-1]["loss"], 0)
    trained = load_trained(result.checkpoint)
    before, one, five = evaluate_sinusoid(
        trained.model, steps=(0, 1, 5), shots=10, tasks=100
    ).errors
    assert one.mse < 0.6 * before.mse  # one step adapts
    assert five.mse < one.mse  # and more steps go on doing so


@pytest.mark.parametrize("learn_inner_lr", [False, True])
@pytest.mark.parametrize("stop_at", [0, 5, 7])  # before a step, at a line of the history, between
def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path, stop_at, learn_inner_lr):
    whole = dataclasses.replace(config, learn_inner_lr=learn_inner_lr)
    train(whole)
    parts = dataclasses.replace(whole, output=tmp_path / "parts")
    train(dataclasses.replace(parts, iterations=stop_at))
    assert len(read_history(parts)) == stop_at // 5
    result = train(parts, resume=True)

    found, wanted = load_file(result.checkpoint), load_file(whole.output / "checkpoint.safetensors")
    assert {"model/0.weight", "optimizer/exp_avg_sq", "tasks/generator"} <= wanted.keys()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_checkpoint(result.checkpoint).iteration == 12
    assert (parts.output / "history.jsonl").read_bytes() == (
        whole.output / "history.jsonl"
    ).read_bytes()
    assert len(read_history(parts)) == 2


def test_a_checkpoint_from_before_there_were_other_kinds_goes_on(config, tmp_path):
    train(config)
    parts = dataclasses.replace(config, output=tmp_path / "parts")
    path = train(dataclasses.replace(parts, iterations=7)).checkpoint
    checkpoint = load_checkpoint(path)
    older = {k: v for k, v in checkpoint.config.items() if k not in ("kind", "clip_gradient")}
    assert len(older) == len(checkpoint.config) - 2
    save_checkpoint(path, dataclasses.replace(checkpoint, config=older))
    assert load_trained(path).iteration == 7
    assert train(parts, resume=True).iteration == 12
    found, wanted = load_file(path), load_file(config.output / "checkpoint.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_resuming_a_finished_run_changes_nothing(config):
    checkpoint = train(config).checkpoint
    before = checkpoint.read_bytes()
    assert train(config, resume=True).iteration == 12
    assert checkpoint.read_bytes() == before


def test_lines_after_the_checkpoint_are_written_again_not_twice(config):
    train(config)
    history = config.output / "history.jsonl"
    wanted = history.read_text()
    longer = dataclasses.replace(config, iterations=20)
    # As after a crash between a line and the next checkpoint, in the middle of another line.
    history.write_text(wanted + '{"iteration": 15, "loss": 1.0}\n{"iteration": 2')
    train(longer, resume=True)
    assert [line["iteration"] for line in read_history(longer)] == [5, 10, 15, 20]
    assert history.read_text().startswith(wanted)


def test_a_history_of_another_program_is_refused(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match=r"history.jsonl: line 1 is no loss record"):
        History(path).keep_until(5)
    assert path.read_text() == "step,loss\n1,2.0\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", 4),
        ("shots", 5),
        ("inner_lr", 0.02),
        ("learn_inner_lr", True),
        ("hidden", (6, 6)),
        ("seed", 4),
        ("first_order", True),
        ("backend", "reference"),
    ],
)
def test_a_resumed_run_must_have_the_same_configuration(config, field, value):
    checkpoint = train(config).checkpoint
    before = checkpoint.read_bytes()
    changed = dataclasses.replace(config, **{field: value})
    with pytest.raises(ConfigError, match=f"^{field} is .*, but the run to resume has"):
        train(changed, resume=True)
    assert checkpoint.read_bytes() == before


def test_a_resumed_run_may_be_longer_but_not_shorter(config):
    train(config)
    changed = dataclasses.replace(config, iterations=13, checkpoint_every=1, log_every=1, threads=2)
    assert train(changed, resume=True).iteration == 13
    with pytest.raises(ConfigError, match="iterations is 12, but the run to resume is already at"):
        train(config, resume=True)


def test_an_existing_run_is_neither_overwritten_nor_invented(config):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(config, resume=True)
    assert not config.output.exists()
    checkpoint = train(config).checkpoint
    with pytest.raises(ConfigError, match=r"^output: .*checkpoint.safetensors exists already"):
        train(config)
    with pytest.raises(ConfigError, match="resume and overwrite are both set"):
        train(config, resume=True, overwrite=True)
    shorter = dataclasses.replace(config, iterations=5)
    train(shorter, overwrite=True)
    assert load_checkpoint(checkpoint).iteration == 5
    assert [line["iteration"] for line in read_history(config)] == [5]


def test_a_damaged_checkpoint_is_not_resumed(config):
    checkpoint = train(config).checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        train(config, resume=True)


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(config):
    good = train(config).checkpoint.read_bytes()
    run = SinusoidRun(config)
    run.restore(config.output / "checkpoint.safetensors")
    with torch.no_grad():
        run.parameters.flat.fill_(math.nan)
    with pytest.raises(DivergedError, match="parameters are not finite at iteration 12"):
        run.save(config.output / "checkpoint.safetensors")
    assert (config.output / "checkpoint.safetensors").read_bytes() == good
    # An inner rate that makes the loss overflow: the run says so instead of going on with NaN.
    wild = dataclasses.replace(config, inner_lr=1e30, output=config.output / "wild")
    with pytest.raises(FloatingPointError, match=r"nan|inf|finite"):
        train(wild)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_training_works_in_another_thread(config):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    thread.join()
    assert [result.iteration for result in results] == [12]


def test_threads_are_set_for_the_run_only(config):
    before = torch.get_num_threads()
    train(config)
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there_is_refused(config):
    with pytest.raises(ConfigError, match=r"^device is 'nowhere', which cannot be used here"):
        train(dataclasses.replace(config, device="nowhere"))
