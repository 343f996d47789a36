"""Rows of weight 0, where zeros in their place would be no input for the model."""

import pytest
import torch
from torch import nn

from maml_fast import MAML
from maml_fast.problem import TaskBatch
from tests.family import CLASSES, everything
from tests.image_networks import assert_near
from tests.networks import Draw


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("backend", ["functional", "torch", "cpu"])
@pytest.mark.parametrize("images", [False, True], ids=["flat", "images"])
def test_norms_without_eps(backend, images):
    draw = Draw(60)
    layers = [nn.LayerNorm(4, eps=0.0), nn.Linear(4, 5, bias=False), nn.Tanh()]
    if images:
        layers = [nn.GroupNorm(1, 2, eps=0.0), nn.Conv2d(2, 1, 1), nn.Tanh(), nn.Flatten()]
    layers += [nn.Linear(5 if not images else 6, CLASSES)]
    model = draw.initialise(nn.Sequential(*layers).double())
    shape = (2, 2, 3) if images else (4,)
    x, q = draw.normal(3, 4, *shape), draw.normal(3, 5, *shape)
    y, yq = draw.normal(3, 4, CLASSES), draw.normal(3, 5, CLASSES)
    weights = [torch.ones(3, n, dtype=torch.float64) for n in (4, 5)]
    weights[0][1, 0], weights[0][2, 3], weights[1][0, 2] = 0, 0, 0
    x[1, 0], q[0, 2] = torch.nan, torch.inf
    batch = (x, y, q, yq, *weights)
    wanted, found = (
        everything(MAML(model, "mse", 0.1, 2, backend=name), TaskBatch(*batch))
        for name in ("reference", backend)
    )
    assert_near(found, {name: tensor.detach() for name, tensor in wanted.items()}, 1e-9)
