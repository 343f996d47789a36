"""Whole meta-steps on the layer kernels, against a plain loop in float64."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from maml_fast import MAML
from maml_fast.backends.planned import PlannedStepper
from maml_fast.backends.stepping import adapt, drive
from maml_fast.problem import TaskBatch
from tests.networks import assert_close, by_graph

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from maml_fast.backends.triton_layers import LayerStepper, rate_table  # noqa: E402
from maml_fast.kernels import attend as kernel  # noqa: E402
from maml_fast.kernels import matmul  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-6
SMALL = kernel.Config(rows=16, keys=16, features=16, width=16, warps=4, stages=1)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3.0 * x)


class Squeezed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that the tests' sizes do not fit, and several of them."""
    monkeypatch.setattr(kernel, "default_config", lambda sizes: SMALL)
    kernel.describe.cache_clear()
    yield
    kernel.describe.cache_clear()


def on_device(batch):
    kinds = [torch.float32 if t.is_floating_point() else t.dtype for t in batch[:4]]
    return TaskBatch(*(t.to(DEVICE, kind) for t, kind in zip(batch[:4], kinds, strict=True)))


class Case:
    """One problem in float64, and in float32 with a plan of backend "torch" for its layers."""

    def __init__(self, model, batch, loss, rates, steps, forms, first_order=False):
        self.options = dict(loss=loss, inner_steps=steps, first_order=first_order)
        self.model, self.batch, self.rates, self.steps = model, batch, rates, steps
        self.own_batch = on_device(batch)
        own_model = copy.deepcopy(model).to(DEVICE, torch.float32)
        self.maml = MAML(own_model, inner_lr=rates, backend="torch", **self.options)
        planned, self.problem = self.maml._prepare(self.own_batch, steps)
        layers, forms = [], itertools.cycle(forms)
        for layer in planned.plan.layers:
            adapts = layer.form in ("factored", "dense")
            layers.append(dataclasses.replace(layer, form=next(forms)) if adapts else layer)
        self.plan = dataclasses.replace(planned.plan, layers=layers)

    def stepper(self, gradient=True, precision="tf32x3", batch=None, **options):
        batch = batch or self.own_batch
        return LayerStepper(self.problem, batch, self.plan, gradient, precision, **options)

    def run(self, **options):
        return drive(self.stepper(**options), self.problem, options.get("gradient", True))

    def found(self, outcome):
        """Gradients as `by_graph` names them."""
        found = dict(outcome.gradients)
        found |= {f"rate of {name}": rate for name, rate in outcome.rate_gradients.items()}
        return {name: tensor.cpu().double() / len(self.batch[0]) for name, tensor in found.items()}

    def wanted(self):
        first_order = self.options["first_order"]
        return by_graph(
            self.model, self.batch, self.options["loss"], self.rates, self.steps, first_order
        )

    def check(self, **options):
        """Losses, and each gradient by name: at most twice the error of torch's, or 1e-6."""
        outcome = self.run(**options)
        loss, wanted = self.wanted()
        torch.testing.assert_close(
            outcome.task_losses.mean().cpu().double(), loss, rtol=1e-5, atol=0
        )
        own = drive(
            PlannedStepper(self.problem, self.own_batch, self.plan, True), self.problem, True
        )
        found, own = self.found(outcome), self.found(own)
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert found[name].shape == tensor.shape, name
            of_torch = 2 * (own[name] - tensor).norm().item()
            error, size = (found[name] - tensor).norm().item(), tensor.norm().item()
            assert error <= max(BOUND * size, of_torch), (name, error, of_torch, size)
        return outcome


FORMS = {
    "factored": ["factored"],
    "dense": ["dense"],
    "mixed": ["factored", "dense", "factored"],
    "mixed the other way": ["dense", "factored", "dense"],
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def forms(request):
    return request.param


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_steps(steps, forms, draw):
    sizes = (7, 19, 5, 3)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 4, 5, sizes)
    Case(model, batch, "mse", 0.1, steps, forms).check()


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Softplus, nn.GELU, nn.Sigmoid, Sine, nn.ReLU])
def test_activations(activation, draw):
    sizes = (3, 9, 8, 4)
    model, batch = draw.mlp(sizes, activation), draw.batch("cross_entropy", 2, 3, 2, sizes)
    Case(model, batch, "cross_entropy", 0.2, 2, ["factored", "factored", "dense"]).check()


@pytest.mark.parametrize("first_order", [False, True])
def test_rates_that_learn(first_order, forms, draw):
    sizes, steps = (3, 6, 5, 2), 3
    model, batch = draw.mlp(sizes), draw.batch("huber", 2, 3, 4, sizes)
    parameters = itertools.count(1)
    rates = {
        name: nn.Parameter(torch.tensor([0.05 * next(parameters), 0.1, 0.3], dtype=torch.float64))
        for name, _ in model.named_parameters()
    }
    Case(model, batch, "huber", rates, steps, forms, first_order).check()


def test_first_order_differs_from_second(draw):
    sizes = (3, 8, 8, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 4, 4, sizes)
    second = Case(model, batch, "mse", 0.1, 2, ["factored"])
    first = Case(model, batch, "mse", 0.1, 2, ["factored"], first_order=True)
    first = first.found(first.check())
    for name, tensor in second.found(second.run()).items():
        assert (tensor - first[name]).norm() > 0.05 * tensor.norm(), name


def test_many_tiles(small_tiles, draw):
    """Rows, keys, features and widths of several tiles each, the last of them not full."""
    sizes = (3, 17, 18, 2)
    model, batch = draw.mlp(sizes), draw.batch("bce_with_logits", 2, 17, 18, sizes)
    Case(model, batch, "bce_with_logits", 0.2, 2, ["factored"]).check()


def test_products_by_the_matmul_kernel(monkeypatch, forms, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 4, sizes)
    model[4].requires_grad_(False)
    case, shapes = Case(model, batch, "mse", 0.2, 2, forms), []
    describe = matmul.describe
    monkeypatch.setattr(matmul, "describe", lambda *a: shapes.append(a[1]) or describe(*a))
    case.check(engine="triton")
    # [T * rows, O, I] of each layer's first pass forward, and of the last layer's backward
    assert {(6, 6, 3), (6, 5, 6), (6, 2, 5), (6, 5, 2)} <= set(shapes)


def test_no_biases(forms, draw):
    sizes = (4, 6, 1, 2)
    model, batch = draw.mlp(sizes, bias=False), draw.batch("mse", 2, 3, 3, sizes)
    Case(model, batch, "mse", 0.1, 2, forms).check()


@pytest.mark.parametrize(
    "frozen",
    [
        ["0.weight", "0.bias"],  # runs once, in front
        ["2.weight", "2.bias"],  # shared, behind a layer that adapts
        ["4.weight", "4.bias"],
        ["0.bias", "2.weight", "4.bias"],  # a weight or a bias alone
        ["0.weight", "2.bias", "4.weight"],
    ],
    ids=", ".join,
)
def test_frozen(frozen, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 4, sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    Case(model, batch, "mse", 0.2, 2, ["factored"]).check()


@pytest.mark.parametrize("forms", [["factored"], ["dense", "factored"], ["factored", "dense"]])
def test_positions(forms, draw):
    """Linear layers over the positions of a row, before a flatten."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.SiLU(), nn.Linear(6, 2)
    )
    draw.initialise(model.double())
    batch = draw.batch("mse", 2, 4, 3, (3, 2))
    batch = batch._replace(support_x=draw.normal(2, 4, 3, 3), query_x=draw.normal(2, 3, 3, 3))
    Case(model, batch, "mse", 0.1, 2, forms).check()


def test_a_chain_of_all_kinds(draw):
    """Two activations in a row, two linear layers in a row, one activation last, and a squeeze."""
    model = Squeezed(
        nn.Linear(3, 5), nn.Linear(5, 6), nn.Tanh(), nn.Softplus(), nn.Linear(6, 1), nn.Sigmoid()
    )
    draw.initialise(model.double())
    batch = draw.batch("mse", 2, 3, 4, (3, 1))
    batch = batch._replace(support_y=batch.support_y[..., 0], query_y=batch.query_y[..., 0])
    outcome = Case(model, batch, "mse", 0.3, 2, ["factored"]).check()
    assert outcome.query_outputs.shape == (2, 4)


def test_tensors_that_are_not_contiguous(draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 4, sizes)
    case = Case(model, batch, "mse", 0.2, 2, ["factored", "dense"])
    wanted = case.run()
    strided = TaskBatch(*(t.mT.contiguous().mT for t in case.own_batch[:4]))
    parameters = {}
    for name, p in case.problem.parameters.items():
        parameters[name] = p.mT.contiguous().mT if p.dim() > 1 else p.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in (*strided[:4], *parameters.values()))
    case.problem = dataclasses.replace(case.problem, parameters=parameters)
    assert_close(case.run(batch=strided).gradients, wanted.gradients, 1e-6)


def test_adapted_models(forms, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes, nn.SiLU), draw.batch("mse", 2, 3, 4, sizes)
    case = Case(model, batch, "mse", 0.2, 3, forms)
    x, y, q, _ = case.own_batch[:4]
    stepper = case.stepper(gradient=False, batch=TaskBatch(x, y, x, y))
    adapted = adapt(stepper, 3, x)
    maml = MAML(model, inner_lr=0.2, inner_steps=3, backend="torch")
    wanted = maml.adapt(batch.support_x, batch.support_y)
    close = dict(rtol=1e-5, atol=1e-6)
    for rows, own in ((q, batch.query_x), (x, batch.support_x)):
        found = adapted.predict(rows).cpu().double()
        torch.testing.assert_close(found, wanted(own).detach(), **close)
    torch.testing.assert_close(
        adapted.support_losses.cpu().double(), wanted.support_losses, **close
    )
    for name, tensor in wanted.parameters().items():
        torch.testing.assert_close(adapted.parameters()[name].cpu().double(), tensor, **close)


def test_without_a_gradient(draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 4, sizes)
    case = Case(model, batch, "mse", 0.2, 2, ["factored"])
    with_gradient, outcome = case.run(), case.run(gradient=False)
    assert outcome.gradients is None
    assert torch.equal(outcome.task_losses, with_gradient.task_losses)
    assert torch.equal(outcome.support_losses, with_gradient.support_losses)


def test_rates_handed_over(draw):
    """Factored layers know rates from the table alone: a captured graph may be given others."""
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 4, sizes)
    case = Case(model, batch, "mse", 0.1, 2, ["factored"])
    other = Case(model, batch, "mse", 0.3, 2, ["factored"])
    table = rate_table(other.problem, other.plan)
    assert table.shape == (2, 2, 2)
    assert_close(case.run(rates=table).gradients, other.run().gradients, 0)
    assert_close(case.run().gradients, case.run().gradients, 0)  # the same bits


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        ("ieee", 0, 1e-6),
        ("tf32", 1e-5, 3e-2),
        ("bf16", 1e-4, 2e-1),
    ],
)
def test_precisions(precision, least, most, draw):
    sizes = (5, 8, 7, 3)
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 4, 4, sizes)
    case = Case(model, batch, "mse", 0.2, 2, ["factored"])
    found, wanted = case.found(case.run(precision=precision)), case.wanted()[1]
    errors = [(found[name] - t).norm().item() / t.norm().item() for name, t in wanted.items()]
    assert least <= max(errors) <= most
