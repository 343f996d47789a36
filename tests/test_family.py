"""Every variant of the meta-step on every backend that has it, against the reference in float64;
and the reference against finite differences."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maml_fast import UnsupportedModelError
from tests.image_networks import assert_near
from tests.variants import ADAPTS, LINEAR, NETWORKS, RATES, ROWS, RULES, STEP_WEIGHTS, Variant

BACKENDS = ["functional", "torch", "cpu", "auto"]
BOUND = 1e-9


def lacks(backend, variant):
    """What a planned backend says that it has not; the others have all."""
    return backend in ("torch", "cpu") and variant.rule not in LINEAR


def assert_equals_reference(variant, backend, wanted=None):
    """`wanted`: what the reference gives, if it is known."""
    if lacks(backend, variant):
        with pytest.raises(UnsupportedModelError, match="cannot run this model"):
            variant.run(backend)
        return
    assert_near(variant.run(backend), wanted or variant.run("reference"), BOUND)


ONE_BY_ONE = [
    *({"adapts": kind} for kind in ADAPTS),
    *({"rates": kind} for kind in RATES),
    *({"rule": kind} for kind in RULES),
    *({"step_weights": kind} for kind in STEP_WEIGHTS),
    *({"rows": kind} for kind in ROWS),
    {"inputs": True},
    {"first_order": True},
    {"frozen": True},
]


@functools.cache
def by_reference(network, steps, change):
    """Once for all backends, whose tests follow one another."""
    return Variant(network=network, steps=steps, **dict(change)).run("reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("change", ONE_BY_ONE, ids=str)
def test_one_by_one(backend, change, network, steps):
    wanted = by_reference(network, steps, tuple(change.items()))
    assert_equals_reference(Variant(network=network, steps=steps, **change), backend, wanted)


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("rule", LINEAR)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("adapts", ["all", "middle", "head"])
def test_linear_rules_in_both_forms(form, rule, adapts, steps):
    variant = Variant(
        rule=rule, adapts=adapts, steps=steps, step_weights="all", rows="weights", inputs=True
    )
    found = variant.run("torch", fast_weights=form)
    assert_near(found, variant.run("reference"), BOUND)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    variant=st.builds(
        Variant,
        seed=st.integers(0, 2**16),
        network=st.sampled_from(list(NETWORKS)),
        adapts=st.sampled_from(ADAPTS),
        rates=st.sampled_from(RATES),
        rule=st.sampled_from(list(RULES)),
        step_weights=st.sampled_from(STEP_WEIGHTS),
        rows=st.sampled_from(ROWS),
        loss=st.sampled_from(["mse", "cross_entropy", "bce_with_logits", "huber"]),
        steps=st.sampled_from([0, 1, 2, 4]),
        first_order=st.booleans(),
        inputs=st.booleans(),
        frozen=st.booleans(),
    ),
    backend=st.sampled_from(["functional", "torch", "auto"]),
)
def test_combinations(variant, backend):
    assert_equals_reference(variant, backend)


@pytest.mark.parametrize("change", [c for c in ONE_BY_ONE if "first_order" not in c], ids=str)
def test_the_reference_by_finite_differences(change):
    """The derivative along one direction of everything that gets a gradient."""
    variant = Variant(steps=2, inputs=True, **{k: v for k, v in change.items() if k != "inputs"})
    found = variant.run("reference")
    maml = variant.maml("reference")
    named = dict(maml.named_parameters())
    moved = {name: p for name, p in named.items() if name in found}
    along = {name: torch.randn_like(p) for name, p in moved.items()}
    ways = [torch.randn_like(x) for x in variant.x]
    slope = sum((found[name] * way).sum() for name, way in along.items())
    slope += sum(
        (found[name] * w).sum() for name, w in zip(("support_x", "query_x"), ways, strict=True)
    )

    def loss_at(distance):
        with torch.no_grad():
            for name, p in moved.items():
                p += distance * along[name]
            x, q = (rows + distance * way for rows, way in zip(variant.x, ways, strict=True))
            loss = maml(x, variant.y[0], q, variant.y[1], *variant.weights).loss.item()
            for name, p in moved.items():
                p -= distance * along[name]
        return loss

    h = 2e-5
    by_difference = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    assert by_difference == pytest.approx(slope.item(), rel=2e-6)


@pytest.mark.parametrize("backend", ["reference", "functional", "torch", "cpu"])
@pytest.mark.parametrize("network", NETWORKS)
def test_rows_of_weight_0_change_nothing(backend, network):
    """To the bit, whatever they hold: NaN, or a class that there is not."""
    variant = Variant(network=network, rows="masks")
    wanted = variant.run(backend)
    for x, y, weight in zip(variant.x, variant.y, variant.weights, strict=True):
        assert not weight.all()
        x[~weight], y[~weight] = torch.nan, -100
    found = variant.run(backend)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert (found["outputs"][~variant.weights[1]] == 0).all()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", ["functional", "torch", "cpu", "reference"])
def test_trajectories(backend, network):
    variant = Variant(network=network, rows="weights")
    maml = variant.maml(backend)
    data = (variant.x[0], variant.y[0], variant.x[1], variant.y[1], *variant.weights)
    found = maml.trajectory(*data)
    out = maml(*data)
    torch.testing.assert_close(found.support_losses[:, :-1], out.support_losses)
    torch.testing.assert_close(found.query_losses[:, -1], out.task_losses)
    assert found.support_losses.shape == found.query_losses.shape == (3, 4)
    right = (out.query_outputs.argmax(-1) == variant.y[1]).double()
    weight = torch.ones(3, 4) if variant.weights[1] is None else variant.weights[1]
    share = (right * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(found.query_accuracies[:, -1], share)
    adapted = maml.adapt(*data[:2], support_weight=variant.weights[0]).parameters()
    assert set(found.adapted) == set(adapted)
    for name, parameter in adapted.items():
        torch.testing.assert_close(found.adapted[name], parameter)


@pytest.mark.parametrize("backend", ["functional", "torch", "cpu"])
@pytest.mark.parametrize("network", NETWORKS)
def test_adapted_models_of_masked_rows(backend, network):
    variant = Variant(network=network, rows="masks")
    found, wanted = (
        variant.maml(name).adapt(variant.x[0], variant.y[0], support_weight=variant.weights[0])
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found.support_losses, wanted.support_losses)
    torch.testing.assert_close(found(variant.x[1]), wanted(variant.x[1]))
    for name, parameter in wanted.parameters().items():
        torch.testing.assert_close(found.parameters()[name], parameter)


@pytest.mark.parametrize("rows", ["masks", "weights"])
@pytest.mark.parametrize("network", NETWORKS)
def test_row_weights_on_triton(network, rows):
    """In float32, and its gradients as near to float64 as 1e-5 of the norm of each."""
    variant = Variant(network=network, rows=rows, steps=1)
    wanted = variant.run("reference")
    variant.model = variant.model.float()
    variant.x = [x.float() for x in variant.x]
    found = variant.run("triton")
    for name, tensor in wanted.items():
        assert (found[name].double() - tensor).norm() <= 1e-5 * tensor.norm(), name
