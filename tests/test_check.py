"""`check` passes what is right, and fails what is wrong."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, UnsupportedModelError, check
from maml_fast.fast_weights import DenseLinear, FactoredInput
from tests.networks import Draw

SIZES = (3, 12, 12, 2)


@pytest.fixture(params=[torch.float32, torch.float64])
def case(request, draw):
    model = draw.mlp(SIZES).to(request.param)
    batch = [t.to(request.param) for t in draw.batch("mse", 3, 4, 4, SIZES)[:4]]
    return model, batch


@pytest.mark.parametrize("backend", ["reference", "functional", "torch", "cpu", "auto"])
def test_right(backend, case):
    model, batch = case
    report = check(MAML(model, inner_steps=2, backend=backend), *batch)
    assert report.passed
    names = [t.name for t in report.tensors]
    assert names[:3] == ["task_losses", "support_losses", "query_outputs"]
    assert names[3:] == [f"gradient of {name}" for name, _ in model.named_parameters()]
    assert str(report).count("\n") == len(names) + 1
    assert "TOO LARGE" not in str(report)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("form", "stage"), [("dense", DenseLinear), ("factored", FactoredInput)])
def test_wrong(form, stage, case, monkeypatch):
    """A Hessian-vector product that is off by one part in a thousand."""
    model, batch = case
    maml = MAML(model, inner_lr=0.1, backend="torch", fast_weights=form)
    maml(*batch)  # a plan is tried before it is first used, which would catch it too
    right = stage.tangent

    def wrong(self, *args):
        return right(self, *args) * 1.001

    monkeypatch.setattr(stage, "tangent", wrong)
    report = check(maml, *batch)
    assert not report.passed
    failed = {t.name for t in report.tensors if not t.passed}
    assert "gradient of 0.weight" in failed
    assert "task_losses" not in failed
    assert str(report).count("TOO LARGE") == len(failed)


def test_silent_first_order_is_caught(case, monkeypatch):
    model, batch = case
    maml = MAML(model, inner_lr=0.1, backend="torch", fast_weights="dense")
    maml(*batch)
    monkeypatch.setattr(DenseLinear, "pull_back", lambda self, *args: None)
    assert not check(maml, *batch).passed
    with pytest.raises(UnsupportedModelError, match="another result than autograd"):
        MAML(model, inner_lr=0.1, backend="torch", fast_weights="dense")(*batch)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_that_a_norm_takes_away(backend, dtype):
    """Its gradient is 0, of which two programs have rounding only: judged beside all others."""
    draw = Draw(2, dtype)
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    batch = draw.batch("mse", 3, 4, 5, (3, 2))
    report = check(MAML(draw.initialise(model), "mse", 0.1, 2, backend=backend), *batch)
    assert report.passed, str(report)
    bias = next(t for t in report.tensors if t.name.endswith("0.bias"))
    assert 0 <= bias.error < 1e-6
