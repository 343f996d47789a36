"""Norms of flat rows in the C++ backend: every instruction set and both layouts against a plain
loop.

What is added to every row below a batch norm has no gradient but rounding: biases there are left
out. Few rows get a large eps: the xhat of two rows are -1 and 1, whatever lies below, and gradients
cancel.
"""

import functools
import itertools

import pytest
import torch
from torch import nn

from maml_fast import MAML, check, cpu_cost, cpu_features
from maml_fast.problem import TaskBatch
from tests.engines import ENGINES, LAYOUTS
from tests.networks import Draw, assert_close, by_graph, gradients

pytestmark = pytest.mark.usefixtures("extension")
FORMS = ["factored", "dense"]
KINDS = ["batch", "layer", "group"]
BOUND = 1e-9
RATE = 0.1


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    """A layout of the highest instruction set: what concerns the chain is the same in all."""
    monkeypatch.setenv(cpu_features.FORCED, ENGINES[-1])
    monkeypatch.setattr(cpu_cost, "LAYOUTS", (request.param,))
    return ENGINES[-1], request.param


def norm_of(kind, width, affine="both", eps=1e-3):
    """`affine`: "both", "gamma", "beta" or "none"; groups are of three features where they can."""
    groups = width // 3 if width % 3 == 0 else 1
    norm = {
        "batch": lambda: nn.BatchNorm1d(width, eps, affine=True, track_running_stats=False),
        "layer": lambda: nn.LayerNorm(width, eps),
        "group": lambda: nn.GroupNorm(groups, width, eps),
    }[kind]()
    if affine in ("beta", "none"):
        norm.weight = None
    if affine in ("gamma", "none"):
        norm.bias = None
    return norm


def network(kind, sizes, activation=nn.Tanh, affine="both", eps=1e-3):
    """Linear, norm, activation, over and over; the last layer is linear."""
    layers = []
    for i, o in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(i, o, bias=kind != "batch"), norm_of(kind, o, affine, eps)]
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def drawn(model, loss, tasks, rows, queries, features, seed=3):
    """The model with parameters of its own, and a batch for it."""
    draw = Draw(seed)
    model = draw.initialise(model.double())
    outputs = model(draw.normal(3, *features)).shape[-1]
    x, q = draw.normal(tasks, rows, *features), draw.normal(tasks, queries, *features)
    y = draw.target(loss, tasks, rows, features=outputs)
    return model, TaskBatch(x, y, q, draw.target(loss, tasks, queries, features=outputs))


def by_cpu(model, batch, engine, loss="mse", rate=RATE, steps=2, **options):
    """A MAML that plans this engine."""
    maml = MAML(model, loss, rate, steps, backend="cpu", **options)
    plan = maml.plan(batch.support_x, batch.query_x)
    assert (plan.cpu.instruction_set, plan.cpu.layout) == engine
    assert any("norm" in str(layer.link.op) for layer in plan.layers)
    return maml


# sizes, loss, steps, rows, query rows, tasks, eps: on both sides of every block and vector
SIZES = {
    "narrow": ((2, 2, 3, 1), "mse", 1, 2, 3, 3, 0.5),
    "two rows": ((3, 9, 7, 5, 2), "cross_entropy", 2, 2, 5, 5, 0.5),
    "odd": ((4, 17, 33, 3), "cross_entropy", 3, 7, 9, 9, 1e-3),
    "wide": ((6, 70, 9, 2), "bce_with_logits", 1, 17, 16, 1, 1e-3),
    "many rows": ((3, 6, 3), "huber", 2, 40, 33, 2, 1e-5),
    "no step": ((3, 6, 9, 3), "mse", 0, 5, 4, 9, 1e-3),
    "five steps": ((2, 5, 4, 2), "mse", 5, 6, 4, 3, 1e-2),
}


@functools.cache
def of_size(kind, case):
    sizes, loss, steps, rows, queries, tasks, eps = SIZES[case]
    model = network(kind, sizes, eps=eps)
    model, batch = drawn(model, loss, tasks, rows, queries, sizes[:1])
    return model, batch, by_graph(model, batch, loss, RATE, steps)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_equals_a_plain_loop(engine, kind, case):
    _, loss, steps, _, _, tasks, _ = SIZES[case]
    model, batch, (wanted_loss, wanted) = of_size(kind, case)
    maml = by_cpu(model, batch, engine, loss, RATE, steps, fast_weights=FORMS[tasks % 2])
    torch.testing.assert_close(maml(*batch).loss.detach(), wanted_loss, rtol=1e-10, atol=0)
    assert_close(gradients(maml, batch), wanted, BOUND)


@pytest.mark.parametrize("affine", ["gamma", "beta", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gamma_and_beta_may_be_missing(layout, kind, affine):
    """Torch itself has no second derivative of beta without gamma, and not even the first for
    groups."""
    if (kind, affine) == ("group", "beta"):
        affine = "none"
    first_order = affine == "beta"
    model = network(kind, (3, 6, 9, 2), nn.Softplus, affine)
    model, batch = drawn(model, "mse", 5, 6, 4, (3,))
    wanted = by_graph(model, batch, "mse", RATE, 2, first_order)[1]
    maml = by_cpu(model, batch, layout, first_order=first_order)
    assert_close(gradients(maml, batch), wanted, BOUND)


# Rows of shape [2, 3]; every activation before and behind a norm, in place or not, and what it
# stands beside.
PLACES = {
    "first": lambda norm: [nn.Flatten(), norm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)],
    "first and alone": lambda norm: [nn.Flatten(), norm(6)],
    "last": lambda norm: [nn.Flatten(), nn.Linear(6, 5, bias=False), norm(5)],
    "two in a row": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9, bias=False), norm(9), nn.LayerNorm(9), nn.Tanh(),
        nn.Linear(9, 2),
    ],
    "ReLU on both sides": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), norm(9), nn.ReLU(), norm(9), nn.Linear(9, 2),
        nn.ReLU(), norm(2),
    ],
    "tanh on both sides": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9), nn.Tanh(), norm(9), nn.Tanh(), nn.Linear(9, 3),
    ],
    "other activations on both sides": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9), nn.SiLU(), norm(9), nn.GELU(), nn.LeakyReLU(0.3), norm(9),
        nn.LeakyReLU(0.2), nn.Linear(9, 3), nn.Sigmoid(),
    ],
    "several activations in a row": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.Sigmoid(), norm(9), nn.ReLU(), nn.Tanh(),
        nn.ReLU(), norm(9), nn.Linear(9, 3),
    ],
    "behind positions": lambda norm: [
        nn.Linear(3, 3), nn.Tanh(), nn.Flatten(), norm(6), nn.Linear(6, 3),
    ],
    "before and behind a frozen layer": lambda norm: [
        nn.Flatten(), nn.Linear(6, 5, bias=False), norm(5), nn.Linear(5, 9).requires_grad_(False),
        nn.ReLU(), norm(9), nn.Softplus(), nn.Linear(9, 3),
    ],
    "frozen": lambda norm: [
        nn.Flatten(), nn.Linear(6, 5, bias=False), norm(5).requires_grad_(False), nn.Tanh(),
        nn.Linear(5, 3),
    ],
    "below all that adapts": lambda norm: [
        nn.Flatten(), norm(6).requires_grad_(False), nn.Linear(6, 9).requires_grad_(False),
        norm(9).requires_grad_(False), nn.Tanh(), norm(9).requires_grad_(False), nn.Linear(9, 3),
    ],
    "the first that adapts, behind frozen ones": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9).requires_grad_(False), nn.ReLU(), norm(9), nn.ReLU(),
        nn.Linear(9, 3),
    ],
    "before a layer whose bias adapts": lambda norm: [
        nn.Flatten(), nn.Linear(6, 9, bias=False), norm(9), nn.ReLU(),
        *[nn.Linear(9, 4)], nn.Tanh(), norm(4),
    ],
}  # fmt: skip


@functools.cache
def of_place(place, kind, steps, first_order):
    layers = PLACES[place](functools.partial(norm_of, kind))
    model = nn.Sequential(*layers)
    if place.startswith("before a layer whose bias"):
        model[4].weight.requires_grad_(False)
    model, batch = drawn(model, "mse", 5, 5, 4, (2, 3), seed=11)
    rate = nn.Parameter(torch.full((), RATE, dtype=torch.float64))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = by_graph(model, batch, "mse", dict.fromkeys(names, rate), steps, first_order)[1]
    by_rate = wanted[f"rate of {names[0]}"]
    return model, batch, {name: wanted[name] for name in names}, by_rate


@pytest.mark.parametrize(
    ("kind", "steps", "first_order"),
    [
        *((kind, 2, False) for kind in KINDS),
        ("batch", 2, True),
        ("layer", 2, True),
        ("batch", 0, False),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_odd_places(layout, place, kind, steps, first_order):
    """With a learned rate."""
    model, batch, wanted, by_rate = of_place(place, kind, steps, first_order)
    rate = nn.Parameter(torch.full((), RATE, dtype=torch.float64))
    options = dict(first_order=first_order, fast_weights=FORMS[len(place) % 2])
    maml = by_cpu(model, batch, layout, "mse", rate, steps, **options)
    assert_close(gradients(maml, batch), wanted, BOUND)
    torch.testing.assert_close(rate.grad, by_rate, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_frozen_parameters(layout, kind, first_order):
    """Learned rates of gamma and beta, one of them frozen, and a norm whose beta alone adapts as
    the first layer that does."""
    model = nn.Sequential(
        nn.Linear(3, 9).requires_grad_(False), nn.Tanh(), norm_of(kind, 9), nn.Tanh(),
        nn.Linear(9, 6, bias=False), norm_of(kind, 6), nn.Tanh(), nn.Linear(6, 2),
    )  # fmt: skip
    model[2].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    model, batch = drawn(model, "mse", 5, 4, 5, (3,))
    adapting = [name for name, p in model.named_parameters() if p.requires_grad]
    assert adapting == ["2.bias", "4.weight", "5.weight", "7.weight", "7.bias"]
    rates = {
        name: nn.Parameter(torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)) for name in adapting
    }
    rates["7.bias"] = 0.15
    wanted = by_graph(model, batch, "mse", rates, 3, first_order)[1]
    for form in FORMS:
        for rate in list(rates.values())[:-1]:
            rate.grad = None
        options = dict(first_order=first_order, fast_weights=form)
        maml = by_cpu(model, batch, layout, "mse", rates, 3, **options)
        found = gradients(maml, batch)
        learned = {f"rate of {n}": r.grad for n, r in rates.items() if isinstance(r, nn.Parameter)}
        assert_close(found | learned, wanted, BOUND)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 3])
def test_adapted_models(layout, kind, steps):
    model = network(kind, (3, 6, 9, 2))
    model[1].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    model, batch = drawn(model, "mse", 9, 4, 5, (3,))
    wanted = MAML(model, inner_lr=0.2, inner_steps=steps, backend="reference").adapt(*batch[:2])
    for form in FORMS:
        maml = by_cpu(model, batch, layout, "mse", 0.2, steps, fast_weights=form)
        adapted = maml.adapt(*batch[:2])
        found = {"losses": adapted.support_losses, "outputs": adapted(batch.query_x)}
        right = {"losses": wanted.support_losses, "outputs": wanted(batch.query_x)}
        assert_close(found | adapted.parameters(), right | wanted.parameters(), 1e-10)


def test_a_feature_without_variance(layout):
    """r is 1 / sqrt(eps) there, and xhat 0."""
    model = nn.Sequential(norm_of("batch", 3), nn.Linear(3, 5), nn.Tanh(), norm_of("batch", 5))
    model, batch = drawn(model, "mse", 3, 5, 4, (3,))
    for x in (batch.support_x, batch.query_x):
        x[..., 1] = 0.25
    wanted = by_graph(model, batch, "mse", RATE, 2)[1]
    assert_close(gradients(by_cpu(model, batch, layout), batch), wanted, BOUND)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32(engine, form, kind):
    """At most twice autograd's error."""
    model, batch = drawn(network(kind, (5, 18, 9, 3)), "mse", 5, 6, 7, (5,))
    batch = TaskBatch(*(tensor.float() for tensor in batch[:4]))
    maml = by_cpu(model.float(), batch, engine, "mse", 0.05, fast_weights=form)
    report = check(maml, *batch)
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize("own_threads", [False, True])
def test_same_bits_on_any_number_of_threads(layout, kind, own_threads, threads):
    model, batch = drawn(network(kind, (4, 24, 9, 3), nn.ReLU), "mse", 150, 5, 6, (4,))
    batch = TaskBatch(*(tensor.float() for tensor in batch[:4]))
    maml = by_cpu(model.float(), batch, layout)
    found = []
    if own_threads:
        cpu_features.extension().share_openmp(0)
    try:
        for count in (1, 2, 4):
            threads(count)
            out = {name: g.clone() for name, g in gradients(maml, batch).items()}
            found.append({**out, "loss": maml(*batch).loss.detach()})
    finally:
        cpu_features.extension.cache_clear()
        cpu_features.extension()
    for other in found[1:]:
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())
