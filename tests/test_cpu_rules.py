"""Inner rules with momentum and weight decay in the C++ backend, on all engines and layouts.

Against the plain loop of backend "reference", with all else that the family has.
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
    assert_same,
    build,
    everything,
    wants_gradients,
    weighted,
)
from tests.image_networks import assert_near
from tests.networks import Draw

pytestmark = pytest.mark.usefixtures("extension")


RULES = {
    "momentum": SGD(momentum=0.7),
    "nesterov": SGD(momentum=0.5, nesterov=True),
    "decay": SGD(weight_decay=0.2),
    "all": SGD(momentum=0.6, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(engine, rule, form, first_order):
    """Of all steps one rate; the case with biases, and a layer without."""
    model, batch = build(FLAT, "linear", Draw(18))
    options = dict(inner_optimizer=RULES[rule], fast_weights=form, first_order=first_order)
    for steps in (0, 1, 4):
        maml = assert_same(model, batch, steps=steps, **options)
        plan = maml.plan(batch.support_x, batch.query_x)
        assert {layer.form for layer in plan.layers if layer.use} == {form}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FLAT)
def test_rules_with_rates_of_steps_and_gradients_by_the_data(engine, name, rule, form):
    model, batch = build(FLAT, name, Draw(19))
    batch = wants_gradients(batch)
    rates = {
        n: torch.tensor([0.1, 0.05 * i, 0.2]) for i, (n, _) in enumerate(model.named_parameters())
    }
    assert_same(model, batch, rate=rates, steps=3, inner_optimizer=RULES[rule], fast_weights=form)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FLAT)
def test_rules_with_learned_rates(engine, name, rule, first_order):
    """Weights are dense then: the gradient of a rate asks for each step's direction."""
    model, batch = build(FLAT, name, Draw(20))
    rate = nn.Parameter(torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64))
    options = dict(inner_optimizer=RULES[rule], first_order=first_order)
    maml = assert_same(model, batch, rate=rate, steps=3, **options)
    plan = maml.plan(batch.support_x, batch.query_x)
    assert {layer.form for layer in plan.layers if layer.use} == {"dense"}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", IMAGES)
def test_rules_of_images(instructions, name, rule, first_order, learned):
    model, batch = build(IMAGES, name, Draw(21), tasks=2)
    rate = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)
    options = dict(inner_optimizer=RULES[rule], first_order=first_order)
    rates = nn.Parameter(rate) if learned else rate
    assert_same(model, batch, rate=rates, steps=3, **options)


def test_rules_of_images_where_steps_are_computed_again(instructions):
    draw = Draw(22)
    model, _ = build(IMAGES, "layer norm first", draw)
    x, q = draw.normal(1, 1500, 2, 5, 4), draw.normal(1, 2, 2, 5, 4)
    y, yq = (draw.normal(1, n, CLASSES) for n in (1500, 2))
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    batch = TaskBatch(x, y, q, yq)
    maml = assert_same(model, batch, rate=rate, steps=3, inner_optimizer=RULES["all"])
    assert maml.plan(x, q).cpu.replays


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_adapted_by_rules(engine, rule, form):
    model, batch = build(FLAT, "linear", Draw(23))
    wanted, found = (
        MAML(model, inner_lr=0.2, inner_steps=3, inner_optimizer=RULES[rule], **options).adapt(
            *batch[:2]
        )
        for options in (dict(backend="reference"), dict(backend="cpu", fast_weights=form))
    )
    right = {"out": wanted(batch.query_x)} | wanted.parameters()
    assert_near({"out": found(batch.query_x)} | found.parameters(), right, 1e-11)


def test_the_same_bits_from_any_number_of_threads(engine, threads):
    draw = Draw(24)
    model, batch = build(FLAT, "linear", draw, tasks=70)
    batch = wants_gradients(weighted(batch, draw, gaps=False))
    maml = MAML(model, inner_lr=0.1, inner_steps=3, backend="cpu", inner_optimizer=RULES["all"])
    threads(1)
    wanted = everything(maml, batch)
    threads(3)
    for name, tensor in everything(maml, batch).items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_rules_in_float32(engine, form):
    """At most twice autograd's error."""
    model, batch = build(FLAT, "linear", Draw(25))
    maml = MAML(
        model.float(),
        inner_lr=0.05,
        inner_steps=3,
        backend="cpu",
        inner_optimizer=RULES["all"],
        fast_weights=form,
    )
    report = check(maml, *batch.map(lambda t: t.float()))
    assert report.passed, str(report)


# ---- rates of single numbers


def rates_by_number(model, draw, which, learned, steps):
    """Of every parameter, of weights or of biases alone; those of the last step alike by step."""
    kinds = {"all": "", "weights": "weight", "biases": "bias"}
    found = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if not name.endswith(kinds[which]):
            found[name] = 0.1
            continue
        rates = 0.15 * draw.normal(1 if i == 1 else steps, *p.shape).abs()
        found[name] = nn.Parameter(rates) if learned else rates
    return found


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("which", ["all", "weights", "biases"])
@pytest.mark.parametrize("name", FLAT)
def test_rates_by_number(engine, name, which, learned):
    draw = Draw(40)
    model, batch = build(FLAT, name, draw)
    batch = wants_gradients(weighted(batch, draw, gaps=False))
    rates = rates_by_number(model, draw, which, learned, steps=3)
    for options in (
        {},
        dict(first_order=True),
        dict(inner_optimizer=RULES["all"]),
        dict(step_weights=[0.1, 0.2, 0.3, 0.4]),
    ):
        assert_same(model, batch, rate=rates, steps=3, **options)
    one = {n: r[:1] if isinstance(r, torch.Tensor) else r for n, r in rates.items()}
    assert_same(model, batch, rate=one, steps=1)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("which", ["all", "weights", "biases"])
@pytest.mark.parametrize("name", IMAGES)
def test_rates_by_number_of_images(instructions, name, which, learned):
    draw = Draw(41)
    model, batch = build(IMAGES, name, draw, tasks=2)
    batch = wants_gradients(batch)
    rates = rates_by_number(model, draw, which, learned, steps=3)
    for options in ({}, dict(first_order=True), dict(inner_optimizer=RULES["nesterov"])):
        assert_same(model, batch, rate=rates, steps=3, **options)


@pytest.mark.parametrize("learned", [False, True])
def test_rates_by_number_of_a_head(engine, learned):
    draw = Draw(42)
    model, batch = build(FLAT, "linear", draw)
    weight = model[4].weight
    rates = 0.1 * draw.normal(2, *weight.shape).abs()
    rate = {"4.weight": nn.Parameter(rates) if learned else rates}
    assert_same(model, batch, rate=rate, inner_params=["4.weight"])


def test_rates_by_number_where_steps_are_computed_again(instructions):
    draw = Draw(43)
    model, _ = build(IMAGES, "no norm", draw)
    x, q = draw.normal(1, 1500, 2, 5, 4), draw.normal(1, 2, 2, 5, 4)
    batch = TaskBatch(x, draw.normal(1, 1500, CLASSES), q, draw.normal(1, 2, CLASSES))
    rates = rates_by_number(model, draw, "all", True, steps=3)
    assert assert_same(model, batch, rate=rates, steps=3).plan(x, q).cpu.replays


def test_adapted_with_rates_by_number(engine):
    draw = Draw(44)
    model, batch = build(FLAT, "linear", draw)
    rates = rates_by_number(model, draw, "all", False, steps=2)
    wanted, found = (
        MAML(model, "mse", rates, 2, backend=backend).adapt(*batch[:2])
        for backend in ("reference", "cpu")
    )
    q = batch.query_x
    assert_near(
        {"out": found(q)} | found.parameters(), {"out": wanted(q)} | wanted.parameters(), 1e-11
    )


def test_rates_by_number_in_float32(engine):
    """At most twice autograd's error; rates in float64 are taken as float32."""
    draw = Draw(45)
    model, batch = build(FLAT, "linear", draw)
    rates = rates_by_number(model, draw, "all", True, steps=2)
    maml = MAML(model.float(), "mse", rates, 2, backend="cpu")
    report = check(maml, *batch.map(lambda t: t.float()))
    assert report.passed, str(report)


@pytest.mark.parametrize("rows", [(40, 2), (2, 40)])
@pytest.mark.parametrize("width", [6, 80])
def test_rules_without_steps(engine, rows, width):
    """Whose first layer has nothing to keep of the support; of the losses of several steps, too."""
    draw = Draw(46)
    layers = [nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, CLASSES)]
    model = draw.initialise(nn.Sequential(*layers).double())
    x, q = (draw.normal(3, n, width) for n in rows)
    y, yq = (draw.normal(3, n, CLASSES) for n in rows)
    batch = TaskBatch(x, y, q, yq)
    options = dict(inner_optimizer=RULES["all"], fast_weights="factored")
    assert_same(model, batch, steps=0, **options)
    assert_same(model, batch, steps=2, step_weights=[0.3, 0.3, 0.4], **options)
