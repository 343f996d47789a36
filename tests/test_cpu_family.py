"""What the C++ backend has of the MAML family, on every instruction set and layout.

Against the plain loop of backend "reference": rows that count by weights, gradients by the data,
and heads that adapt above what learns. Inner rules: test_cpu_rules.py.
"""

import pytest
import torch
from torch import nn

from maml_fast import MAML, check
from maml_fast.inner import SGD
from maml_fast.problem import TaskBatch
from tests.family import (
    CLASSES,
    FLAT,
    FORMS,
    IMAGES,
    LOSSES,
    QUERIES,
    ROWS,
    TASKS,
    assert_same,
    build,
    everything,
    wants_gradients,
    weighted,
)
from tests.image_networks import assert_near
from tests.networks import Draw

pytestmark = pytest.mark.usefixtures("extension")


# ---- weights of rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_rows(engine, form, loss):
    draw = Draw(3)
    model, batch = build(FLAT, "linear", draw, loss)
    assert_same(model, weighted(batch, draw), loss, fast_weights=form)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", IMAGES)
def test_weights_of_rows_of_images(instructions, name, loss):
    draw = Draw(4)
    model, batch = build(IMAGES, name, draw, loss, tasks=2)
    assert_same(model, weighted(batch, draw), loss)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "layer norms", "positions"])
def test_weights_of_rows_with_norms(engine, name, gaps):
    draw = Draw(5)
    model, batch = build(FLAT, name, draw)
    assert_same(model, weighted(batch, draw, gaps))


def test_weights_of_one_set_of_rows(engine):
    """Without steps too, and with all rows of a task alike: the plain mean."""
    draw = Draw(6)
    model, batch = build(FLAT, "linear", draw)
    whole = weighted(batch, draw, gaps=False)
    assert_same(model, whole._replace(support_weight=None))
    assert_same(model, whole._replace(query_weight=None))
    assert_same(model, whole, steps=0)
    maml = MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu")
    alike = batch._replace(
        support_weight=torch.full((TASKS, ROWS), 3.0), query_weight=torch.ones(TASKS, QUERIES) > 0
    )
    assert_near(everything(maml, alike), everything(maml, batch), 1e-13)


def test_adapted_by_weighted_rows(engine):
    draw = Draw(7)
    model, batch = build(FLAT, "linear", draw)
    weight = weighted(batch, draw).support_weight
    wanted, found = (
        MAML(model, inner_lr=0.2, inner_steps=3, backend=backend).adapt(
            *batch[:2], support_weight=weight
        )
        for backend in ("reference", "cpu")
    )
    q = batch.query_x
    right = {"outputs": wanted(q), "losses": wanted.support_losses}
    assert_near(
        {"outputs": found(q), "losses": found.support_losses} | found.parameters(),
        right | wanted.parameters(),
        1e-11,
    )


def test_weights_of_rows_in_float32(engine):
    """At most twice autograd's error."""
    draw = Draw(8)
    model, batch = build(FLAT, "linear", draw)
    batch = weighted(batch, draw).map(lambda t: t.float())
    report = check(MAML(model.float(), inner_lr=0.05, inner_steps=2, backend="cpu"), *batch)
    assert report.passed, str(report)


# ---- gradients by the data


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FLAT)
def test_gradients_by_the_data(engine, name, form, first_order):
    model, batch = build(FLAT, name, Draw(9))
    maml = assert_same(
        model, wants_gradients(batch), steps=3, fast_weights=form, first_order=first_order
    )
    assert first_order == (not batch.support_x.grad.any())
    assert batch.query_x.grad.all()
    plan = maml.plan(batch.support_x, batch.query_x)
    assert {layer.form for layer in plan.layers if layer.use} == {form}


def test_gradients_by_rows_with_positions_of_backend_torch():
    model, batch = build(FLAT, "positions", Draw(9))
    wanted, found = (
        everything(MAML(model, inner_lr=0.1, backend=backend), wants_gradients(batch))
        for backend in ("reference", "torch")
    )
    assert_near(found, {name: tensor.detach() for name, tensor in wanted.items()}, 1e-9)


@pytest.mark.parametrize("name", IMAGES)
def test_gradients_by_images(instructions, name):
    model, batch = build(IMAGES, name, Draw(10), tasks=2)
    for steps in (0, 1, 3):
        assert_same(model, wants_gradients(batch), steps=steps)


@pytest.mark.parametrize("replays", [False, True])
def test_gradients_by_images_where_steps_are_computed_again(instructions, replays):
    """Of so many rows that not all steps' values are kept."""
    draw = Draw(11)
    model, _ = build(IMAGES, "no norm", draw)
    rows = 1500 if replays else 3
    x, q = draw.normal(1, rows, 2, 5, 4), draw.normal(1, 2, 2, 5, 4)
    y, yq = (draw.normal(1, n, CLASSES) for n in (rows, 2))
    batch = wants_gradients(TaskBatch(x, y, q, yq))
    maml = assert_same(model, batch, steps=3)
    assert maml.plan(x, q).cpu.replays == replays


def test_gradients_by_the_data_alone(engine):
    """Nothing adapts, or nothing learns; weights of rows and frozen layers below."""
    draw = Draw(12)
    model, batch = build(FLAT, "linear", draw)
    batch = wants_gradients(weighted(batch, draw, gaps=False))
    assert_same(model, batch, steps=0)
    model[0].requires_grad_(False)
    assert_same(model, batch)
    model.requires_grad_(False)
    assert_same(model, batch)


@pytest.mark.parametrize("form", FORMS)
def test_only_a_bias_adapts(engine, form):
    model, batch = build(FLAT, "linear", Draw(13))
    inner = ["0.bias", "2.weight"]
    assert_same(model, wants_gradients(batch), inner_params=inner, fast_weights=form)


# ---- what learns below all that adapts


@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (4, False), (4, True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FLAT)
def test_heads_that_adapt_alone(engine, name, form, steps, first_order):
    model, batch = build(FLAT, name, Draw(14))
    head = [n for n, _ in model.named_parameters()][-2:]
    options = dict(inner_params=head, fast_weights=form, first_order=first_order)
    maml = assert_same(model, batch, steps=steps, **options)
    plan = maml.plan(batch.support_x, batch.query_x)
    assert not plan.body
    assert [layer.form for layer in plan.layers if layer.still] == ["shared"] * bodies(model, head)
    assert_same(model, wants_gradients(batch), steps=steps, **options)


def bodies(model, head):
    """How many layers learn below the head."""
    names = [name for name, _ in model.named_parameters() if name not in head]
    return len({name.rsplit(".", 1)[0] for name in names})


@pytest.mark.parametrize("learned", [["0.weight"], ["2.bias"], ["0.bias", "2.weight"]])
@pytest.mark.parametrize("gaps", [None, False, True])
def test_some_of_a_body_learns(engine, learned, gaps):
    """The rest is frozen; below it nothing is to be had."""
    draw = Draw(18)
    model, batch = build(FLAT, "linear", draw)
    if gaps is not None:
        batch = weighted(batch, draw, gaps)
    for name, p in model.named_parameters():
        p.requires_grad_(name in learned or name.startswith("4"))
    assert_same(model, batch, inner_params=["4.*"])
    assert_same(model, wants_gradients(batch), inner_params=["4.*"])


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_heads_of_images(instructions, name, inputs):
    draw = Draw(15)
    model, batch = build(IMAGES, name, draw, tasks=2)
    head = [n for n, _ in model.named_parameters()][-2:]
    upper = [n for n, _ in model.named_parameters()][-4:]  # images enter what adapts
    batch = wants_gradients(batch) if inputs else weighted(batch, draw, gaps=False)
    for inner in (head, upper):
        for steps, first_order in ((0, False), (2, False), (3, True)):
            options = dict(steps=steps, first_order=first_order, inner_params=inner)
            maml = assert_same(model, batch, **options)
            plan = maml.plan(batch.support_x, batch.query_x)
            assert not plan.body
            still = {layer.form for layer in plan.layers if layer.still}
            assert still == {"shared"}


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("learned", ["0.weight", "1.bias", "2.weight", "3.bias", "none"])
@pytest.mark.parametrize("name", IMAGES)
def test_some_of_a_body_of_images_learns(instructions, name, learned, inputs):
    draw = Draw(33)
    model, batch = build(IMAGES, name, draw, tasks=2)
    head = [n for n, _ in model.named_parameters()][-2:]
    for n, p in model.named_parameters():
        p.requires_grad_(n == learned or n in head)
    batch = wants_gradients(batch) if inputs else batch
    assert_same(model, batch, inner_params=head)


def test_a_body_that_adapts_alone(engine):
    model, batch = build(FLAT, "layer norms", Draw(16))
    assert_same(model, batch, inner_params=["1.weight", "1.bias"], steps=3)


def test_adapted_heads(engine):
    model, batch = build(FLAT, "linear", Draw(17))
    wanted, found = (
        MAML(model, inner_lr=0.2, backend=backend, inner_params=["4.weight"]).adapt(*batch[:2])
        for backend in ("reference", "cpu")
    )
    q = batch.query_x
    assert_near({"out": found(q)}, {"out": wanted(q)}, 1e-11)
    assert_near(found.parameters(), wanted.parameters(), 1e-11)


# ---- losses of several steps

STEP_WEIGHTS = {
    "all": [0.1, 0.4, 0.2, 0.3],
    "not the last": [0.5, 0, 1.5, 0],
    "the last": [0, 0, 0, 2.0],
}


@pytest.mark.parametrize("weights", STEP_WEIGHTS)
@pytest.mark.parametrize("name", FLAT)
def test_losses_of_steps(engine, name, weights):
    """With all else that they go with: learned rates, momentum, weights of rows, the data's own
    gradients."""
    draw = Draw(30)
    model, batch = build(FLAT, name, draw)
    batch = wants_gradients(weighted(batch, draw, gaps=False))
    rate = nn.Parameter(torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64))
    options = dict(step_weights=STEP_WEIGHTS[weights])
    assert_same(model, batch, rate=rate, steps=3, **options)
    assert_same(model, batch, rate=rate, steps=3, first_order=True, **options)
    assert_same(model, batch, steps=3, inner_optimizer=SGD(momentum=0.5), **options)


@pytest.mark.parametrize("weights", STEP_WEIGHTS)
@pytest.mark.parametrize("name", IMAGES)
def test_losses_of_steps_of_images(instructions, name, weights):
    draw = Draw(31)
    model, batch = build(IMAGES, name, draw, tasks=2)
    batch = weighted(batch, draw, gaps=False)
    head = [n for n, _ in model.named_parameters()][-2:]
    for inner_params in (None, head):
        options = dict(step_weights=STEP_WEIGHTS[weights], inner_params=inner_params)
        assert_same(model, batch, steps=3, **options)


def test_losses_of_more_steps_than_programs_are_kept(engine):
    model, batch = build(FLAT, "linear", Draw(32))
    weights = [0.05 * (k + 1) for k in range(13)]
    assert_same(model, batch, rate=0.02, steps=12, step_weights=weights)
