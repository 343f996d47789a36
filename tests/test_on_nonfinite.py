"""Tasks whose loss or gradient is not finite: left out of the meta-step, counted and named."""

import copy
import pickle

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, NonFiniteWarning, outer, presets
from maml_fast.problem import TaskBatch
from tests.networks import Draw, assert_close

SIZES, TASKS = (3, 6, 2), 9
BACKENDS = ("reference", "functional", "torch", "cpu")
BAD = [0, 4, 8]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def build(backend, on_nonfinite="skip", **options):
    draw = Draw(11)
    rate = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64))
    batch = TaskBatch(*(t.clone() for t in draw.batch("mse", TASKS, 4, 5, SIZES)[:4]))
    options = {"inner_lr": rate, "inner_steps": 2, **options}
    maml = MAML(draw.mlp(SIZES), backend=backend, on_nonfinite=on_nonfinite, **options)
    return maml, batch


def spoil(batch):
    """One task in its support, one in its query, one in a target."""
    batch.support_x[0, 1, 2], batch.query_x[4, 0, 0], batch.query_y[8, 3, 1] = NAN, INF, NAN


def others(batch, bad=BAD):
    kept = [task for task in range(TASKS) if task not in bad]
    return TaskBatch(*(t[kept] for t in batch[:4])), kept


def all_gradients(maml):
    return {name: p.grad.clone() for name, p in maml.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_are_those_of_the_other_tasks(backend, reduction):
    maml, batch = build(backend, reduction=reduction)
    spoil(batch)
    out = maml(*batch)
    out.loss.backward()
    found = all_gradients(maml)
    assert out.skipped.dtype == torch.int64
    assert out.skipped.tolist() == BAD
    part, kept = others(batch)
    twin = copy.deepcopy(maml)
    twin.zero_grad()
    twin.on_nonfinite = "raise"
    wanted = twin(*part)
    wanted.loss.backward()
    assert_close(found, all_gradients(twin), 1e-12)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-12, atol=0)
    for name in ("task_losses", "support_losses", "query_outputs"):
        ours, theirs = getattr(out, name), getattr(wanted, name)
        assert len(ours) == TASKS
        torch.testing.assert_close(ours[kept], theirs, rtol=1e-12, atol=1e-14)
    assert not out.task_losses[[0, 8]].isfinite().any()  # tanh made the loss of task 4 finite


def test_value_and_grad_and_no_grad_leave_out_the_same(backend):
    maml, batch = build(backend)
    spoil(batch)
    out = maml(*batch)
    out.loss.backward()
    result, found = maml.value_and_grad(*batch)
    assert_close(found, all_gradients(maml), 1e-13)
    assert result.skipped.tolist() == BAD
    torch.testing.assert_close(result.loss, out.loss.detach(), rtol=1e-13, atol=0)
    batch.query_x[4] = NAN  # not in its gradient alone, which is not looked at here
    with torch.no_grad():
        plain = maml(*batch)
    assert plain.skipped.tolist() == BAD
    torch.testing.assert_close(plain.loss, out.loss.detach(), rtol=1e-13, atol=0)


def test_none_is_left_out_of_good_tasks(backend):
    maml, batch = build(backend)
    out = maml(*batch)
    assert out.skipped is None
    assert torch.equal(out.loss, build(backend, "raise")[0](*batch).loss)


def test_tasks_whose_gradients_alone_are_not_finite(backend):
    """A finite loss whose derivative overflows: 1e160^2 in the Hessian-vector product."""
    one = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(one.weight)
    x = torch.tensor([1.0, 1e100, 1.0, 1e100, 1.0], dtype=torch.float64).view(5, 1, 1)
    maml = MAML(one, inner_lr=1e110, backend=backend, on_nonfinite="skip")
    out = maml(x, torch.zeros_like(x), torch.ones_like(x), torch.ones_like(x))
    out.loss.backward()
    assert out.skipped.tolist() == [1, 3]
    assert out.task_losses.isfinite().all()
    found = one.weight.grad.clone()
    one.zero_grad()
    x = torch.ones(3, 1, 1, dtype=torch.float64)
    maml(x, torch.zeros_like(x), x, x).loss.backward()
    assert torch.isfinite(found).all()
    assert torch.equal(found, one.weight.grad)


def test_warning_names_the_tasks(backend):
    maml, batch = build(backend, "warn")
    spoil(batch)
    with pytest.warns(NonFiniteWarning, match="left out.*3 of 9 tasks: 0, 4, 8"):
        out = maml(*batch)
    assert out.skipped.tolist() == BAD


@pytest.mark.parametrize("on_nonfinite", ["skip", "warn"])
def test_where_no_task_is_left(backend, on_nonfinite):
    maml, batch = build(backend, on_nonfinite)
    batch.query_y.fill_(NAN)
    with pytest.raises(NonFiniteError, match="9 of 9 tasks"):
        maml(*batch)
    assert all(p.grad is None for p in maml.parameters())


def test_gradients_by_the_inputs_are_zero_there(backend):
    maml, batch = build(backend)
    spoil(batch)
    x = batch.support_x.requires_grad_()
    maml(*batch).loss.backward()
    part, kept = others(TaskBatch(*(t.detach() for t in batch[:4])))
    y = part.support_x.requires_grad_()
    maml(*part).loss.backward()
    assert_close({"x": x.grad[kept]}, {"x": y.grad}, 1e-12)
    assert (x.grad[BAD] == 0).all()


def test_with_weights_of_rows(backend):
    maml, batch = build(backend)
    weight = Draw(3).normal(TASKS, 4).abs()
    weight[:, 1] = 0  # and with it the NaN of task 0
    spoil(batch)
    out = maml(*batch[:4], support_weight=weight)
    out.loss.backward()
    found = all_gradients(maml)
    assert out.skipped.tolist() == [4, 8]
    part, kept = others(batch, [4, 8])
    maml.zero_grad()
    maml(*part[:4], support_weight=weight[kept]).loss.backward()
    assert_close(found, all_gradients(maml), 1e-12)


def test_residuals_of_the_implicit_gradient():
    draw = Draw(2)
    batch = TaskBatch(*(t.clone() for t in draw.batch("mse", TASKS, 4, 5, SIZES)[:4]))
    spoil(batch)
    maml = presets.imaml(draw.mlp(SIZES), inner_lr=0.1, inner_steps=3, loss="mse")
    assert isinstance(maml.meta_gradient, outer.Implicit)
    maml.on_nonfinite = "skip"
    out = maml(*batch)
    _, kept = others(batch)
    assert out.skipped.tolist() == BAD
    assert out.residuals.shape == (TASKS,)
    assert out.residuals[kept].isfinite().all()


def test_compiled_callers_leave_out_the_same():
    maml, batch = build("cpu")
    spoil(batch)

    def loss(*data):
        return maml(*data).loss

    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(*batch[:4])
    assert torch.equal(found.detach(), loss(*batch[:4]).detach())


def test_bad_choices_and_old_states():
    with pytest.raises(ValueError, match="on_nonfinite is 'ignore'.*'raise', 'skip', 'warn'"):
        build("cpu", "ignore")
    with pytest.raises(TypeError, match="on_nonfinite is bool"):
        build("cpu", True)
    maml, batch = build("cpu")
    maml.on_nonfinite = "no"
    with pytest.raises(ValueError, match="on_nonfinite is 'no'"):
        maml(*batch)
    maml, batch = build("cpu")
    assert pickle.loads(pickle.dumps(maml)).on_nonfinite == "skip"
    state = maml.__getstate__()
    del state["on_nonfinite"]
    old = MAML.__new__(MAML)
    old.__setstate__(state)
    assert old.on_nonfinite == "raise"
