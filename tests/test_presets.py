"""The papers' variants by name: what each sets, and what comes of it against the reference."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, PositiveRate, presets
from tests.image_networks import assert_near
from tests.networks import Draw, gradients

SIZES = (4, 6, 5, 3)
STEPS = 3


@pytest.fixture
def batch(draw):
    return draw.batch("cross_entropy", 3, 5, 4, SIZES)


def network(draw, norm=False):
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6, track_running_stats=False))
    return draw.initialise(nn.Sequential(*layers).double())


MADE = {
    "fomaml": lambda model, **o: presets.fomaml(model, **o),
    "anil": lambda model, **o: presets.anil(model, ["4.*"], **o),
    "boil": lambda model, **o: presets.boil(model, ["4.*"], **o),
    "meta_sgd": lambda model, **o: presets.meta_sgd(model, 0.1, **o),
    "positive meta_sgd": lambda model, **o: presets.meta_sgd(model, 0.1, positive=True, **o),
    "mamlpp": lambda model, **o: presets.mamlpp(model, 0.1, **o),
    "cavia": lambda model, **o: presets.cavia(model, ["0.bias"], **o),
    "reptile": lambda model, **o: presets.reptile(model, **o),
    "imaml": lambda model, **o: presets.imaml(model, iterations=200, tolerance=1e-14, **o),
}


@pytest.mark.parametrize("name", MADE)
def test_equals_the_reference(name, draw, batch):
    def run(backend):
        maml = MADE[name](
            network(Draw(3)), loss="cross_entropy", inner_steps=STEPS, backend=backend
        )
        maml(*batch).loss.backward()
        return {n: p.grad for n, p in maml.named_parameters() if p.grad is not None}

    assert_near(run("auto"), run("reference"), 1e-9)


def test_what_they_set(draw):
    model = network(draw)
    assert presets.fomaml(model).first_order
    assert presets.anil(model, ["4.*"]).inner_params == ["4.*"]
    assert presets.boil(model, ["4.*"]).inner_params == ["0.weight", "0.bias", "2.weight", "2.bias"]
    rates = presets.meta_sgd(model, 0.2).inner_lr
    assert all(rates[n].shape == (1, *p.shape) for n, p in model.named_parameters())
    assert all((rate == 0.2).all() and rate.requires_grad for rate in rates.values())
    rates = presets.meta_sgd(model, 0.2, positive=True, inner_params=["4.*"]).inner_lr
    assert set(rates) == {"4.weight", "4.bias"}
    assert all(isinstance(rate, PositiveRate) for rate in rates.values())
    assert presets.imaml(model, strength=3.0).inner_optimizer.proximal == 3.0
    assert presets.anil(model, ["4.*"], first_order=True).first_order


def test_a_model_without_body(draw):
    with pytest.raises(ValueError, match=r"head has \['\*'\], which are all parameters"):
        presets.boil(network(draw), ["*"])


def test_mamlpp_has_norms_of_each_step(draw, batch):
    def made(backend):
        maml = presets.mamlpp(
            network(Draw(5), norm=True),
            0.1,
            2,
            norms=["1.*"],
            loss="cross_entropy",
            backend=backend,
        )
        with torch.no_grad():
            for i, values in enumerate(maml.step_params.values()):
                values += 0.1 * Draw(i).normal(*values.shape)
        return maml

    maml = made("functional")
    assert {n: tuple(v.shape) for n, v in maml.step_params.items()} == {
        "1/weight": (3, 6),
        "1/bias": (3, 6),
    }
    assert set(maml.inner_lr) == {"0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"}
    found, wanted = {}, {}
    for backend, grads in (("functional", found), ("reference", wanted)):
        maml = made(backend)
        maml(*batch).loss.backward()
        grads |= {n: p.grad for n, p in maml.named_parameters() if p.grad is not None}
    assert "step_params.1/weight" in wanted
    assert "model.1.weight" not in wanted
    assert_near(found, wanted, 1e-9)
    maml, other = made("auto"), made("reference")
    torch.testing.assert_close(
        maml.adapt(*batch[:2])(batch.query_x), other.adapt(*batch[:2])(batch.query_x)
    )


def test_weights_of_steps_are_annealed():
    assert presets.multi_step_weights(5, 0, 15) == pytest.approx([0, *[0.2] * 5])
    halfway = presets.multi_step_weights(5, 3, 15)
    assert halfway == pytest.approx([0, *[0.16] * 4, 0.36])
    last = presets.multi_step_weights(5, 100, 15)
    assert last == pytest.approx([0, *[0.006] * 4, 0.976])
    assert presets.multi_step_weights(1, 0, 15) == [0, 1]


def test_epochs_of_mamlpp(draw):
    maml = presets.mamlpp(network(draw), inner_steps=2)
    presets.mamlpp_epoch(maml, 0, 10, first_order_epochs=3)
    assert maml.first_order
    assert maml.step_weights == [0, 0.5, 0.5]
    presets.mamlpp_epoch(maml, 5, 10, first_order_epochs=3)
    assert not maml.first_order
    assert maml.step_weights == pytest.approx([0, 0.25, 0.75])


def test_implicit_and_explicit_agree_where_the_inner_loop_has_converged(draw, batch):
    options = dict(loss="cross_entropy", inner_lr=0.2, inner_steps=400)
    model = network(draw)
    implicit = presets.imaml(model, 2.0, 200, 1e-14, **options)
    explicit = MAML(model, inner_optimizer=implicit.inner_optimizer, **options)
    assert_near(gradients(implicit, batch), gradients(explicit, batch), 1e-9)
    assert (implicit(*batch).residuals < 1e-13).all()


def test_conjugate_gradients_say_how_far_they_came(draw, batch):
    model = network(draw)
    maml = presets.imaml(model, 0.5, iterations=2, loss="cross_entropy", inner_steps=5)
    residuals = maml(*batch).residuals
    assert residuals.shape == (3,)
    assert ((residuals > 1e-6) & (residuals < 1)).all()
    assert MAML(model, "cross_entropy")(*batch).residuals is None
