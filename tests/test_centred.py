"""Data that a linear layer and a batch norm take first are handed over less their mean."""

import itertools

import pytest
import torch
from torch import nn

from maml_fast import MAML, check
from tests.image_networks import assert_near
from tests.networks import Draw, by_graph, gradients

BACKENDS = ("torch", "cpu")
FORMS = ("factored", "dense")
PIXELS, ROWS = (1, 28, 28), 5


def network(*behind, pixels=784):
    norm = nn.BatchNorm1d(32, eps=1e-3, track_running_stats=False)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 32), *(behind or (norm,)), nn.Tanh(), nn.Linear(32, 5)
    )


def images(draw, tasks=4, pixels=PIXELS):
    """Positive, as ink on paper is."""
    x, q = (0.9 + 0.05 * draw.normal(tasks, ROWS, *pixels).clamp(-2, 2) for _ in range(2))
    y = torch.arange(ROWS).expand(tasks, ROWS).contiguous()
    return x, y, q, y


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_float32_no_digits_are_lost(backend, form, steps):
    """Grams of such images are nearly all mean, which the norm takes away: without centring the
    error was up to 300 times autograd's."""
    draw = Draw(1, torch.float32)
    model = draw.initialise(network())
    maml = MAML(model, "cross_entropy", 0.4, steps, backend=backend, fast_weights=form)
    report = check(maml, *images(draw))
    assert report.passed, str(report)


@pytest.mark.parametrize(("backend", "form"), list(itertools.product(BACKENDS, FORMS)))
def test_nothing_else_changes(backend, form, draw):
    model = draw.initialise(network(pixels=12).double())
    x, y, q, _ = batch = images(draw, pixels=(3, 2, 2))
    maml = MAML(model, "cross_entropy", 0.4, 3, backend=backend, fast_weights=form)
    assert_near(gradients(maml, batch), by_graph(model, batch, "cross_entropy", 0.4, 3)[1], 1e-9)
    assert "less their mean" in str(maml.plan(x, q))
    reference = MAML(model, "cross_entropy", 0.4, 3, backend="reference").adapt(x, y)
    adapted = maml.adapt(x, y)
    torch.testing.assert_close(adapted(q), reference(q), rtol=1e-9, atol=1e-10)
    for name, wanted in reference.parameters().items():
        torch.testing.assert_close(adapted.parameters()[name], wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("behind", [(nn.Identity(),), (nn.LayerNorm(32),), (nn.Tanh(),)])
def test_only_before_a_batch_norm(behind, draw):
    model = draw.initialise(network(*behind, pixels=12).double())
    batch = images(draw, pixels=(3, 2, 2))
    maml = MAML(model, "cross_entropy", 0.4, backend="torch")
    assert "less their mean" not in str(maml.plan(batch[0], batch[2]))
    assert_near(gradients(maml, batch), by_graph(model, batch, "cross_entropy", 0.4, 1)[1], 1e-9)
