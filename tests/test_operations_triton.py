"""The operation tests, run on the Triton rules: the same tests and examples, none edited for it."""

import pytest
import torch
from torch.func import grad, vmap

from maml_fast.ops import OPERATIONS, LeakyReLU, ReLU, Scale, Sigmoid, SiLU, Sine, Softplus, Tanh
from maml_fast.ops.pointwise import Pointwise
from tests import test_operations, test_operations_cpu
from tests.tile_kernels import activation, pointwise


def chain(*operations):
    return tuple((op.native[0], *op.native[1]) for op in operations)


class ByTriton:
    """An operation whose rules are those of the tile functions; `saved` is f' and f''."""

    def __init__(self, op):
        self.op, self.ops = op, chain(op)
        self.oracle, self.out_features = op.oracle, op.out_features

    def __repr__(self):
        return f"{self.op} by triton"

    def _rules(self, x, dy, t_x, t_dy):
        """y, dx, t_y, t_dx"""
        y, slope, curve = activation(self.ops, x)
        return y, slope * dy, slope * t_x, slope * t_dy + curve * t_x * dy

    def forward(self, step, x):
        y, slope, curve = activation(self.ops, x)
        return y, (slope, curve)

    def backward(self, step, saved, dy):
        return saved[0] * dy

    def tangent(self, step, saved, dy, t_x):
        return None if t_x is None else saved[0] * t_x

    def tangent_backward(self, step, saved, dy, t_x, t_dy):
        slope, curve = saved
        return slope * t_dy + (0 if t_x is None else curve * t_x * dy)


EXAMPLES = [
    pytest.param(ByTriton(op), features, id=f"{type(op).__name__}-{op}-{features}")
    for kind in OPERATIONS
    for op, features in kind.examples()
    if issubclass(kind, Pointwise)
]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Float32 rules, of float64 data: the tests they share compare to float32's digits."""

    def close(found, wanted):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 3e-7 * wanted.norm()

    monkeypatch.setattr(test_operations, "close", close)


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
class TestRules:
    values = test_operations.TestRules.values
    test_forward = test_operations.TestRules.test_forward
    test_backward = test_operations.TestRules.test_backward
    test_tangent = test_operations.TestRules.test_tangent
    test_tangent_backward = test_operations.TestRules.test_tangent_backward


@pytest.mark.parametrize("x", [-1e4, -80.0, -20.0, 0.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_extreme_values_stay_finite(op, features, x):
    test_operations.test_extreme_values_stay_finite(op, features, x)
    assert activation(op.ops, torch.tensor([x]))[0].isfinite()


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_nan_stays_nan(op, features):
    test_operations_cpu.test_nan_stays_nan(op, features)


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_float32_is_as_exact_as_torch(op, features):
    test_operations_cpu.test_float32_is_as_exact_as_torch(op, features)


CHAINS = [
    (),
    (Scale(30.0), Sine()),
    (Scale(-0.5), LeakyReLU(0.2)),
    (Tanh(), Scale(2.0), SiLU()),
    (LeakyReLU(0.3), Softplus(2.5, 1.0), Sigmoid()),
    (SiLU(), ReLU(), Tanh(), Sine()),
]


def exact(operations, x):
    """f, f', f'' by torch, in float64"""

    def f(x):
        for op in operations:
            x = op.oracle(x)
        return x

    x = x.double()
    if not operations:
        return x, torch.ones_like(x), torch.zeros_like(x)
    return f(x), vmap(grad(f))(x), vmap(grad(grad(f)))(x)


@pytest.mark.parametrize("operations", CHAINS, ids=lambda operations: str(chain(*operations)))
def test_chains(operations, draw):
    x = test_operations.clear_of_kinks(3 * draw.normal(2000)).float()
    for found, wanted in zip(activation(chain(*operations), x), exact(operations, x), strict=True):
        # sin(30 x) turns a rounding of its argument, of about 100, into an error of 4e-6
        bound = 5e-6 if ("scale", 30.0) in chain(*operations) else 5e-7
        assert (found - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("op", [param.values[0] for param in EXAMPLES], ids=str)
def test_curve_is_exact(op):
    """f'' at 20,000 points, against float64."""
    x = torch.linspace(-12, 12, 20_001)
    x = x[x.abs() > 1e-3]
    if op.ops[0][0] == "softplus":  # its second derivative jumps at the threshold
        _, beta, threshold = op.ops[0]
        x = x[(x * beta - threshold).abs() > 1e-3]
    wanted = exact([op], x)[2]
    assert bool(wanted.any()) == pointwise.is_curved(op.ops)
    # from an output near 1, f'' has no more digits than the output
    bound = 4e-7 if pointwise.keeps_input(op.ops) else 1e-6
    assert (activation(op.ops, x)[2] - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("reach", [10.0, 3e3, 1e4, 1e5])
def test_sine_of_large_arguments(reach):
    x = torch.linspace(-reach, reach, 50_001)
    multiples = torch.arange(-int(reach / 2), int(reach / 2)) * torch.pi / 2
    x = torch.cat([x, multiples.float()])
    for found, wanted in zip(activation((("sine",),), x), exact([Sine()], x), strict=True):
        assert (found - wanted).abs().max() <= 1.5e-7


def test_sine_beyond_its_reach_is_nan():
    x = torch.tensor([1.001e5, -1e6, 1e30, torch.inf, -torch.inf])
    assert all(found.isnan().all() for found in activation((("sine",),), x))


@pytest.mark.parametrize("x", [-9.0, -5.0, -1e-4, -1e-12, 1e-12, 1e-4])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "gelu", "softplus"])
def test_small_values_keep_their_digits(name, x):
    """Relative to the value itself, however small it is."""
    x = torch.tensor([x])
    wanted = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: x * torch.erfc(-x / 2**0.5) / 2,
        "softplus": lambda x: torch.log1p(x.exp()),
    }[name](x.double())
    ops = ((name, 1.0, 20.0),) if name == "softplus" else ((name,),)
    # gelu rounds x^2 / 2, of 40 at -9, before the exponential
    bound = 3e-6 if name == "gelu" and x < -8 else 5e-7
    assert (activation(ops, x)[0] - wanted).abs() <= bound * wanted.abs()


@pytest.mark.parametrize(
    ("operations", "slopes"),
    [
        ((ReLU(),), [0, 0, 1, 1]),
        ((LeakyReLU(0.3),), [0.3, 0.3, 1, 0.3]),
        ((LeakyReLU(0.0),), [0, 0, 1, 0]),
        ((LeakyReLU(-0.3),), [-0.3, -0.3, 1, -0.3]),
        ((), [1, 1, 1, 1]),
    ],
)
def test_kinks(operations, slopes):
    """The slopes at -1, 0, 1 and NaN, as torch has them."""
    x = torch.tensor([-1.0, 0.0, 1.0, torch.nan])
    assert torch.equal(activation(chain(*operations), x)[1], torch.tensor(slopes).float())
    for op in operations:
        _, saved = op.forward(0, x)
        assert torch.equal(op.backward(0, saved, torch.ones(4)), torch.tensor(slopes).float())


@pytest.mark.parametrize(
    ("operations", "keeps", "curved"),
    [
        ((), False, False),
        ((ReLU(),), False, False),
        ((LeakyReLU(0.3),), False, False),
        ((LeakyReLU(0.0),), True, False),
        ((LeakyReLU(-0.3),), True, False),
        ((Tanh(),), False, True),
        ((Sigmoid(),), False, True),
        ((Scale(2.0),), True, False),
        ((Scale(2.0), ReLU()), True, False),
        ((Scale(2.0), Sine()), True, True),
        ((SiLU(),), True, True),
    ],
)
def test_what_is_kept(operations, keeps, curved):
    assert pointwise.keeps_input(chain(*operations)) is keeps
    assert pointwise.is_curved(chain(*operations)) is curved
