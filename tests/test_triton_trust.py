"""Backend "triton": nothing wrong in silence, whatever it is called with and whatever changes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, UnsupportedModelError, check
from maml_fast.problem import TaskBatch
from tests.networks import by_graph, gradients

triton = pytest.importorskip("triton")
from maml_fast import plan as plans  # noqa: E402
from maml_fast.kernels import fused_program  # noqa: E402
from tests.triton_steps import (  # noqa: E402
    DEVICE,
    FORMS,
    assert_exact,
    in_float32,
    kernels,
    on_device,
)

__all__ = ["kernels"]  # a fixture


def test_passes_add_up_and_the_same_call_gives_the_same_bits(kernels, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 5, 4, 3, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, 2, **options)
    first = {n: g.clone() for n, g in gradients(maml, on_device(batch)).items()}
    again = gradients(maml, on_device(batch))
    assert all(torch.equal(g, first[n]) for n, g in again.items())
    maml.chunk_size = 3
    assert_exact(maml, model, batch, 0.2, 2)


def test_without_a_gradient(kernels, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, 2, **options)
    with torch.no_grad():
        out = maml(*on_device(batch))
    wanted = MAML(model, "mse", 0.2, 2, backend="reference")(*batch)
    for name in ("loss", "task_losses", "support_losses", "query_outputs"):
        mine, theirs = getattr(out, name), getattr(wanted, name).detach()
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-5, atol=1e-6)
    assert not out.loss.requires_grad


def test_data_of_any_strides(kernels, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, 1, **options)
    plain = {n: g.clone() for n, g in gradients(maml, on_device(batch)).items()}
    turned = TaskBatch(*(t.mT.contiguous().mT for t in on_device(batch)[:4]))
    assert not turned.support_x.is_contiguous()
    found = gradients(maml, turned)
    assert all(torch.equal(g, plain[n]) for n, g in found.items())
    with torch.no_grad():  # and parameters, which are read where they lie
        maml.model[0].weight = nn.Parameter(maml.model[0].weight.t().contiguous().t())
    found = gradients(maml, on_device(batch))
    assert all(torch.equal(g, plain[n]) for n, g in found.items())


def test_parameters_and_rates_that_change(kernels, draw):
    """What is kept from call to call follows the model."""
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", torch.tensor(0.1), 1, **options)
    gradients(maml, on_device(batch))
    with torch.no_grad():
        for mine, theirs in zip(maml.model.parameters(), model.parameters(), strict=True):
            theirs.mul_(1.25)
            mine.copy_(theirs)
    maml.inner_lr.fill_(0.3)
    assert_exact(maml, model, batch, 0.3, 1)


class TestBadInput:
    @pytest.fixture
    def maml(self, kernels, draw):
        model = in_float32(draw.mlp((3, 6, 4)))
        options = dict(backend="triton", fast_weights=FORMS[kernels])
        return MAML(model, "cross_entropy", 0.2, 1, **options)

    @pytest.fixture
    def batch(self, draw):
        return on_device(draw.batch("cross_entropy", 5, 4, 3, (3, 6, 4)))

    @pytest.mark.parametrize("name", ["support_y", "query_y"])
    @pytest.mark.parametrize("number", [-1, 4])
    def test_classes_out_of_range(self, maml, batch, name, number):
        maml(*batch)  # so that the plan is known, and the checks are those of later calls
        getattr(batch, name)[2, 1] = number
        with pytest.raises(ValueError, match=f"{name} has class numbers.*wanted is 0 to 3"):
            maml(*batch)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
    def test_tasks_that_are_not_finite(self, maml, batch):
        maml(*batch)
        batch.query_x[3, 1, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="query loss is not finite in 1 of 5 tasks: 3"):
            maml(*batch)
        batch.support_x[1, 0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"support loss before inner step 0.*: 1"):
            maml(*batch)

    def test_float64(self, maml, batch):
        maml.double()
        batch = TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch[:4]))
        with pytest.raises(UnsupportedModelError, match=r"torch.float64.*take backend 'torch'"):
            maml(*batch)

    def test_graphs_are_a_choice(self, maml):
        with pytest.raises(TypeError, match="cuda_graphs is 1; wanted is True or False"):
            MAML(maml.model, cuda_graphs=1)


def test_the_plan_says_what_would_run(draw):
    sizes = (3, 6, 2)
    batch = on_device(draw.batch("mse", 3, 4, 5, sizes))
    text = str(MAML(in_float32(draw.mlp(sizes)), backend="triton").plan(*batch[:4:2]))
    assert "fused kernels" in text
    assert "products in tf32x3" in text
    assert "estimated, not measured" in text
    wide = in_float32(draw.mlp((3, 130, 2)))
    text = str(MAML(wide, backend="triton").plan(*batch[:4:2]))
    assert "layers kernels (layer '0' is wider than 128)" in text


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000])
def test_no_nan_becomes_a_number(setting, bits, draw):
    """Rounding works on bit patterns; that of a GPU's own NaN is all ones."""
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), on_device(draw.batch("mse", 3, 4, 5, sizes))
    maml = MAML(in_float32(model), "mse", 0.2, 1, backend="triton")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        maml(*batch)
        batch.query_x.view(torch.int32)[1, 2, 0] = bits
        assert batch.query_x.isnan().sum() == 1
        with pytest.raises(NonFiniteError, match="1 of 3 tasks: 1"):
            maml(*batch)
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_reach_frozen_layers(kernels, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    model[0].requires_grad_(False)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, 2, **options)
    wanted = gradients(maml, on_device(batch))
    wanted = {name: g.clone() for name, g in wanted.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(maml, on_device(batch))
    assert all(torch.equal(found[name], g) for name, g in wanted.items())


def test_under_another_default_dtype(kernels, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    torch.set_default_dtype(torch.float64)
    try:
        assert_exact(MAML(in_float32(model), "mse", 0.2, 1, **options), model, batch, 0.2, 1)
    finally:
        torch.set_default_dtype(torch.float32)


class WithUnused(nn.Module):
    """Parameters before and behind the chain that it does not use."""

    def __init__(self):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(4))
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.behind = nn.Linear(2, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_parameters_that_nothing_uses(kernels, draw):
    model = draw.initialise(WithUnused().double())
    batch = draw.batch("mse", 3, 4, 5, (3, 2))
    wanted = by_graph(model, batch, "mse", 0.2, 2)[1]
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    found = gradients(MAML(in_float32(model), "mse", 0.2, 2, **options), on_device(batch))
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        if name.startswith("be"):
            assert not gradient.any(), name
        else:
            assert (gradient.cpu() - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name


def test_threads_that_share_a_module(kernels, draw):
    sizes = (3, 6, 2)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(draw.mlp(sizes)), "mse", 0.2, 1, **options)
    batches = [on_device(draw.batch("mse", 2, 4, 3, sizes)) for _ in range(4)]
    wanted = [maml.value_and_grad(*batch)[0].loss.item() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda b: maml.value_and_grad(*b)[0].loss.item(), batches))
    assert found == wanted


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_kernels_that_are_wrong_are_not_used(activation, draw, monkeypatch):
    """As by a miscompilation. Where a kink could explain a difference, a gross one only is seen."""
    sizes = (3, 6, 2)
    model, batch = (
        in_float32(draw.mlp(sizes, activation)),
        on_device(draw.batch("mse", 3, 4, 5, sizes)),
    )
    run, wrong = fused_program.run, 2.0 if activation is nn.ReLU else 1.01

    def miscompiled(*arguments):
        run(*arguments)
        arguments[-1].gradients.mul_(wrong)

    monkeypatch.setattr(fused_program, "run", miscompiled)
    with pytest.raises(UnsupportedModelError, match="another result than autograd"):
        MAML(model, "mse", 0.2, 1, backend="triton")(*batch)


def test_auto_goes_on_where_kernels_fail(draw, monkeypatch):
    """On a GPU that Triton cannot compile for, say."""
    sizes = (3, 6, 2)
    model, batch = in_float32(draw.mlp(sizes)), on_device(draw.batch("mse", 3, 4, 5, sizes))

    def fails(*arguments):
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(fused_program, "run", fails)
    monkeypatch.setattr(
        plans,
        "_choose",
        lambda not_by, shapes: (
            ("torch", not_by["triton"][0]) if not_by["triton"] else ("triton", "to be tried")
        ),
    )
    maml = MAML(model, "mse", 0.2, 1)
    maml(*batch)
    plan = maml.plan(batch.support_x, batch.query_x)
    assert plan.backend == "torch"
    assert "its kernels fail here: OutOfResources" in plan.reason
    with pytest.raises(triton.runtime.errors.OutOfResources):
        MAML(model, "mse", 0.2, 1, backend="triton")(*batch)


def test_the_interpreter_is_asked_for_too_late():
    program = """
import os, torch, maml_fast
os.environ["TRITON_INTERPRET"] = "1"
x = torch.randn(2, 3, 4)
maml_fast.MAML(torch.nn.Linear(4, 1), backend="triton")(x, x[..., :1], x, x[..., :1])
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "UnavailableBackendError" in done.stderr
    assert "TRITON_INTERPRET=1 came too late: set it before torch" in done.stderr


def test_check_says_so(kernels, draw):
    sizes = (3, 17, 9, 4)
    model, batch = draw.mlp(sizes), draw.batch("cross_entropy", 3, 4, 5, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    report = check(MAML(in_float32(model), "cross_entropy", 0.2, 2, **options), *on_device(batch))
    assert report.passed, str(report)
