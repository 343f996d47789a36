"""Runs on images: what they compute, and the classes that they hold out."""

import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from maml_fast import MAML
from maml_fast.checkpoint import load_checkpoint
from maml_fast.config import ConfigError
from maml_fast.evaluate_images import StepAccuracy, evaluate_images
from maml_fast.image_data import load_images, split_images
from maml_fast.kinds import load_trained, make_run
from maml_fast.run import TASK_SEEDS
from maml_fast.run_images import VALIDATION_SEED, image_model
from maml_fast.tasks import DataError, ImageTasks
from maml_fast.train import train
from tests.image_runs import folder_run, omniglot_run, read_history
from tests.pictures import characters


@pytest.fixture
def config(tmp_path):
    return folder_run(tmp_path)


@pytest.fixture
def omniglot(tmp_path):
    return omniglot_run(tmp_path)


@pytest.mark.parametrize("clip_gradient", [0.0, 0.001])
@pytest.mark.parametrize(("inner_steps", "learn_inner_lr"), [(1, False), (2, True)])
def test_training_is_adam_on_the_gradient_through_the_inner_steps(
    config, inner_steps, learn_inner_lr, clip_gradient
):
    """The run against a plain loop: autograd task by task, and Adam on separate parameters."""
    config = dataclasses.replace(
        config,
        iterations=3,
        inner_steps=inner_steps,
        learn_inner_lr=learn_inner_lr,
        clip_gradient=clip_gradient,
        log_every=1,
        rotations=True,
    )
    result = train(config)

    training, _ = split_images(config, load_images(config))
    model = image_model(config, torch.device("cpu"))
    rate = torch.tensor(config.inner_lr, requires_grad=learn_inner_lr)
    adapting = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = [*adapting.values(), *([rate] if learn_inner_lr else [])]
    optimizer = torch.optim.Adam(trained, lr=config.meta_lr)
    tasks = ImageTasks(training, 3, rotations=True, seed=config.seed + TASK_SEEDS)
    losses, clipped = [], 0
    for _ in range(config.iterations):
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*tasks.sample(2, 1, 2), strict=True):
            fast: dict[str, torch.Tensor] = dict(adapting)
            for _ in range(inner_steps):
                loss = cross_entropy(functional_call(model, fast, support_x), support_y)
                gradients = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
                fast = {
                    name: value - rate * gradient
                    for (name, value), gradient in zip(fast.items(), gradients, strict=True)
                }
            total = total + cross_entropy(functional_call(model, fast, query_x), query_y)
        optimizer.zero_grad()
        (total / config.tasks).backward()
        if clip_gradient:
            for parameter in trained:
                clipped += int((parameter.grad.abs() > clip_gradient).sum())
                parameter.grad.clamp_(-clip_gradient, clip_gradient)
        optimizer.step()
        losses.append((total / config.tasks).item())

    assert (clipped > 0) == (clip_gradient > 0)
    found = load_trained(result.checkpoint)
    # The loss does not depend on a bias before a batch norm: Adam walks along rounding errors.
    idle = {f"{name}.bias" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    compared = {name: parameter for name, parameter in adapting.items() if name not in idle}
    assert len(compared) >= 10
    for name, parameter in compared.items():
        torch.testing.assert_close(found.model.get_parameter(name), parameter, rtol=0, atol=2e-5)
    assert found.inner_lr == pytest.approx(rate.item(), abs=2e-5)
    assert (found.inner_lr != config.inner_lr) == learn_inner_lr
    history = [line for line in read_history(config) if "loss" in line]
    assert [line["loss"] for line in history] == pytest.approx(losses, rel=1e-4)


def test_training_learns_to_adapt(config):
    config = dataclasses.replace(
        config, iterations=25, tasks=4, meta_lr=0.01, validate_every=100, backend="torch"
    )
    trained = load_trained(train(config).checkpoint)
    _, held_out = split_images(config, load_images(config))
    untrained = image_model(config, torch.device("cpu"))
    before, after = (
        evaluate_images(model, 0.5, held_out, ways=3, query_shots=5, steps=(0, 2), tasks=20)
        for model in (untrained, trained.model)
    )
    assert after.accuracies[0].accuracy < 0.5  # without a step there is nothing to tell classes by
    assert after.accuracies[1].accuracy > before.accuracies[1].accuracy + 0.05
    assert after.accuracies[1].accuracy > 0.8


def test_the_best_checkpoint_is_that_of_the_best_validation(config):
    config = dataclasses.replace(config, iterations=12, meta_lr=0.05)
    result = train(config)
    validated = {
        line["iteration"]: line["validation_accuracy"]
        for line in read_history(config)
        if "validation_accuracy" in line
    }
    assert list(validated) == [2, 4, 6, 8, 10, 12]
    assert result.best.iteration == max(validated, key=validated.get)  # the first of equals
    assert result.best.accuracy == max(validated.values())
    assert load_checkpoint(result.best.checkpoint).iteration == result.best.iteration

    # Each figure is of the model as it was, on tasks of held-out classes only.
    trained = load_trained(result.best.checkpoint)
    _, held_out = split_images(config, load_images(config))
    found = evaluate_images(
        trained.model,
        config.inner_lr,
        held_out,
        ways=3,
        query_shots=5,  # 6 images less 1 shot
        steps=(1, 2),
        tasks=4,
        seed=VALIDATION_SEED,
        backend="reference",
    ).accuracies
    assert max(row.accuracy for row in found) == result.best.accuracy
    steps = {line["iteration"]: line.get("validation_steps") for line in read_history(config)}
    (chosen,) = [row for row in found if row.steps == steps[result.best.iteration]]
    assert chosen.accuracy == result.best.accuracy


def test_the_first_of_equally_good_validations_is_the_best(config, monkeypatch):
    shares = iter([0.25, 0.5, 0.5])

    def same(*arguments, steps, **sizes):
        share = next(shares)
        return [StepAccuracy(count, share, 0.1, 0) for count in steps]

    monkeypatch.setattr("maml_fast.run_images.accuracies", same)
    result = train(config)
    validated = [line for line in read_history(config) if "validation_accuracy" in line]
    assert [line["validation_accuracy"] for line in validated] == [0.25, 0.5, 0.5]
    assert {line["validation_steps"] for line in validated} == {1}  # and the fewest steps
    assert (result.best.iteration, result.best.accuracy) == (4, 0.5)
    assert load_checkpoint(result.best.checkpoint).iteration == 4


def test_validation_changes_nothing_else(config, tmp_path):
    plain = dataclasses.replace(config, validate_every=1000, output=tmp_path / "plain")
    assert train(plain).best is None
    assert not (plain.output / "best.safetensors").exists()
    train(config)
    found, wanted = (load_file(run.output / "checkpoint.safetensors") for run in (config, plain))
    names = [name for name in wanted if not name.startswith("validation/")]
    assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_a_run_may_hold_out_nothing(config):
    config = dataclasses.replace(config, validation_classes=0)
    lines = []
    assert train(config, announce=lines.append).best is None
    assert lines == ["training on 9 classes, 54 images; none is held out for validation"]
    assert not (config.output / "best.safetensors").exists()
    assert load_checkpoint(config.output / "checkpoint.safetensors").data["held_out"] == []


def test_alphabets_are_held_out_by_name(omniglot):
    config = dataclasses.replace(omniglot, alphabets_for_validation=("Korean",))
    lines = []
    checkpoint = load_checkpoint(train(config, announce=lines.append).checkpoint)
    training, held_out = split_images(config, load_images(config))
    pixels = training.images.numpy().tobytes() + held_out.images.numpy().tobytes()
    assert checkpoint.data == {
        "training": [[name, 6] for name in characters({"Greek": 4, "Latin": 3})],
        "held_out": [[name, 6] for name in characters({"Korean": 3})],
        "sha256": hashlib.sha256(pixels).hexdigest(),
    }
    assert lines == [
        "training on 7 classes x 4 rotations, 42 images; 3 held out for validation (Korean)"
    ]


@pytest.mark.parametrize(("count", "held_out"), [(None, 3), (4, 4), (0, 0)])
def test_characters_are_held_out_at_random_by_the_seed(omniglot, count, held_out):
    def names(seed):
        config = dataclasses.replace(omniglot, validation_classes=count, seed=seed)
        training, found = split_images(config, load_images(config))
        assert len(training.names) == 10 - held_out
        assert not set(training.names) & set(found.names if found else ())
        return training.names

    assert names(1) == names(1)
    assert (len({names(seed) for seed in range(6)}) > 1) == (held_out > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 40}, "validation_classes is 40 of 10 classes in the data; wanted are at least"),
        ({"ways": 5, "validation_classes": 4}, "ways is 5, but there are 4 classes held out"),
        (
            {"ways": 9, "validation_classes": 9, "rotations": False},
            "ways is 9, but there are 1 classes to train on",
        ),
        (
            {"shots": 4, "query_shots": 3},
            "has 6 images; wanted are shots \\+ query_shots = 4 \\+ 3",
        ),
        ({"alphabets_for_validation": ("Klingon",)}, "no class or group is named 'Klingon'"),
        ({"data": ()}, "--data takes archives"),
    ],
)
def test_data_that_do_not_suffice_are_refused_before_training(
    omniglot, monkeypatch, change, message
):
    monkeypatch.setenv("MAML_FAST_OMNIGLOT_URL", "http://127.0.0.1:9/")  # where nobody answers
    change = {"download": omniglot.output / "archives"} | change
    with pytest.raises((ConfigError, DataError, OSError), match=message):
        train(dataclasses.replace(omniglot, **change))
    assert not (omniglot.output / "history.jsonl").exists()
    assert not (omniglot.output / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("data", [(), ("a", "b")])
def test_a_folder_run_wants_one_folder(config, data):
    with pytest.raises(ConfigError, match=r"^data is \[.*\]; wanted is one folder"):
        train(dataclasses.replace(config, data=tuple(map(config.output.joinpath, data))))


def test_what_does_not_train_is_left_alone(config, monkeypatch):
    def frozen(config, device):
        model = image_model(config, device)
        next(model.parameters()).requires_grad_(False)
        return model

    monkeypatch.setattr("maml_fast.run_images.image_model", frozen)
    run = make_run(config)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.step()
    changed = {
        name for name, value in run.model.state_dict().items() if not value.equal(before[name])
    }
    weights = [name for name, value in before.items() if value.dim() > 1]
    assert weights[0] not in changed
    assert set(weights[1:]) <= changed


def test_a_loaded_model_adapts(omniglot):
    trained = load_trained(train(omniglot).checkpoint)
    episodes = ImageTasks(load_images(trained.config), 3).sample(2, 1, 2)
    maml = MAML(trained.model, loss="cross_entropy", inner_lr=trained.inner_lr, backend="reference")
    assert maml(*episodes).query_outputs.shape == (2, 6, 3)
