"""Options of the family that meet each other, and what they leave alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, inner, outer, presets
from maml_fast.problem import TaskBatch
from tests.image_networks import assert_near
from tests.networks import Draw, gradients

SIZES = (4, 6, 3)
BACKENDS = ["functional", "torch", "cpu"]


def images(draw, rows=3, queries=9):
    x, q = draw.normal(2, rows, 1, 8, 8), draw.normal(2, queries, 1, 8, 8)
    y, yq = draw.classes(2, rows, classes=3), draw.classes(2, queries, classes=3)
    return TaskBatch(x, y, q, yq)


def normed(draw):
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()]
    return draw.initialise(nn.Sequential(*layers, nn.Linear(6, 3)).double())


def test_many_image_queries_of_which_few_count(draw):
    """The trial takes few of them, and some that count."""
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)]
    model = draw.initialise(nn.Sequential(*layers).double())
    batch = images(draw)
    weight = torch.zeros(2, 9, dtype=torch.float64)
    weight[:, 7:] = 1
    found, wanted = (
        gradients(MAML(model, "cross_entropy", 0.1, 2, backend=name), (*batch[:4], None, weight))
        for name in ("cpu", "reference")
    )
    assert_near(found, wanted, 1e-9)


@pytest.mark.parametrize("backend", ["functional", "reference"])
def test_adapted_models_keep_the_values_of_their_steps(backend, draw):
    batch = draw.batch("cross_entropy", 3, 5, 4, SIZES)
    maml = MAML(normed(draw), "cross_entropy", 0.1, 2, step_params=["1.*"], backend=backend)
    adapted = maml.adapt(*batch[:2])
    before = adapted(batch.query_x)
    with torch.no_grad():
        for values in maml.step_params.values():
            values.mul_(3)
    assert torch.equal(adapted(batch.query_x), before)
    assert adapted.parameters()["1.weight"].shape == (3, 6)


def test_values_of_steps_are_copied_and_saved(draw):
    batch = draw.batch("cross_entropy", 3, 5, 4, SIZES)
    maml = presets.mamlpp(normed(draw), 0.1, 2, norms=["1.*"], loss="cross_entropy")
    wanted = maml(*batch).loss.item()
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert other(*batch).loss.item() == wanted
    other = presets.mamlpp(normed(Draw(7)), 0.2, 2, norms=["1.*"], loss="cross_entropy")
    other.load_state_dict(maml.state_dict())
    assert other(*batch).loss.item() == wanted


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_reptile_has_no_gradient_by_the_data(backend, draw):
    batch = draw.batch("mse", 3, 5, 4, SIZES)
    maml = presets.reptile(draw.mlp(SIZES), backend=backend)
    with pytest.raises(ValueError, match="meta_gradient Reptile gives no gradient by the data"):
        maml(batch.support_x.requires_grad_(), *batch[1:4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reptile_does_not_see_rows_that_do_not_count(backend, draw):
    batch = draw.batch("mse", 3, 5, 4, SIZES)
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[:, 1] = 0
    model = draw.mlp(SIZES)

    def run(name):
        maml = presets.reptile(model, inner_lr=0.1, inner_steps=2, backend=name)
        return gradients(maml, (*batch[:4], None, weight))

    wanted = run("reference")
    batch.query_x[:, 1] = torch.nan
    assert_near(run(backend), wanted, 1e-9)


def test_reptile_with_values_of_steps(draw):
    batch = draw.batch("cross_entropy", 3, 5, 4, SIZES)
    maml = presets.reptile(normed(draw), loss="cross_entropy", step_params=["1.*"])
    maml(*batch).loss.backward()
    assert all((values.grad == 0).all() for values in maml.step_params.values())
    assert (maml.model[0].weight.grad != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_inputs_that_share_memory(backend, draw):
    """A mean over positions hands out one cotangent to all of them."""
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3)]
    model = draw.initialise(nn.Sequential(*layers).double())

    def run(name):
        batch = images(Draw(3), queries=3)
        x, q = batch.support_x.requires_grad_(), batch.query_x.requires_grad_()
        MAML(model, "cross_entropy", 0.1, 5, backend=name)(*batch).loss.backward()
        return {"support_x": x.grad, "query_x": q.grad}

    assert_near(run(backend), run("reference"), 1e-9)


def test_adam_in_few_digits(draw):
    """In bfloat16 1 - 0.999^k would be 0."""
    model, batch = draw.mlp(SIZES), draw.batch("mse", 3, 5, 4, SIZES)
    maml = MAML(model, "mse", 0.1, 2, inner_optimizer=inner.Adam())
    exact = maml.adapt(*batch[:2]).parameters()
    maml.to(torch.bfloat16)
    rounded = maml.adapt(*(t.to(torch.bfloat16) for t in batch[:2])).parameters()
    for name, parameter in exact.items():
        moved = (parameter - model.get_parameter(name).double()).abs().max()
        assert moved > 0.1
        assert (rounded[name].double() - parameter).abs().max() < 0.3 * moved


def test_adam_is_torchs(draw):
    """One task's three steps against torch.optim.Adam, in float64."""
    model, batch = draw.mlp(SIZES), draw.batch("mse", 1, 5, 4, SIZES)
    rule = inner.Adam(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    maml = MAML(model, "mse", 0.05, 3, inner_optimizer=rule)
    found = maml.adapt(*batch[:2]).parameters()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(
        twin.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(twin(batch.support_x[0]), batch.support_y[0]).backward()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum, draw):
    model, batch = draw.mlp(SIZES), draw.batch("mse", 1, 5, 4, SIZES)
    options = dict(momentum=momentum, nesterov=bool(momentum), weight_decay=0.1)
    rule = inner.SGD(**options, clip_norm=0.5)
    found = MAML(model, "mse", 0.05, 3, inner_optimizer=rule).adapt(*batch[:2]).parameters()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, **options)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(twin(batch.support_x[0]), batch.support_y[0]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.detach(), rtol=1e-10, atol=1e-12)


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.abs().sqrt())


@pytest.mark.parametrize("backend", ["reference", "functional"])
def test_a_gradient_by_the_data_that_is_not_finite(backend, draw):
    batch = draw.batch("mse", 3, 5, 4, (4, 3))
    batch.query_x[1, 0, 0] = 0
    model = draw.initialise(Root().double())
    with pytest.raises(NonFiniteError, match=r"gradient of \['query_x'\] is not finite.*: 1$"):
        MAML(model, backend=backend)(*batch[:2], batch.query_x.requires_grad_(), batch.query_y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_model_has_gradients_by_the_data(backend, draw):
    model = draw.mlp(SIZES).requires_grad_(False)

    def run(name):
        batch = Draw(2).batch("mse", 3, 5, 4, SIZES)
        x, q = batch.support_x.requires_grad_(), batch.query_x.requires_grad_()
        MAML(model, "mse", 0.1, 2, backend=name)(*batch).loss.backward()
        assert (x.grad == 0).all()
        return {"query_x": q.grad}

    assert_near(run(backend), run("reference"), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["support_weight", "query_weight"])
def test_one_row_that_counts_before_batch_norm(backend, name, draw):
    batch = draw.batch("cross_entropy", 3, 5, 4, SIZES)
    weights = {"support_weight": torch.ones(3, 5), "query_weight": torch.ones(3, 4)}
    weights[name][1, 1:] = 0
    with pytest.raises(ValueError, match=f"{name} leaves one row in task 1"):
        MAML(normed(draw), "cross_entropy", backend=backend)(*batch[:4], **weights)


def test_weights_that_the_models_type_has_not(draw):
    batch = [t.float() for t in draw.batch("mse", 3, 5, 4, SIZES)[:4]]
    maml = MAML(draw.mlp(SIZES).float())
    for value, words in ((1e39, "more than torch.float32 can add up"), (1e-60, "is 0 in all rows")):
        weight = torch.full((3, 5), value, dtype=torch.float64)
        with pytest.raises(ValueError, match=words):
            maml(*batch, support_weight=weight)


def test_implicit_with_a_parameter_that_the_model_does_not_use(draw):
    batch = draw.batch("mse", 3, 5, 4, SIZES)
    model = draw.mlp(SIZES)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))

    def run(backend):
        maml = presets.imaml(model, 2.0, 100, 1e-14, inner_lr=0.1, inner_steps=3, backend=backend)
        return gradients(maml, batch)

    wanted = run("reference")
    assert (wanted["unused"] == 0).all()
    assert_near(run("functional"), wanted, 1e-9)


def test_names_in_one_string_are_refused(draw):
    for make in (presets.anil, presets.cavia, lambda m, names: presets.mamlpp(m, norms=names)):
        with pytest.raises(TypeError, match=r"is '2\.\*'; wanted is a list"):
            make(draw.mlp(SIZES), "2.*")


def test_names_from_a_generator(draw):
    batch = draw.batch("mse", 3, 5, 4, SIZES)
    maml = MAML(draw.mlp(SIZES), inner_params=(f"2.{name}" for name in ("weight", "bias")))
    assert maml(*batch).loss.item() == maml(*batch).loss.item()


def test_values_of_steps_of_what_is_frozen_or_adapts(draw):
    batch = draw.batch("cross_entropy", 3, 5, 4, SIZES)
    maml = MAML(normed(draw), "cross_entropy", step_params=["1.*"])
    maml.inner_params = ["*"]
    with pytest.raises(ValueError, match="step_params and inner_params both have"):
        maml(*batch)
    maml.inner_params = None
    maml.model[1].requires_grad_(False)
    with pytest.raises(ValueError, match="step_params has .* which do not require grad"):
        maml(*batch)


def test_step_weights_in_a_tensor(draw):
    batch = draw.batch("mse", 3, 5, 4, SIZES)
    maml = MAML(draw.mlp(SIZES), "mse", 0.1, 2, step_weights=torch.tensor([0.0, 0.5, 0.5]))
    assert maml(*batch).loss.isfinite()
    maml.meta_gradient = outer.Reptile()
    with pytest.raises(ValueError, match="cannot be combined with step_weights"):
        maml(*batch)
