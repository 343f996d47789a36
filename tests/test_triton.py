"""Backend "triton", through `MAML`: whole meta-steps against the loop, tensor by tensor.

Without a GPU the kernels run in Triton's interpreter, on the CPU; sizes are small, but cross every
edge: odd widths, widths of 1, rows that do not fill a tile, several tiles, several tasks a program.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maml_fast import MAML
from maml_fast.problem import TaskBatch
from tests.networks import ORACLES, SMOOTH, by_graph, gradients
from tests.triton_steps import (
    DEVICE,
    FORMS,
    assert_exact,
    errors,
    in_float32,
    kernels,
    on_device,
)

__all__ = ["kernels"]  # a fixture


@pytest.mark.parametrize(
    ("loss", "steps"), [*((loss, 1) for loss in ORACLES), ("mse", 0), ("cross_entropy", 3)]
)
def test_losses_and_steps(kernels, loss, steps, draw):
    sizes = (3, 17, 9, 4)
    model, batch = draw.mlp(sizes), draw.batch(loss, 4, 5, 7, sizes)
    maml = MAML(in_float32(model), loss, 0.2, steps, backend="triton", fast_weights=FORMS[kernels])
    plan = maml.plan(*on_device(batch)[:4:2])
    assert plan.triton.kernels == kernels
    assert_exact(maml, model, batch, 0.2, steps)


@pytest.mark.parametrize(
    "sizes", [(1, 7, 1), (1, 40, 40, 1), (5, 1, 6, 2), (2, 3), (33, 70, 17, 40), (16, 128, 5)]
)
def test_widths(kernels, sizes, draw):
    model, batch = draw.mlp(sizes), draw.batch("mse", 2, 3, 2, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    assert_exact(MAML(in_float32(model), "mse", 0.1, 2, **options), model, batch, 0.1, 2)


@pytest.mark.parametrize(("rows", "query_rows"), [(1, 1), (16, 17), (33, 15), (70, 66)])
def test_rows(kernels, rows, query_rows, draw):
    sizes = (3, 9, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 1, rows, query_rows, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    assert_exact(MAML(in_float32(model), "mse", 0.1, 1, **options), model, batch, 0.1, 1)


@pytest.mark.parametrize("activation", sorted(SMOOTH))
def test_activations(kernels, activation, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes, SMOOTH[activation]), draw.batch("mse", 2, 4, 3, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    assert_exact(MAML(in_float32(model), "mse", 0.2, 2, **options), model, batch, 0.2, 2)


class Siren(nn.Module):
    """Chains of operations behind a layer, one at the end, reshapes between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.sin(3.0 * self.a(torch.tanh(x.flatten(1))))
        x = F.leaky_relu(self.b(x.view(-1, 2, 4).flatten(1)), 0.3)
        return torch.sigmoid(0.5 * self.c(x)).view(-1, 3, 1)


def test_chains_of_operations(kernels, draw):
    model = draw.initialise(Siren().double())
    x, q = draw.normal(3, 4, 2, 3), draw.normal(3, 5, 2, 3)
    batch = TaskBatch(x, draw.normal(3, 4, 3, 1), q, draw.normal(3, 5, 3, 1))
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.3, 2, **options)
    assert maml(*on_device(batch)).query_outputs.shape == (3, 5, 3, 1)
    assert_exact(maml, model, batch, 0.3, 2)


@pytest.mark.parametrize(
    "frozen",
    [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
        ["2.bias"],
        ["0.weight", "4.weight"],
        ["4.bias"],
    ],
    ids="-".join,
)
def test_frozen_parameters(kernels, frozen, draw):
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 3, sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, 2, **options)
    assert_exact(maml, model, batch, 0.2, 2)
    assert all(p.grad is None for n, p in maml.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rates_of_each_parameter_and_step(kernels, first_order, draw):
    sizes, steps = (3, 6, 2), 2
    model, batch = draw.mlp(sizes), draw.batch("mse", 5, 4, 3, sizes)
    names = [name for name, _ in model.named_parameters()]
    rates = {n: nn.Parameter((0.1 + 0.05 * draw.normal(steps)).abs()) for n in names}
    _, wanted = by_graph(model, batch, "mse", rates, steps, first_order)
    single = {n: nn.Parameter(r.detach().to(DEVICE, torch.float32)) for n, r in rates.items()}
    options = dict(backend="triton", fast_weights=FORMS[kernels], first_order=first_order)
    maml = MAML(in_float32(model), "mse", single, steps, **options)
    found = gradients(maml, on_device(batch))
    found |= {f"rate of {n}": single[n].grad for n in names}
    assert all(error < 2e-6 for error in errors(found, wanted).values()), errors(found, wanted)


@pytest.mark.parametrize("steps", [1, 2])
def test_first_order(kernels, steps, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 3, sizes)
    options = dict(backend="triton", fast_weights=FORMS[kernels], first_order=True)
    maml = MAML(in_float32(model), "mse", 0.3, steps, **options)
    assert_exact(maml, model, batch, 0.3, steps, first_order=True)
    second = by_graph(model, batch, "mse", 0.3, steps)[1]
    assert min(errors(gradients(maml, on_device(batch)), second).values()) > 1e-2


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_models(kernels, steps, draw):
    sizes = (3, 6, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 5, sizes)
    wanted = MAML(model, "mse", 0.2, backend="reference").adapt(*batch[:2], inner_steps=steps)
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.2, **options)
    found = maml.adapt(*on_device(batch)[:2], inner_steps=steps)
    for mine, theirs in (
        (found(on_device(batch).query_x), wanted(batch.query_x)),
        (found.support_losses, wanted.support_losses),
        *((found.parameters()[n], p) for n, p in wanted.parameters().items()),
    ):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("setting", "bound"), [("high", 2e-2), ("medium", 1e-1)])
def test_precisions_follow_torch(kernels, setting, bound, draw):
    sizes = (8, 40, 40, 3)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 5, 5, sizes)
    wanted = by_graph(model, batch, "mse", 0.1, 1)[1]
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    maml = MAML(in_float32(model), "mse", 0.1, 1, **options)
    exact = max(errors(gradients(maml, on_device(batch)), wanted).values())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        found = max(errors(gradients(maml, on_device(batch)), wanted).values())
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact < 2e-6 < 1e-5 < found < bound
    assert max(errors(gradients(maml, on_device(batch)), wanted).values()) == exact


def test_kinks_as_torch_has_them(kernels, draw):
    """Layers of zeros put every pre-activation on the kink; data far from it do not."""
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes, nn.ReLU), draw.batch("mse", 3, 4, 5, sizes)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    wanted = by_graph(model, batch, "mse", 0.2, 0)[1]
    options = dict(backend="triton", fast_weights=FORMS[kernels])
    found = gradients(MAML(in_float32(model), "mse", 0.2, 0, **options), on_device(batch))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].cpu().double(), tensor, rtol=1e-5, atol=1e-7)
