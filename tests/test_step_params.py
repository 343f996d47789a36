"""Norms with values for each step (MAML++) on the planned backends, against the plain loop of
backend "reference"."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, UnsupportedModelError
from maml_fast.inner import SGD
from tests.family import FLAT, IMAGES, build, everything, wants_gradients, weighted
from tests.image_networks import assert_near
from tests.networks import Draw

NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
NETWORKS = {f"flat, {n}": (FLAT, n) for n in ("layer norms", "batch norm")}
NETWORKS |= {f"images, {n}": (IMAGES, n) for n in IMAGES if n != "no norm"}
OPTIONS = {
    "plain": {},
    "first order": dict(first_order=True),
    "momentum": dict(inner_optimizer=SGD(momentum=0.5, weight_decay=0.1)),
    "losses of steps": dict(step_weights=[0.1, 0.2, 0.3, 0.4]),
}


def names_of(model, which):
    """Parameters of the model's norms: all, or those that end so."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for own, _ in module.named_parameters()
        if which in ("all", own)
    ]


def make(model, backend, names, steps=3, rate=0.1, seed=50, **options):
    """Values of the steps are drawn, about the model's."""
    maml = MAML(model, "mse", rate, steps, backend=backend, step_params=names, **options)
    draw = Draw(seed)
    with torch.no_grad():
        for values in maml.step_params.values():
            values += 0.3 * draw.normal(*values.shape)
    return maml


def others_stay(model, names):
    """The rest of those norms is frozen: what adapts beside values of steps is not planned."""
    beside = {name.rsplit(".", 1)[0] for name in names}
    for name, p in model.named_parameters():
        if name not in names and name.rsplit(".", 1)[0] in beside:
            p.requires_grad_(False)


def assert_same(model, batch, names, backend, **options):
    wanted = everything(make(model, "reference", names, **options), batch)
    found = everything(make(model, backend, names, **options), batch)
    assert sum(name.startswith("step_params") for name in wanted) == len(names)
    assert_near(found, {name: tensor.detach() for name, tensor in wanted.items()}, 1e-9)


def draw_case(name):
    nets, own = NETWORKS[name]
    return build(nets, own, Draw(51), tasks=3)


def check(name, options, which, backend):
    model, batch = draw_case(name)
    names = names_of(model, which)
    others_stay(model, names)
    assert_same(model, batch, names, backend, **OPTIONS[options])


WHICH = ["all", "weight", "bias"]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_torch(name, options, which):
    check(name, options, which, "torch")


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [n for n in NETWORKS if n.startswith("flat")])
def test_flat_rows_in_cpp(engine, name, options, which):
    check(name, options, which, "cpu")


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [n for n in NETWORKS if n.startswith("images")])
def test_images_in_cpp(instructions, name, options, which):
    check(name, options, which, "cpu")


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_with_all_else(backend, name, steps):
    """Learned rates, weights of rows, gradients by the data, a head that adapts above a body."""
    model, batch = draw_case(name)
    batch = wants_gradients(weighted(batch, Draw(52), gaps=False))
    rate = nn.Parameter(torch.full((steps,), 0.1, dtype=torch.float64))
    names = names_of(model, "all")
    assert_same(model, batch, names, backend, steps=steps, rate=rate if steps else 0.1)
    head = [name for name, _ in model.named_parameters()][-2:]
    if not set(head) & set(names):
        assert_same(model, batch, names, backend, steps=steps, inner_params=head)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("other", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_numbers_of_steps(backend, name, other):
    """Fewer steps leave the last values out, of more the last ones go on."""
    model, batch = draw_case(name)
    names = names_of(model, "all")
    mamls = [make(model, one, names) for one in ("reference", backend)]
    for maml in mamls:
        maml.inner_steps = other
    wanted, found = (everything(maml, batch) for maml in mamls)
    assert_near(found, {name: tensor.detach() for name, tensor in wanted.items()}, 1e-9)
    wanted, found = (maml.adapt(*batch[:2], inner_steps=other) for maml in mamls)
    assert_near({"out": found(batch.query_x)}, {"out": wanted(batch.query_x)}, 1e-11)
    assert_near(found.parameters(), wanted.parameters(), 1e-11)


@pytest.mark.usefixtures("extension")
def test_what_is_not_planned():
    """A layer of which a part adapts; in C++, what is no norm."""
    model, batch = draw_case("flat, layer norms")
    weights, biases = names_of(model, "weight"), names_of(model, "bias")
    for backend in ("torch", "cpu"):
        with pytest.raises(UnsupportedModelError, match="others have values for each step"):
            make(model, backend, weights).plan(batch.support_x, batch.query_x)
    auto = make(model, "auto", biases)
    assert auto.plan(batch.support_x, batch.query_x).backend == "functional"
    linear = next(n for n, p in model.named_parameters() if p.dim() == 2).rsplit(".", 1)[0]
    names = [f"{linear}.weight", f"{linear}.bias"]
    with pytest.raises(UnsupportedModelError, match="values for each step of norms alone"):
        make(model, "cpu", names).plan(batch.support_x, batch.query_x)
    assert_same(model, batch, names, "torch")
