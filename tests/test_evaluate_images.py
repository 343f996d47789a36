"""Evaluation on images: its numbers against a plain recomputation, and the classes it is on."""

import json
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from maml_fast import MAML
from maml_fast import evaluate_images as module
from maml_fast.config import ConfigError
from maml_fast.config_images import OmniglotConfig
from maml_fast.evaluate_images import (
    answer_task,
    evaluate_images,
)
from maml_fast.image_data import DataIdentity, evaluation_images, query_shots_for
from maml_fast.tasks import DataError, ImageSet, ImageTasks
from tests.pictures import characters, make_archive

WAYS, SHOTS, QUERIES = 3, 2, 4


@pytest.fixture
def images():
    """Seven classes of 6 to 9 images of 4 x 4."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.tensor([0, 6, 12, 19, 25, 33, 42, 48])
    pixels = torch.randint(256, (48, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, starts, tuple(f"class {i}" for i in range(7)), invert=False)


@pytest.fixture
def model():
    """With a batch norm, so that predictions depend on a task's other rows."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.Tanh(),
        nn.Linear(8, WAYS),
    ).double()


def predicted(model, inner_lr, steps, support_x, support_y, query_x):
    """One task's classes after plain gradient descent."""
    fast = {name: value.detach() for name, value in model.named_parameters()}
    for _ in range(steps):
        fast = {name: value.requires_grad_(True) for name, value in fast.items()}
        loss = cross_entropy(functional_call(model, fast, support_x), support_y)
        gradients = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: (value - inner_lr * gradient).detach()
            for (name, value), gradient in zip(fast.items(), gradients, strict=True)
        }
    return functional_call(model, fast, query_x).argmax(1)


@pytest.mark.parametrize("pixels", [2**21, 1])  # all tasks at once, and one at a time
@pytest.mark.parametrize("rotations", [False, True])
def test_accuracies_are_those_of_plain_gradient_descent(
    model, images, monkeypatch, pixels, rotations
):
    monkeypatch.setattr(module, "PIXELS", pixels)
    steps = (0, 1, 4)
    found = evaluate_images(
        model,
        0.5,
        images,
        ways=WAYS,
        shots=SHOTS,
        query_shots=QUERIES,
        steps=steps,
        tasks=6,
        rotations=rotations,
        seed=11,
        backend="reference",
    )
    sampler = ImageTasks(images, WAYS, rotations=rotations, seed=11, dtype=torch.float64)
    batches = [6] if pixels > 1 else [1] * 6
    tasks = [
        task for size in batches for task in zip(*sampler.sample(size, SHOTS, QUERIES), strict=True)
    ]
    for row, count in zip(found.accuracies, steps, strict=True):
        shares = []
        for support_x, support_y, query_x, query_y in tasks:
            answers = predicted(model, 0.5, count, support_x, support_y, query_x)
            shares.append((answers == query_y).sum().item() / (WAYS * QUERIES))
        mean = sum(shares) / 6
        variance = sum((share - mean) ** 2 for share in shares) / 5
        assert (row.steps, row.diverged) == (count, 0)
        assert row.accuracy == pytest.approx(mean, rel=1e-12)
        assert row.ci95 == pytest.approx(1.96 * math.sqrt(variance / 6), rel=1e-9)
    assert len({row.accuracy for row in found.accuracies}) > 1
    assert (found.classes, found.tasks, found.rotations) == (7, 6, rotations)


def test_tasks_that_diverge_are_counted_and_wrong(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, WAYS)).double()
    options = dict(ways=WAYS, shots=SHOTS, query_shots=QUERIES, steps=(0, 3), tasks=5)
    found = evaluate_images(model, 1e200, images, backend="reference", **options)
    before, after = found.accuracies
    assert (before.diverged, after.diverged) == (0, 5)
    assert before.accuracy > 0.1
    assert after.accuracy == 0
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["accuracies"][1] == {"steps": 3, "accuracy": 0, "ci95": 0, "diverged": 5}


def test_a_row_whose_prediction_is_not_finite_has_no_class(model, images, monkeypatch):
    """Of tasks that were adapted, too: argmax would take NaN and infinity for the largest."""
    broken = {(0, 0): math.nan, (0, 5): math.inf, (2, 3): -math.inf}  # (task kept, row): a logit

    def adapted(maml, support_x, support_y, x, steps):
        kept = torch.tensor([0, 2, 3])  # task 1 overflows while it is adapted
        outputs = maml.adapt(support_x[kept], support_y[kept], inner_steps=steps)(x[kept])
        for (task, row), value in broken.items():
            outputs[task, row, 1] = value
        return kept, outputs

    monkeypatch.setattr(module, "adapted_outputs", adapted)
    sampler = ImageTasks(images, WAYS, seed=4, dtype=torch.float64)
    support_x, support_y, query_x, _ = sampler.sample(4, SHOTS, QUERIES)
    maml = MAML(model, loss="cross_entropy", inner_lr=0.5, backend="reference")
    found = module._predicted(maml, support_x, support_y, query_x, 2)
    for task in (0, 2, 3):
        wanted = predicted(model, 0.5, 2, support_x[task], support_y[task], query_x[task])
        for row in [row for kept, row in broken if (0, 2, 3)[kept] == task]:
            wanted[row] = -1
        assert torch.equal(found[task], wanted)
    assert (found[1] == -1).all()

    sampler = ImageTasks(images, WAYS, seed=4, dtype=torch.float64)
    (row,) = module.accuracies(maml, sampler, shots=SHOTS, query_shots=QUERIES, steps=(2,), tasks=4)
    assert row.diverged == 3  # tasks 0, 1 and 3


def test_an_evaluation_leaves_the_model_as_it_was_and_the_seed_fixes_it(model, images):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options = dict(ways=WAYS, query_shots=QUERIES, tasks=4, backend="reference")
    one, two = (evaluate_images(model, 0.5, images, seed=5, **options) for _ in range(2))
    assert one == two
    assert evaluate_images(model, 0.5, images, seed=6, **options).accuracies != one.accuracies
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_answers_to_a_task_are_the_adapted_models(model, images):
    options = dict(ways=WAYS, shots=SHOTS, query_shots=QUERIES, seed=9)
    found = answer_task(model, 0.5, images, steps=2, backend="reference", **options)
    sampler = ImageTasks(images, WAYS, seed=9, dtype=torch.float64)
    support_x, support_y, query_x, query_y = (part[0] for part in sampler.sample(1, SHOTS, QUERIES))
    assert torch.equal(found.support_x, support_x)
    assert torch.equal(found.query_y, query_y)
    wanted = predicted(model, 0.5, 2, support_x, support_y, query_x)
    assert torch.equal(found.predicted, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 1}, "tasks is 1; wanted are at least 2"),
        ({"steps": ()}, r"steps is \(\); wanted"),
        ({"steps": (1, -1)}, r"steps is \(1, -1\); wanted"),
        ({"shots": 0}, "shots is 0; wanted"),
        ({"query_shots": 0}, "query_shots is 0; wanted"),
        ({"shots": 3, "query_shots": 4}, "has 6 images; wanted are at least"),
        ({"ways": 8}, "the data has 7 classes; wanted are 8"),
        ({"seed": -1}, "seed is -1; wanted"),
        ({"backend": "fast"}, "backend is 'fast'; wanted is one of"),
    ],
)
def test_a_bad_argument_is_named(model, images, options, message):
    options = {"ways": WAYS, "query_shots": 1, "tasks": 2, "backend": "reference"} | options
    with pytest.raises((ValueError, DataError), match=message):
        evaluate_images(model, 0.5, images, **options)


def test_there_are_as_many_queries_as_images_up_to_fifteen(images):
    assert query_shots_for(images, shots=2) == 4
    assert query_shots_for(images, shots=6) == 1  # then drawing tasks says what is missing
    pixels, starts = torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 20, 40])
    plenty = ImageSet(pixels, starts, ("a", "b"), invert=False)
    assert query_shots_for(plenty, shots=1) == 15


def test_classes_to_evaluate_on(tmp_path):
    archive = make_archive(tmp_path / "one.zip", {"Greek": 4, "Latin": 3})
    other = make_archive(tmp_path / "two.zip", {"Latin": 4})
    config = OmniglotConfig(data=(archive,), ways=3)
    trained_on = {
        "training": [[name, 6] for name in characters({"Greek": 4})],
        "held_out": [[name, 6] for name in characters({"Latin": 3})],
    }
    assert DataIdentity.from_dict(trained_on).to_dict() == trained_on

    def names(which, data=()):
        return list(evaluation_images(config, trained_on, data, which).names)

    assert names("held-out") == characters({"Latin": 3})
    assert names("train") == characters({"Greek": 4})
    assert names("all") == characters({"Greek": 4, "Latin": 3})
    assert names("held-out", [other]) == characters({"Latin": 4})  # one that the run never saw
    with pytest.raises(
        ConfigError, match="classes is 'train', of which the data has 0; wanted are"
    ):
        names("train", [other])
    config = OmniglotConfig(data=(archive,), ways=4)
    with pytest.raises(ConfigError, match="of which the data has 3; .* give others with --data"):
        names("held-out")
