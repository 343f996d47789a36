"""Whole meta-steps of networks of images on the layer kernels, against a plain loop in float64."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from maml_fast import MAML
from maml_fast.backends.planned import PlannedStepper
from maml_fast.backends.stepping import adapt, drive
from maml_fast.kernels import conv, norm
from maml_fast.problem import TaskBatch
from tests.image_networks import NETWORKS, image_batch
from tests.networks import by_graph
from tests.test_triton_layers import Case

RATE = 0.1
# Gradients of a norm's weights cancel to a tenth of what they sum: in some of these networks,
# autograd's own error in float32 is as large.
BOUND = 2e-6


def batch_norm(channels, **options):
    return nn.BatchNorm2d(channels, track_running_stats=False, **options)


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def head(features):
    return nn.Flatten(), nn.Linear(features, 3)


KINDS = {
    "norm, activation and pool": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False), batch_norm(3), nn.Tanh(), nn.MaxPool2d(2),
            nn.Conv2d(3, 17, 3, padding=1), batch_norm(17, bias=False), nn.SiLU(), *head(153),
        ),
        (1, 7, 6),
    ),
    "strides": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 1, stride=2),
            nn.Tanh(), nn.Conv2d(2, 4, 1, padding=1), *head(4 * 4 * 3),
        ),
        (2, 7, 4),
    ),
    "a norm of one channel's pixels": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 1, 3), nn.Flatten(),
            nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3),
        ),
        (1, 4, 5),
    ),
    "activations around norm and pool": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.GroupNorm(2, 4), nn.MaxPool2d(2),
            nn.Sigmoid(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Tanh(), *head(4),
        ),
        (1, 5, 4),
    ),
    "norms of whole rows": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 4, 7)), nn.MaxPool2d(2), nn.GELU(),
            nn.AvgPool2d((1, 2), 1), nn.LayerNorm((2, 2), bias=False), *head(8),
        ),
        (1, 6, 9),
    ),
    "vectors": lambda: (
        nn.Sequential(
            nn.Linear(5, 18), nn.LayerNorm(18), nn.SiLU(), nn.Linear(18, 7),
            nn.BatchNorm1d(7, track_running_stats=False), nn.Tanh(), nn.Linear(7, 3),
        ),
        (5,),
    ),
    "norms first": lambda: (
        nn.Sequential(batch_norm(2), nn.LayerNorm((2, 3, 4)), nn.Conv2d(2, 2, 3), *head(4)),
        (2, 3, 4),
    ),
    "a convolution between linear layers": lambda: (
        nn.Sequential(
            nn.Linear(4, 3), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(3, 2),
            nn.LayerNorm((3, 2)), nn.Flatten(), nn.Linear(12, 3),
        ),
        (2, 3, 4),
    ),
    "frozen": lambda: (
        frozen(
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3, padding=1, bias=False),
                batch_norm(3), nn.GroupNorm(3, 3), nn.Tanh(), nn.Conv2d(3, 2, 1), *head(8),
            ),
            "0.weight", "0.bias", "2.weight", "3.weight", "4.weight", "4.bias", "6.weight",
        ),
        (1, 4, 4),
    ),
    "biases alone": lambda: (
        frozen(
            nn.Sequential(nn.Conv2d(1, 2, 3), batch_norm(2), nn.Conv2d(2, 2, 1), *head(4)),
            "0.weight", "1.weight", "2.weight", "4.weight",
        ),
        (1, 4, 3),
    ),
}  # fmt: skip


def check(case, **options):
    """Losses, and each gradient by name: at most twice the error of autograd or of torch's engine
    in float32, or BOUND. Returns the outcome.

    A bias that a norm takes away again has a gradient of 0, of which there is rounding only.
    """
    outcome = case.run(**options)
    loss, wanted = case.wanted()
    found_loss = outcome.task_losses.mean().cpu().double()
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    own = drive(PlannedStepper(case.problem, case.own_batch, case.plan, True), case.problem, True)
    single = copy.copy(case)
    single.model, single.batch = (
        copy.deepcopy(case.model).float(),
        TaskBatch(*(t.float() if t.is_floating_point() else t for t in case.batch[:4])),
    )
    plain = single.wanted()[1]
    found, own = case.found(outcome), case.found(own)
    assert set(found) == set(wanted)
    largest = max(tensor.norm().item() for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        size = tensor.norm().item()
        size = size if size > 1e-9 * largest else largest
        error, *of_torch = ((t[name] - tensor).norm().item() for t in (found, own, plain))
        assert error <= max(BOUND * size, *(2 * e for e in of_torch)), (name, error, of_torch, size)
    return outcome


def case_of(draw, kind, steps=2, rates=None, rows=5, **options):
    model, shape = KINDS[kind]()
    model = draw.initialise(model.double())
    batch = image_batch(draw, 2, rows, rows, shape, classes=3)
    rates = RATE if rates is None else rates(model)
    return Case(model, batch, "cross_entropy", rates, steps, ["factored"], **options)


@pytest.fixture
def large_tiles(monkeypatch):
    """One of all a task's pixels: less for the interpreter to do."""
    config = conv.Config(256, 16, 64, 4, 1)
    monkeypatch.setattr(conv, "default_config", lambda kind, geometry: config)
    cut = norm.Config(256, 16, 4)
    monkeypatch.setattr(norm, "default_config", lambda kernel, shape, by_group: cut)
    caches = conv.describe.cache_clear, norm.describe.cache_clear
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, draw):
    check(case_of(draw, kind))


def by_parameter(model):
    rising = itertools.count(1)
    return {
        name: nn.Parameter(torch.tensor([0.02 * next(rising), 0.1], dtype=torch.float64))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    ("kind", "first_order"),
    [("norms first", False), ("frozen", True)],
)
def test_rates_that_learn(kind, first_order, draw):
    check(case_of(draw, kind, 2, by_parameter, first_order=first_order))


@pytest.mark.usefixtures("large_tiles")
def test_first_order_differs_from_second(draw):
    second = case_of(draw, "biases alone")
    first = Case(second.model, second.batch, "cross_entropy", RATE, 2, ["factored"], True)
    first = first.found(check(first))
    for name, tensor in second.found(second.run()).items():
        assert (tensor - first[name]).norm() > 0.01 * tensor.norm(), name


def test_many_tiles_of_pixels(draw):
    """And the paper's network, whose tiles' statistics the norms take."""
    make, shape = NETWORKS["conv4, pooled"]
    model = draw.initialise(make().double())
    smooth = [nn.Softplus() if isinstance(m, nn.ReLU) else m for m in model]
    assert len(smooth) > 10
    batch = image_batch(draw, 1, 2, 2, shape, classes=3)
    check(Case(nn.Sequential(*smooth), batch, "cross_entropy", RATE, 1, ["dense"]))


def test_blocks(draw):
    """Norm, activation and pool are one; rows are turned where they must be, and nowhere else."""
    kinds = {
        "norm, activation and pool": "Conv Norm Conv Norm Turn Linear",
        "strides": "Conv Norm Conv Norm Conv Turn Linear",
        "norms of whole rows": "Conv Norm Norm Norm Torch Turn Norm Linear",
        "vectors": "Linear Norm Linear Norm Linear",
        "a convolution between linear layers": "Linear Turn Conv Turn Linear Norm Linear",
    }
    for kind, wanted in kinds.items():
        blocks = case_of(draw, kind).stepper().blocks
        found = " ".join(type(block).__name__.removesuffix("Block") for block in blocks)
        assert found == wanted, kind
    conv, norm, *_ = case_of(draw, "norm, activation and pool").stepper().blocks
    assert conv.follower is norm
    assert norm.pool
    assert norm.ops == (("tanh",),)


def test_adapted_models(draw):
    case = case_of(draw, "norms first")
    x, y, q, _ = case.own_batch[:4]
    adapted = adapt(case.stepper(gradient=False, batch=TaskBatch(x, y, x, y)), 2, x)
    maml = MAML(case.model, "cross_entropy", RATE, 2, backend="torch")
    wanted = maml.adapt(case.batch.support_x, case.batch.support_y)
    close = dict(rtol=1e-5, atol=1e-5)
    more = torch.cat((q, x), 1)  # another number of rows
    exact = torch.cat((case.batch.query_x, case.batch.support_x), 1)
    found = adapted.predict(more).cpu().double()
    torch.testing.assert_close(found, wanted(exact).detach(), **close)
    for name, tensor in wanted.parameters().items():
        torch.testing.assert_close(adapted.parameters()[name].cpu().double(), tensor, **close)


@pytest.mark.usefixtures("large_tiles")
def test_without_a_gradient_and_the_same_bits(draw):
    case = case_of(draw, "biases alone")
    with_gradient, again, outcome = case.run(), case.run(), case.run(gradient=False)
    assert outcome.gradients is None
    assert torch.equal(outcome.task_losses, with_gradient.task_losses)
    for name, tensor in with_gradient.gradients.items():
        assert torch.equal(again.gradients[name], tensor), name


def test_tensors_that_are_not_contiguous(draw):
    case = case_of(draw, "norms first")
    wanted = case.run()
    parameters = {}
    for name, p in case.problem.parameters.items():
        parameters[name] = p.mT.contiguous().mT if p.dim() > 1 else p.repeat_interleave(2)[::2]
    strided = [t.mT.contiguous().mT if t.dim() > 2 else t for t in case.own_batch[:4]]
    case.problem = dataclasses.replace(case.problem, parameters=parameters)
    found = case.run(batch=TaskBatch(*strided))
    for name, tensor in wanted.gradients.items():
        assert torch.equal(found.gradients[name], tensor), name


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("tf32", 1e-5, 3e-2), ("bf16", 1e-4, 0.2)]
)
def test_precisions(precision, least, most, draw):
    case = case_of(draw, "norms first", steps=1)
    found, wanted = case.found(case.run(precision=precision)), case.wanted()[1]
    errors = [(found[name] - t).norm().item() / t.norm().item() for name, t in wanted.items()]
    assert least <= max(errors) <= most


def test_relu_and_a_rate_that_learns_through_maml(draw):
    """The whole way, with a kink in activation and pool: the plan, its check of itself, results."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), batch_norm(2), nn.ReLU(), nn.MaxPool2d(2), *head(4)
    )
    model = draw.initialise(model.double())
    batch = image_batch(draw, 2, 3, 3, (1, 4, 3), classes=3)
    rate = nn.Parameter(torch.full((1,), RATE, dtype=torch.float64))
    by_name = {name: rate for name, _ in model.named_parameters()}
    loss, wanted = by_graph(model, batch, "cross_entropy", by_name, 1)
    single = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch[:4]))
    own_rate = nn.Parameter(rate.detach().float())
    maml = MAML(copy.deepcopy(model).float(), "cross_entropy", own_rate, backend="triton")
    out = maml(*single)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    found = {name: p.grad for name, p in maml.model.named_parameters()}
    found["rate of 0.weight"] = own_rate.grad
    for name, gradient in found.items():
        size = max(wanted[name].norm().item(), 1e-3)
        assert (gradient.double() - wanted[name]).norm().item() <= 5 * BOUND * size, name
    text = str(maml.plan(single.support_x, single.query_x))
    assert "layers kernels (layer '0' (conv 3x3 1->2) has no fused kernel)" in text
    assert "at most" in text
