"""Every rule of every operation, against torch.func on its oracle. Adding one edits no test."""

import pytest
import torch
from torch.func import jvp, vjp, vmap

from maml_fast.ops import OPERATIONS

EXAMPLES = [
    pytest.param(op, features, id=f"{type(op).__name__}-{op}-{features}")
    for kind in OPERATIONS
    for op, features in kind.examples()
]
TASKS, ROWS = 2, 3


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def clear_of_kinks(x):
    """Push values away from 0, where relu has no derivative."""
    return torch.where(x.abs() < 0.1, x + 0.2, x)


@pytest.fixture(params=EXAMPLES)
def example(request):
    return request.param


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
class TestRules:
    def values(self, op, features, draw):
        x = clear_of_kinks(draw.normal(TASKS, ROWS, *features))
        out = op.out_features(features)
        tensors = (draw.normal(TASKS, ROWS, *shape) for shape in (out, features, out))
        return x, *tensors  # x, dy, t_x, t_dy

    def test_forward(self, op, features, draw):
        x, dy, _, _ = self.values(op, features, draw)
        y, _ = op.forward(0, x)
        assert y.shape == dy.shape
        close(y, vmap(op.oracle)(x))

    def test_backward(self, op, features, draw):
        x, dy, _, _ = self.values(op, features, draw)
        _, saved = op.forward(0, x)
        close(op.backward(0, saved, dy), vjp(vmap(op.oracle), x)[1](dy)[0])

    def test_tangent(self, op, features, draw):
        x, dy, t_x, _ = self.values(op, features, draw)
        _, saved = op.forward(0, x)
        close(op.tangent(0, saved, dy, t_x), jvp(vmap(op.oracle), (x,), (t_x,))[1])
        assert op.tangent(0, saved, dy, None) is None

    def test_tangent_backward(self, op, features, draw):
        x, dy, t_x, t_dy = self.values(op, features, draw)
        _, saved = op.forward(0, x)

        def backward(x, dy):
            return vjp(vmap(op.oracle), x)[1](dy)[0]

        wanted = jvp(backward, (x, dy), (t_x, t_dy))[1]
        close(op.tangent_backward(0, saved, dy, t_x, t_dy), wanted)
        wanted = jvp(backward, (x, dy), (torch.zeros_like(x), t_dy))[1]
        close(op.tangent_backward(0, saved, dy, None, t_dy), wanted)

    def test_rules_leave_their_arguments_alone(self, op, features, draw):
        values = self.values(op, features, draw)
        x, dy, t_x, t_dy = (value.clone() for value in values)
        _, saved = op.forward(0, x)
        op.backward(0, saved, dy)
        op.tangent(0, saved, dy, t_x)
        op.tangent_backward(0, saved, dy, t_x, t_dy)
        first = op.tangent_backward(0, saved, dy, t_x, t_dy)
        for mine, theirs in zip((x, dy, t_x, t_dy), values, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(first, op.tangent_backward(0, saved, dy, t_x, t_dy))


@pytest.mark.parametrize("x", [-1e4, -80.0, -20.0, 0.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_extreme_values_stay_finite(op, features, x):
    x = torch.full((1, 1, *features), x, dtype=torch.float32)
    ones = torch.ones(1, 1, *op.out_features(features))
    _, saved = op.forward(0, x)
    for found in (
        op.backward(0, saved, ones),
        op.tangent_backward(0, saved, ones, torch.ones_like(x), ones),
    ):
        assert found.isfinite().all()
