"""Options of the family that do not fit: an error that says what to change."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from maml_fast import MAML, PositiveRate, inner, outer
from tests.image_networks import assert_near
from tests.networks import Draw, gradients

SIZES = (4, 6, 3)
T, N, M = 3, 5, 4


@pytest.fixture
def model(draw):
    return draw.mlp(SIZES)


def batch():
    return Draw(1).batch("mse", T, N, M, SIZES)[:4]


OPTIONS = [
    ({"inner_params": ["9.*"]}, ValueError, r"inner_params has '9\.\*', which no parameter's name"),
    ({"inner_params": []}, ValueError, "inner_params is empty"),
    ({"inner_params": "0.*"}, TypeError, r"inner_params is '0\.\*'; wanted is a list"),
    ({"inner_params": [3]}, TypeError, "inner_params holds 3"),
    ({"step_params": ["9.*"]}, ValueError, "step_params has"),
    ({"step_params": ["0.*"], "inner_params": ["0.bias"]}, ValueError, "both have .'0.bias'."),
    ({"inner_optimizer": "adam"}, TypeError, "inner_optimizer is str; wanted is a maml_fast.inner"),
    ({"inner_optimizer": inner.SGD}, TypeError, "inner_optimizer is SGD; wanted is .* an object"),
    ({"step_weights": [1.0]}, ValueError, "step_weights has 1 numbers; wanted are 3"),
    (
        {"step_weights": [1.0, -1.0, 1.0]},
        ValueError,
        r"step_weights is \[1.0, -1.0, 1.0\]; wanted are finite",
    ),
    (
        {"step_weights": [1.0, float("nan"), 1.0]},
        ValueError,
        "step_weights is .1.0, nan, 1.0.; wanted are finite",
    ),
    ({"step_weights": [0, 0, 0]}, ValueError, "step_weights are all 0"),
    ({"step_weights": ["1", 0, 0]}, TypeError, "step_weights holds '1'"),
    ({"step_weights": 0.5}, TypeError, "step_weights is float"),
    ({"meta_gradient": "reptile"}, TypeError, "meta_gradient is str"),
    ({"meta_gradient": outer.Reptile}, TypeError, "meta_gradient is Reptile; wanted is"),
    ({"meta_gradient": outer.Reptile(), "first_order": True}, ValueError, "choose one of them"),
    ({"meta_gradient": outer.Implicit()}, ValueError, r"give maml_fast.inner.SGD\(proximal="),
    (
        {"meta_gradient": outer.Reptile(), "step_weights": [0, 1, 1]},
        ValueError,
        "cannot be combined with step_weights",
    ),
    (
        {"meta_gradient": outer.Reptile(), "inner_lr": nn.Parameter(torch.tensor(0.1))},
        ValueError,
        "an inner_lr that learns",
    ),
    (
        {
            "meta_gradient": outer.Implicit(),
            "inner_optimizer": inner.SGD(proximal=1.0, weight_decay=0.1),
        },
        ValueError,
        "weight_decay, which would move the minimum",
    ),
    ({"inner_lr": {"0.weight": 0.1}}, ValueError, "inner_lr has no rate for .'0.bias'"),
]


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS, ids=lambda value: str(value)[:60])
def test_options(options, error, words, model):
    with pytest.raises(error, match=words):
        MAML(model, **{"inner_steps": 2, **options})(*batch())


RATES = [
    (torch.rand(6, 5), "wanted is a scalar, .3. for inner steps, .6, 4."),
    (torch.rand(2, 6, 4), "has shape .2, 6, 4."),
    (torch.rand(4), "has shape .4."),
    (torch.full((6, 4), torch.inf), "must be finite numbers"),
]


@pytest.mark.parametrize(("rate", "words"), RATES)
def test_rates(rate, words, model):
    rates = {name: 0.1 for name, _ in model.named_parameters()} | {"0.weight": rate.double()}
    with pytest.raises(ValueError, match=words):
        MAML(model, inner_lr=rates, inner_steps=3)(*batch())


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), torch.tensor([0.1, -0.1])])
def test_positive_rates(rate):
    with pytest.raises(ValueError, match="wanted are positive, finite numbers"):
        PositiveRate(rate)
    with pytest.raises(TypeError, match="rate is str"):
        PositiveRate("0.1")


RULES = [
    (
        lambda: inner.SGD(momentum=1.0),
        ValueError,
        "momentum is 1.0; wanted is a number from 0 up, b",
    ),
    (lambda: inner.SGD(momentum="0.9"), TypeError, "momentum is '0.9'"),
    (lambda: inner.SGD(nesterov=True), ValueError, "nesterov is True but momentum is 0"),
    (lambda: inner.SGD(weight_decay=-0.1), ValueError, "weight_decay is -0.1"),
    (lambda: inner.SGD(clip_norm=0.0), ValueError, "clip_norm is 0.0; wanted is a number above 0"),
    (lambda: inner.SGD(clip_value=float("nan")), ValueError, "clip_value is nan"),
    (lambda: inner.Adam(betas=(0.9,)), TypeError, "betas is"),
    (lambda: inner.Adam(betas=(0.9, 1.0)), ValueError, "betas is 1.0"),
    (lambda: inner.Adam(eps=0.0), ValueError, "eps is 0.0"),
    (lambda: outer.Implicit(iterations=0), ValueError, "iterations is 0; wanted is 1 or more"),
    (lambda: outer.Implicit(iterations=2.5), TypeError, "iterations is 2.5"),
    (lambda: outer.Implicit(tolerance=-1.0), ValueError, "tolerance is -1.0"),
]


@pytest.mark.parametrize(("make", "error", "words"), RULES)
def test_rules(make, error, words):
    with pytest.raises(error, match=words):
        make()


def weight_of(change):
    weight = torch.ones(T, N)
    return change(weight)


WEIGHTS = [
    (lambda w: w[:, :2], ValueError, "support_weight has shape .3, 2.; wanted is .3, 5."),
    (lambda w: w.tolist(), TypeError, "support_weight is list"),
    (lambda w: w.long(), TypeError, "support_weight is torch.int64; wanted is bool or a floating"),
    (lambda w: -w, ValueError, "support_weight holds a negative, infinite or NaN weight"),
    (lambda w: w * torch.nan, ValueError, "support_weight holds a negative, infinite or NaN"),
    (
        lambda w: w.index_fill(0, torch.tensor([1]), 0),
        ValueError,
        "0 in all rows of task 1; wanted",
    ),
    (lambda w: w.requires_grad_(), ValueError, "support_weight requires grad"),
]


@pytest.mark.parametrize(("change", "error", "words"), WEIGHTS)
def test_weights_of_rows(change, error, words, model):
    with pytest.raises(error, match=words):
        MAML(model)(*batch(), support_weight=change(torch.ones(T, N)))


@dataclass(frozen=True)
class SignedSteps(inner.InnerRule):
    """A rule of a user's own: smooth signs of an average of gradients, which it keeps."""

    keep: float = 0.5

    def start(self, parameters):
        return {"mean": {name: torch.zeros_like(p) for name, p in parameters.items()}}

    def step(self, parameters, gradients, rates, state):
        mean = {
            name: self.keep * state["mean"][name] + (1 - self.keep) * gradients[name]
            for name in parameters
        }
        moved = {name: p - rates[name] * torch.tanh(mean[name]) for name, p in parameters.items()}
        return moved, {"mean": mean}


def test_a_rule_of_ones_own(model):
    def found_by(backend):
        maml = MAML(
            model, "mse", nn.Parameter(torch.tensor(0.3).double()), 3, backend=backend,
            inner_optimizer=SignedSteps(0.7), inner_params=["2.*", "0.bias"],
        )  # fmt: skip
        maml.zero_grad()
        maml(*batch()).loss.backward()
        return {n: p.grad for n, p in maml.named_parameters()}

    wanted = found_by("reference")
    assert set(wanted) == {f"model.{name}" for name, _ in model.named_parameters()} | {"rates.lr"}
    assert_near(found_by("auto"), wanted, 1e-9)


def test_a_parameter_that_adapts_and_does_not_learn(model):
    """As the context of CAVIA: it moves, and has no gradient."""
    model[0].bias.requires_grad_(False)
    found = {}
    for backend in ("reference", "functional", "torch"):
        maml = MAML(model, "mse", 0.5, 3, inner_params=["0.bias"], backend=backend)
        found[backend] = gradients(maml, batch())
        assert set(found[backend]) == {"0.weight", "2.weight", "2.bias"}
        adapted = maml.adapt(*batch()[:2]).parameters()
        assert not torch.allclose(adapted["0.bias"], model[0].bias)
        assert torch.equal(adapted["2.bias"], model[2].bias.expand(T, -1))
    assert_near(found["functional"], found["reference"], 1e-9)
    assert_near(found["torch"], found["reference"], 1e-9)
