"""Every rule of every loss in Triton, against torch.func on its oracle in float64."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from maml_fast.losses import LOSSES
from tests.tile_kernels import loss_rules


@pytest.fixture(params=LOSSES)
def loss(request):
    return request.param


def oracle(loss, z, y, t_z):
    """Losses of the rows, and D and t_D of their sum."""
    scale = 1 if loss == "cross_entropy" else z.shape[1]  # the oracle is a mean over rows and these
    rows = torch.stack([LOSSES[loss].oracle(z[r : r + 1], y[r : r + 1]) for r in range(len(z))])

    def D(z):
        # under vmap, as tests/test_losses.py has it: not all losses have a jvp without
        return vmap(grad(LOSSES[loss].oracle))(z.unsqueeze(0), y.unsqueeze(0)).squeeze(0)

    return (rows * scale, *(len(z) * scale * exact for exact in jvp(D, (z,), (t_z,))))


def values(loss, draw, rows, features):
    z = (2 * draw.normal(rows, features)).float().double()  # on both sides of huber's corner
    y = draw.target(loss, rows, features=features)
    y = y if loss == "cross_entropy" else y.float().double()
    return z, y, draw.normal(rows, features).float().double()


def compare(found, wanted, bound=3e-7):
    """Each rule inside its mask, and zeros outside."""
    for mine, exact in zip(found, wanted, strict=True):
        inside = tuple(slice(n) for n in exact.shape)
        assert (mine[inside] - exact).norm() <= bound * exact.norm()
        outside = mine.clone()
        outside[inside] = 0
        assert (outside == 0).all()  # NaN is not 0


@pytest.mark.parametrize(
    ("rows", "features", "size"),
    [(5, 5, (8, 8)), (3, 1, (4, 1)), (3, 1, (16, 16)), (1, 4, (1, 4)), (30, 20, (32, 32))],
)
def test_rules(loss, draw, rows, features, size):
    z, y, t_z = values(loss, draw, rows, features)
    compare(loss_rules(loss, z, y, t_z, size), oracle(loss, z, y, t_z))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_class_numbers_of_both_widths(draw, dtype):
    z, y, t_z = values("cross_entropy", draw, 6, 7)
    compare(loss_rules("cross_entropy", z, y.to(dtype), t_z), oracle("cross_entropy", z, y, t_z))


@pytest.mark.parametrize("wrong", [-1, -100, 5, 7, 8, 2**31 - 1, 2**32 + 1])
def test_a_class_number_out_of_range_is_nan(draw, wrong):
    """In the padding, too: 5 classes in 8 columns. Other rows are not touched."""
    z, y, t_z = values("cross_entropy", draw, 3, 5)
    y[1] = wrong
    losses, _, _ = loss_rules("cross_entropy", z, y, t_z)
    assert losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("size", [1e4, 80.0])
def test_large_logits_stay_finite(loss, size):
    z = torch.tensor([[size, -size, 0.0], [-size, size, 0.0]]).double()
    y = torch.tensor([1, 1]) if loss == "cross_entropy" else torch.tensor([[0.0, 1.0, 1.0]] * 2)
    y = y if loss == "cross_entropy" else y.double()
    t_z = torch.ones_like(z)
    found = loss_rules(loss, z, y, t_z)
    assert all(tensor.isfinite().all() for tensor in found)
    losses, D, _ = oracle(loss, z, y, t_z)
    compare(found[:2], (losses, D))


def test_equal_logits(draw):
    """The largest logit is there more than once."""
    z = torch.full((2, 3), 5.0, dtype=torch.float64)
    y, t_z = torch.tensor([0, 2]), draw.normal(2, 3).float().double()
    compare(loss_rules("cross_entropy", z, y, t_z), oracle("cross_entropy", z, y, t_z))


@pytest.mark.parametrize("features", [1, 3])
def test_nan_is_not_hidden(loss, features):
    """A prediction that is NaN makes its row's loss NaN, and no other's."""
    z = torch.ones(2, features, dtype=torch.float64)
    z[0, features - 1] = torch.nan
    y = torch.zeros(2, dtype=torch.int64) if loss == "cross_entropy" else torch.zeros_like(z)
    losses, D, _ = loss_rules(loss, z, y, torch.ones_like(z))
    assert losses.isnan().tolist() == [True, False]
    assert D.isnan()[0, features - 1]
    assert not D.isnan()[1].any()


def test_huber_at_its_corner():
    """As autograd has it: the second derivative at |z - y| = 1 is 1."""
    z = torch.tensor([[1.0, -1.0, 1.0 + 2**-23, -1.0 - 2**-23]], dtype=torch.float64)
    y, t_z = torch.zeros_like(z), torch.ones_like(z)
    assert loss_rules("huber", z, y, t_z)[2].tolist() == [[1, 1, 0, 0]]
    assert oracle("huber", z, y, t_z)[2].tolist() == [[1, 1, 0, 0]]
