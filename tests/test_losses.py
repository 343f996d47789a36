"""Every rule of every loss, against torch.func on its oracle."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from maml_fast.backends.functional import FORMULAS
from maml_fast.backends.reference import LOSSES as REFERENCE_LOSSES
from maml_fast.losses import LOSSES
from tests.networks import ORACLES

TASKS, ROWS, FEATURES = 3, 4, 5


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.fixture(params=LOSSES)
def loss(request):
    return request.param


@pytest.fixture
def values(loss, draw):
    z = 2 * draw.normal(TASKS, ROWS, FEATURES)  # on both sides of huber's corner
    return z, draw.target(loss, TASKS, ROWS, features=FEATURES), draw.normal(*z.shape)


def test_the_lists_agree():
    assert set(LOSSES) == set(REFERENCE_LOSSES) == set(FORMULAS) == set(ORACLES)


def test_formulas(loss, values):
    z, y, _ = values
    close(FORMULAS[loss](z[0], y[0]), LOSSES[loss].oracle(z[0], y[0]))


def test_value(loss, values):
    z, y, _ = values
    close(LOSSES[loss].value(z, y)[0], vmap(LOSSES[loss].oracle)(z, y))
    close(LOSSES[loss].value(z, y)[0], torch.stack(list(map(ORACLES[loss], z, y))))


def test_cotangent(loss, values):
    z, y, _ = values
    rules = LOSSES[loss]
    close(rules.cotangent(rules.value(z, y)[1], y), vmap(grad(LOSSES[loss].oracle))(z, y))


def test_tangent(loss, values):
    z, y, t_z = values
    rules = LOSSES[loss]
    _, wanted = jvp(lambda z: vmap(grad(LOSSES[loss].oracle))(z, y), (z,), (t_z,))
    close(rules.tangent(rules.value(z, y)[1], t_z), wanted)


@pytest.mark.parametrize("size", [1e4, 80.0])
def test_large_logits_stay_finite(loss, size):
    z = torch.tensor([[[size, -size, 0.0]]])
    y = torch.tensor([[1]]) if loss == "cross_entropy" else torch.tensor([[[0.0, 1.0, 1.0]]])
    rules = LOSSES[loss]
    value, state = rules.value(z, y)
    torch.testing.assert_close(value, vmap(LOSSES[loss].oracle)(z, y))
    assert rules.cotangent(state, y).isfinite().all()
    assert rules.tangent(state, torch.ones_like(z)).isfinite().all()
