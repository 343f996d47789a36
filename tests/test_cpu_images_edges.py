"""Shapes and data at the edges of what the C++ engine for images takes."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, UnsupportedModelError
from maml_fast.problem import TaskBatch
from tests.image_networks import assert_near
from tests.networks import Draw, by_graph, gradients

pytestmark = pytest.mark.usefixtures("extension")


def batch_of(draw, *shape, rows=4, queries=3, dtype=torch.float64):
    x, q = draw.normal(2, rows, *shape), draw.normal(2, queries, *shape)
    y, yq = draw.classes(2, rows, classes=3), draw.classes(2, queries, classes=3)
    return TaskBatch(x.to(dtype), y, q.to(dtype), yq)


def found_by(backend, model, batch):
    return gradients(MAML(model, "cross_entropy", 0.1, 2, backend=backend), batch)


def batch_norm(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


SHORT = {
    "one number of a row of many": (
        [nn.Conv2d(2, 9, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.LayerNorm([1, 1])],
        (2, 5, 4),
        9,
    ),
    "a last axis of one": ([nn.LayerNorm(1)], (12, 1), 12),
    "a last axis of three": ([nn.LayerNorm(3), nn.Tanh()], (4, 3), 12),
}


@pytest.mark.parametrize("case", SHORT)
def test_layer_norm_of_fewer_numbers_than_channels(case):
    layers, shape, features = SHORT[case]
    draw = Draw(0)
    model = draw.initialise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3)).double())
    batch = batch_of(draw, *shape)
    plan = MAML(model, "cross_entropy", 0.1, 2, backend="cpu").plan(batch[0], batch[2])
    assert plan.cpu.layout == "channels_in_lanes"
    wanted = by_graph(model, batch, "cross_entropy", 0.1, 2)[1]
    assert_near(found_by("cpu", model, batch), wanted, 1e-9)


@pytest.mark.parametrize(("shape", "taken"), [((4, 5), False), ((5,), True), ((3, 4, 5), True)])
def test_layer_norm_of_some_axes_of_four(shape, taken):
    draw = Draw(1)
    layers = [nn.LayerNorm(shape), nn.Flatten(), nn.Linear(120, 3)]
    model = draw.initialise(nn.Sequential(*layers).double())
    batch = batch_of(draw, 2, 3, 4, 5)
    if not taken:
        with pytest.raises(UnsupportedModelError, match=r"layer '0' .layer norm 4x5.*norms of"):
            found_by("cpu", model, batch)
    wanted = by_graph(model, batch, "cross_entropy", 0.1, 2)[1]
    assert_near(found_by("cpu" if taken else "auto", model, batch), wanted, 1e-9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_pixels_that_no_patch_sees(kernel):
    """Whatever they are, NaN as well, the first block does not look at them."""
    draw = Draw(2)
    model = nn.Sequential(
        nn.Conv2d(1, 5, kernel, stride=2), batch_norm(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    )
    model = draw.initialise(model)
    batch = batch_of(draw, 1, 8 - 2 * (kernel == 1), 8 - 2 * (kernel == 1), dtype=torch.float32)
    wanted = found_by("cpu", model, batch)
    for x in (batch.support_x, batch.query_x):
        x[..., -1] = x[..., -1, :] = torch.nan
        if kernel == 1:
            x[..., 1::2, :] = x[..., 1::2] = torch.nan
    found = found_by("cpu", model, batch)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_norms_of_numbers_far_from_zero():
    """In float32 no further from float64 than twice autograd, over all tensors of five draws."""
    ratios = []
    for seed in range(5):
        draw = Draw(seed)
        model = nn.Sequential(
            nn.GroupNorm(1, 1), nn.Conv2d(1, 4, 3), batch_norm(4), nn.Tanh(), nn.Flatten(),
            nn.Linear(96, 3),
        )  # fmt: skip
        model = draw.initialise(model.double())
        batch = batch_of(draw, 1, 8, 6)
        for x in (batch.support_x, batch.query_x):
            x += 300
        exact = by_graph(model, batch, "cross_entropy", 0.1, 2)[1]
        single = model.float()
        rounded = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch[:4]))
        ours, torchs = (found_by(name, single, rounded) for name in ("cpu", "reference"))
        for name, tensor in exact.items():
            errors = [(found[name].double() - tensor).norm() for found in (ours, torchs)]
            ratios.append((errors[0] / errors[1]).item())
    assert sum(ratios) / len(ratios) < 2, ratios
