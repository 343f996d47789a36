"""Where there is a GPU: every backend there, against the plain loop on the CPU."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, check
from tests.networks import SMOOTH, Draw, assert_close, by_graph, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = (3, 17, 9, 4)
BACKENDS = [
    ("reference", "auto"),
    ("functional", "auto"),
    ("torch", "factored"),
    ("torch", "dense"),
    ("auto", "auto"),
]


def on_gpu(batch, dtype=torch.float64):
    return [t.to("cuda", dtype if t.is_floating_point() else t.dtype) for t in batch]


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS)
@pytest.mark.parametrize("activation", sorted(SMOOTH))
def test_meta_gradients(backend, fast_weights, activation):
    draw = Draw(0)
    model = draw.mlp(SIZES, SMOOTH[activation])
    batch = draw.batch("cross_entropy", 7, 5, 6, SIZES)
    wanted = by_graph(model, batch, "cross_entropy", 0.2, 3)[1]
    options = dict(backend=backend, fast_weights=fast_weights, inner_lr=0.2, inner_steps=3)
    maml = MAML(model.to("cuda"), "cross_entropy", **options)
    found = {name: g.cpu() for name, g in gradients(maml, on_gpu(batch)).items()}
    assert_close(found, wanted, 1e-10)


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS[1:])
def test_float32_error_and_same_bits(backend, fast_weights):
    draw = Draw(1)
    model = draw.mlp((20, 100, 100, 4)).to("cuda", torch.float32)
    batch = on_gpu(draw.batch("mse", 40, 20, 20, (20, 4)), torch.float32)
    maml = MAML(model, inner_lr=0.05, backend=backend, fast_weights=fast_weights)
    report = check(maml, *batch)
    assert report.passed, str(report)
    first = {name: g.clone() for name, g in gradients(maml, batch).items()}
    assert all(torch.equal(g, first[name]) for name, g in gradients(maml, batch).items())


def test_learned_rates():
    draw = Draw(2)
    model, batch = draw.mlp(SIZES), draw.batch("mse", 4, 5, 5, SIZES)
    rate = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64))
    by_name = {name: rate for name, _ in model.named_parameters()}
    wanted = by_graph(model, batch, "mse", by_name, 2)[1]["rate of 0.weight"]
    maml = MAML(model, inner_lr=rate, inner_steps=2).to("cuda")
    gradients(maml, on_gpu(batch))
    torch.testing.assert_close(maml.inner_lr.grad.cpu(), wanted, rtol=1e-10, atol=0)


def test_bad_input():
    draw = Draw(3)
    model, batch = draw.mlp(SIZES).to("cuda"), draw.batch("cross_entropy", 4, 5, 5, SIZES)
    maml = MAML(model, "cross_entropy")
    with pytest.raises(ValueError, match="support_x is on cpu; the model is on cuda"):
        maml(*batch)
    support_x, support_y, query_x, query_y = on_gpu(batch)
    with pytest.raises(ValueError, match="query_y.*wanted is 0 to 3"):
        maml(support_x, support_y, query_x, query_y + 2)
    with pytest.raises(NonFiniteError, match="4 of 4 tasks"):
        maml(support_x * torch.nan, support_y, query_x, query_y)
