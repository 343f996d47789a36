"""The operation tests, run on the C++ rules: the same tests and examples, none edited for it."""

import pytest
import torch

from maml_fast import cpu_features
from maml_fast.ops import OPERATIONS
from maml_fast.ops.pointwise import Pointwise
from tests import test_operations
from tests.engines import ENGINES

pytestmark = pytest.mark.usefixtures("extension")


class ByCpu:
    """An operation whose rules are those of `maml_fast._cpu`; `saved` is x."""

    def __init__(self, op, engine):
        self.op, self.engine = op, engine
        self.oracle, self.out_features = op.oracle, op.out_features

    def __repr__(self):
        return f"{self.op} by {self.engine}"

    def _rules(self, x, dy, t_x, t_dy):
        """y, dx, t_y, t_dx"""
        name, constants = self.op.native
        given = [torch.zeros_like(x) if t is None else t.contiguous() for t in (x, dy, t_x, t_dy)]
        found = [torch.empty_like(x) for _ in given]
        cpu_features.extension().activation(
            name=name,
            constants=list(constants),
            instruction_set=self.engine,
            doubles=x.dtype == torch.float64,
            count=x.numel(),
            given=[tensor.data_ptr() for tensor in given],
            found=[tensor.data_ptr() for tensor in found],
        )
        return found

    def forward(self, step, x):
        return self._rules(x, None, None, None)[0], x

    def backward(self, step, saved, dy):
        return self._rules(saved, dy, None, None)[1]

    def tangent(self, step, saved, dy, t_x):
        return None if t_x is None else self._rules(saved, dy, t_x, None)[2]

    def tangent_backward(self, step, saved, dy, t_x, t_dy):
        return self._rules(saved, dy, t_x, t_dy)[3]


# Those that work number by number; pools are tested in whole networks, by test_cpu_images.py.
EXAMPLES = [
    pytest.param(ByCpu(op, engine), features, id=f"{engine}-{type(op).__name__}-{op}-{features}")
    for engine in ENGINES
    for kind in OPERATIONS
    for op, features in kind.examples()
    if isinstance(op, Pointwise)
]


def test_every_operation_has_its_cpp():
    for kind in OPERATIONS:
        for op, _ in kind.examples():
            assert op.native is not None, op


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
class TestRules:
    values = test_operations.TestRules.values
    test_forward = test_operations.TestRules.test_forward
    test_backward = test_operations.TestRules.test_backward
    test_tangent = test_operations.TestRules.test_tangent
    test_tangent_backward = test_operations.TestRules.test_tangent_backward
    test_rules_leave_their_arguments_alone = (
        test_operations.TestRules.test_rules_leave_their_arguments_alone
    )


@pytest.mark.parametrize("x", [-1e4, -80.0, -20.0, 0.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_extreme_values_stay_finite(op, features, x):
    test_operations.test_extreme_values_stay_finite(op, features, x)


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_nan_stays_nan(op, features):
    x = torch.full((1, 1, *features), torch.nan)
    assert op.forward(0, x)[0].isnan().all()


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_float32_is_as_exact_as_torch(op, features):
    """Value and slope at 20,000 points against float64: at most twice torch's worst error, or
    4e-7 of the value."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    x = x[x.abs() > 1e-3].float()  # off the kinks

    def by_torch(x):
        x = x.clone().requires_grad_()
        y = op.oracle(x.unsqueeze(0)).squeeze(0)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    def worst(found, exact):
        return ((found.double() - exact).abs() / exact.abs().clamp_min(1e-2)).max().item()

    ones = torch.ones_like(x)
    for mine, theirs, exact in zip(
        op._rules(x, ones, ones, ones)[:2], by_torch(x), by_torch(x.double()), strict=True
    ):
        assert worst(mine, exact) <= max(2 * worst(theirs, exact), 4e-7)
