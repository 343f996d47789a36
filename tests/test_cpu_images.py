"""Networks of images in the C++ backend, on every instruction set, against a plain loop.

Its layers one by one: kernel, stride and padding, each norm with and without its parameters, pools
and rearrangements; then what a meta-step can be asked for.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from maml_fast import MAML, check
from maml_fast.models import miniimagenet_conv4, omniglot_conv4
from maml_fast.problem import TaskBatch
from tests.image_networks import NETWORKS, assert_near, nudged, random_network
from tests.networks import Draw, assert_close, by_graph, gradients

pytestmark = pytest.mark.usefixtures("extension")
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def batch_norm(channels, **options):
    return nn.BatchNorm2d(channels, track_running_stats=False, **options)


def without_weight(norm):
    norm.register_parameter("weight", None)
    return norm


def conv(*args, bias=False, **options):
    return nn.Conv2d(*args, bias=bias, **options)


def batch_for(draw, model, shape, loss="cross_entropy", tasks=2, rows=4, queries=3):
    """Data for a model: rows of a shape, and targets of its output's."""
    x, q = draw.normal(tasks, rows, *shape), draw.normal(tasks, queries, *shape)
    with torch.no_grad():
        features = model(x[0]).shape[1:]

    def target(count):
        if len(features) == 1:
            return draw.target(loss, tasks, count, features=features[0])
        return draw.normal(tasks, count, *features)

    return TaskBatch(x, target(rows), q, target(queries))


def build(draw, layers):
    model = draw.initialise(nn.Sequential(*layers).double())
    with torch.no_grad():
        for module in model:
            if isinstance(module, NORMS) and module.weight is not None:
                module.weight.add_(1)  # gammas about 1, and of either sign
    return model


def with_gammas(model):
    """The same network, with a frozen gamma of 1 wherever a norm has none: torch cannot
    differentiate twice without."""
    model = copy.deepcopy(model)
    for module in model:
        if (
            isinstance(module, NORMS)
            and module.weight is None
            and not hasattr(module, "normalized_shape")
        ):
            ones = torch.ones(getattr(module, "num_features", 0) or module.num_channels).double()
            module.weight = nn.Parameter(ones, requires_grad=False)
    return model


def assert_equals_loop(
    model, batch, loss="cross_entropy", rate=0.1, steps=2, first_order=False, nudge=None
):
    maml = MAML(model, loss, rate, steps, first_order=first_order, backend="cpu")
    plan = maml.plan(batch.support_x, batch.query_x)
    assert plan.cpu.layout == "channels_in_lanes"
    how = (loss, rate, steps, first_order)
    value, wanted = by_graph(with_gammas(model), batch, *how)
    torch.testing.assert_close(maml(*batch).loss.detach(), value, rtol=1e-11, atol=0)
    moved = None if nudge is None else by_graph(*nudged(nudge, with_gammas(model), batch), *how)[1]
    assert_near(gradients(maml, batch), wanted, 1e-9, moved)


LAYERS = {
    "3x3": lambda: [conv(3, 5, 3), nn.Tanh()],
    "3x3 padded": lambda: [conv(3, 5, 3, padding=1, bias=True), nn.Tanh()],
    "3x3 stride 2": lambda: [conv(2, 17, 3, stride=2, bias=True), nn.SiLU()],
    "3x3 stride 2 padded": lambda: [conv(1, 2, 3, stride=2, padding=1), nn.Softplus()],
    "1x1": lambda: [conv(3, 1, 1, bias=True), nn.Sigmoid()],
    "1x1 padded": lambda: [conv(3, 4, 1, padding=1), nn.GELU()],
    "1x1 stride 2": lambda: [conv(2, 6, 1, stride=2), nn.GELU("tanh")],
    "1x1 stride 2 padded": lambda: [conv(2, 3, 1, stride=2, padding=1), nn.Tanh()],
    "batch norm": lambda: [conv(2, 5, 3), batch_norm(5)],
    "batch norm, no gamma": lambda: [conv(2, 16, 3, bias=True), without_weight(batch_norm(16))],
    "batch norm, no parameters": lambda: [conv(2, 3, 3), batch_norm(3, affine=False), nn.Tanh()],
    "batch norm, ReLU": lambda: [conv(1, 17, 3), batch_norm(17), nn.ReLU()],
    "batch norm, leaky ReLU": lambda: [conv(2, 3, 3), batch_norm(3), nn.LeakyReLU(0.2)],
    "batch norm, ReLU, pool": lambda: [conv(2, 5, 3), batch_norm(5), nn.ReLU(), nn.MaxPool2d(2)],
    "batch norm, leaky ReLU, pool": lambda: [
        conv(2, 9, 3, padding=1), batch_norm(9), nn.LeakyReLU(-0.3), nn.MaxPool2d(2),
    ],
    "batch norm, pool": lambda: [conv(2, 3, 3), without_weight(batch_norm(3)), nn.MaxPool2d(2)],
    "batch norm of data": lambda: [batch_norm(2), conv(2, 3, 3), nn.Tanh()],
    "group norm": lambda: [conv(2, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.MaxPool2d(2)],
    "group norm, one group": lambda: [conv(2, 5, 3), nn.GroupNorm(1, 5), nn.Tanh()],
    "group norm, no parameters": lambda: [conv(2, 4, 3), nn.GroupNorm(2, 4, affine=False)],
    "instance norm": lambda: [conv(2, 3, 3), nn.GroupNorm(3, 3), nn.Softplus()],
    "layer norm": lambda: [conv(2, 5, 3), nn.LayerNorm([5, 5, 4]), nn.ReLU()],
    "layer norm, no beta": lambda: [conv(2, 3, 3), nn.LayerNorm([3, 5, 4], bias=False)],
    "layer norm, no parameters": lambda: [
        conv(2, 3, 3), nn.LayerNorm([5, 4], elementwise_affine=False), nn.Tanh(),
    ],
    "layer norm of positions": lambda: [conv(2, 3, 3), nn.LayerNorm([5, 4]), nn.MaxPool2d(2)],
    "layer norm of lines": lambda: [conv(2, 17, 3), nn.LayerNorm(4), nn.ReLU()],
    "layer norm of data": lambda: [nn.LayerNorm([2, 7, 6]), conv(2, 3, 3), nn.Tanh()],
    "max pool": lambda: [conv(2, 5, 3), nn.Tanh(), nn.MaxPool2d(2), conv(5, 3, 1)],
    "ReLU and max pool": lambda: [conv(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "average pool": lambda: [conv(2, 5, 3), nn.Tanh(), nn.AvgPool2d(2)],
    "average pool that overlaps": lambda: [conv(2, 17, 3), nn.Tanh(), nn.AvgPool2d((3, 2), (1, 2))],
    "global mean": lambda: [conv(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)],
    "activations": lambda: [
        conv(2, 3, 3), nn.ReLU(), nn.ReLU(), nn.Tanh(), nn.ReLU(), nn.Softplus(), nn.LeakyReLU(0.1),
    ],
    "linear on positions": lambda: [conv(2, 3, 3), nn.Tanh(), nn.Linear(4, 6), nn.Tanh()],
    "two convolutions": lambda: [conv(2, 16, 3, padding=1), conv(16, 3, 3, padding=1, bias=True)],
    "wide": lambda: [conv(2, 33, 3, padding=1), nn.Tanh(), conv(33, 65, 3, padding=1), nn.Tanh()],
}  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS)
def test_each_layer(instructions, layers):
    draw = Draw(5)
    body = LAYERS[layers]()
    channels = getattr(body[0], "in_channels", 2)
    x = draw.normal(1, channels, 7, 6)
    features = nn.Sequential(*body).double()(x).flatten(1).shape[1]
    model = build(draw, [*body, nn.Flatten(), nn.Linear(features, 3)])
    assert_equals_loop(model, batch_for(draw, model, (channels, 7, 6)))


def blocks(count, channels, norm=batch_norm, **options):
    sizes = [1, *[channels] * count]
    return [
        layer
        for i, o in itertools.pairwise(sizes)
        for layer in (conv(i, o, 3, padding=1, **options), norm(o), nn.ReLU())
    ]


@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (3, False), (3, True)])
@pytest.mark.parametrize("form", ["pooled", "strided"])
def test_conv4(instructions, form, steps, first_order):
    draw = Draw(1)
    model = omniglot_conv4(3, 5, pooling=form == "pooled", scale=True, dtype=torch.float64)
    batch = batch_for(draw, model, (1, 28, 28), tasks=1, rows=3)
    assert_equals_loop(model, batch, steps=steps, first_order=first_order)


@pytest.mark.parametrize(("rows", "queries"), [(150, 40), (40, 500)])
def test_steps_computed_again(instructions, rows, queries):
    draw = Draw(12)
    model = build(
        draw,
        [
            *(conv(1, 7, 3, padding=1), batch_norm(7), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(7, 9, 3, padding=1, bias=True), nn.LeakyReLU(), nn.MaxPool2d(2)),
            *(conv(9, 5, 3, padding=1), batch_norm(5), nn.SiLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(5, 3)),
        ],
    )
    batch = batch_for(draw, model, (1, 11, 9), rows=rows, queries=queries)
    plan = MAML(model, "cross_entropy", 0.1, 3, backend="cpu").plan(batch[0], batch[2])
    assert plan.cpu.replays
    assert "inner steps computed again in the adjoint" in str(plan)
    assert_equals_loop(model, batch, steps=3)
    assert_equals_loop(model, batch, steps=3, first_order=True)


def test_many_steps(instructions):
    draw = Draw(2)
    model = miniimagenet_conv4(3, 4, image_size=19, dtype=torch.float64)
    assert_equals_loop(model, batch_for(draw, model, (3, 19, 19), tasks=1, rows=3), steps=5)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_backends_share(name, draw):
    make, shape = NETWORKS[name]
    model = draw.initialise(make().double())
    batch = batch_for(draw, model, shape, rows=4, queries=5)
    maml = MAML(model, "cross_entropy", 0.1, 3, backend="cpu")
    wanted = by_graph(model, batch, "cross_entropy", 0.1, 3)[1]
    assert_near(gradients(maml, batch), wanted, 1e-9)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**20), layers=st.integers(1, 8), steps=st.sampled_from([1, 3, 5]))
def test_random_networks(seed, layers, steps):
    draw = Draw(seed)
    model, shape = random_network(seed, layers)
    model = draw.initialise(model.double())
    batch = batch_for(draw, model, shape)
    assert_equals_loop(model, batch, steps=steps, nudge=draw)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_depth(instructions, count):
    draw = Draw(3)
    model = build(draw, [*blocks(count, 3), nn.Flatten(), nn.Linear(3 * 4 * 5, 3)])
    batch = batch_for(draw, model, (1, 4, 5))
    assert_equals_loop(model, batch, rate=0.05, steps=1)


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 17, 64])
def test_channels(instructions, channels):
    draw = Draw(4)
    model = build(draw, [*blocks(2, channels), nn.Flatten(), nn.Linear(channels * 20, 3)])
    assert_equals_loop(model, batch_for(draw, model, (1, 5, 4), tasks=1), rate=0.05)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits", "huber"])
def test_losses(instructions, loss):
    draw = Draw(6)
    model = build(draw, [conv(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 20, 4)])
    batch = batch_for(draw, model, (2, 7, 6), loss, rows=18, queries=1)
    assert_equals_loop(model, batch, loss)


def test_images_out(instructions):
    draw = Draw(7)
    model = build(draw, [conv(2, 5, 3, padding=1), nn.Tanh(), conv(5, 3, 3, padding=1, bias=True)])
    assert_equals_loop(model, batch_for(draw, model, (2, 5, 4), "mse"), "mse")


FROZEN = {
    "the first layers": ["0", "1"],
    "the first norm": ["1"],
    "a layer between": ["3"],
    "a norm's gamma": ["1.weight", "4.weight"],
    "a norm's beta": ["1.bias"],
    "weights": ["0.weight", "3.weight"],
    "a bias": ["3.bias", "0.bias"],
    "all but the last": ["0", "1", "3", "4"],
    "all": ["0", "1", "3", "4", "7"],
}


def partly_frozen(draw, frozen):
    model = build(
        draw,
        [
            *(conv(2, 5, 3, bias=True), batch_norm(5), nn.Tanh()),
            *(conv(5, 6, 3, bias=True), nn.GroupNorm(2, 6), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6 * 3 * 2, 3)),
        ],
    )
    for name, parameter in model.named_parameters():
        parts = FROZEN[frozen]
        parameter.requires_grad_(not (name in parts or name.split(".")[0] in parts))
    return model


# The last two: so many that the adjoint computes inner steps again rather than keep them.
@pytest.mark.parametrize(
    ("first_order", "rows", "queries"),
    [(False, 4, 3), (True, 4, 3), (True, 3, 7), (False, 500, 3), (False, 4, 1500)],
)
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_and_learned_rates(instructions, frozen, first_order, rows, queries):
    draw = Draw(8)
    model = partly_frozen(draw, frozen)
    adapting = [name for name, p in model.named_parameters() if p.requires_grad]
    batch = batch_for(draw, model, (2, 7, 6), rows=rows, queries=queries)
    double = dict(dtype=torch.float64)
    rates = {
        name: nn.Parameter(torch.tensor([0.1, 0.2, 0.05], **double)) if i % 2 == 0 else 0.15
        for i, name in enumerate(adapting)
    }
    maml = MAML(model, "cross_entropy", rates, 3, first_order=first_order, backend="cpu")
    if not adapting:
        wanted = MAML(model, "cross_entropy", 0.1, 3, backend="reference")(*batch)
        torch.testing.assert_close(maml(*batch).query_outputs, wanted.query_outputs)
        return
    if frozen == "a bias":
        assert maml.plan(batch.support_x, batch.query_x).cpu.replays == (rows + queries > 400)
    wanted = by_graph(model, batch, "cross_entropy", rates, 3, first_order)[1]
    found = gradients(maml, batch)
    learned = {f"rate of {n}": r.grad for n, r in rates.items() if isinstance(r, nn.Parameter)}
    assert_near(found | learned, wanted, 1e-9)


@pytest.mark.parametrize("steps", [0, 3])
def test_adapted_models(instructions, steps):
    draw = Draw(9)
    model = build(
        draw,
        [
            *(conv(2, 5, 3, bias=True), batch_norm(5), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(5, 3, 1), nn.LayerNorm([3, 2, 2]), nn.LayerNorm(2), nn.Flatten()),
            nn.Linear(12, 3),
        ],
    )
    model[4].weight.requires_grad_(False)
    batch = batch_for(draw, model, (2, 7, 6))
    options = dict(loss="cross_entropy", inner_lr=0.1, inner_steps=steps)
    wanted = MAML(model, backend="reference", **options).adapt(*batch[:2])
    adapted = MAML(model, backend="cpu", **options).adapt(*batch[:2])
    found = {"outputs": adapted(batch.query_x)} | adapted.parameters()
    assert_close(found, {"outputs": wanted(batch.query_x)} | wanted.parameters(), 1e-10)
    torch.testing.assert_close(adapted.support_losses, wanted.support_losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_float32_is_as_exact_as_autograd(instructions, pooling, steps):
    """Over tensors and networks: of a single tensor either may be exact by luck, where a norm over
    few numbers multiplies what rounding leaves."""
    ratios = []
    for seed in range(4):
        draw = Draw(seed, torch.float32)
        model = omniglot_conv4(4, 16, pooling=pooling, scale=True, image_size=16, seed=seed)
        smooth = nn.Sequential(*(nn.Softplus() if isinstance(m, nn.ReLU) else m for m in model))
        for module in smooth:
            if isinstance(module, nn.Conv2d):  # the norm takes it away: a gradient of rounding
                module.bias = None
        batch = batch_for(draw, smooth, (1, 16, 16), tasks=4, rows=5, queries=6)
        report = check(MAML(smooth, "cross_entropy", 0.05, steps, backend="cpu"), *batch)
        assert all(t.error < 1e-4 for t in report.tensors), str(report)
        ratios += [t.error / t.autograd for t in report.tensors if "gradient" in t.name]
    mean = torch.tensor(ratios).log().mean().exp().item()
    assert mean < 1.5


def test_equal_numbers_in_a_window_and_nan(instructions):
    """The first maximum counts, as in torch; a NaN is the largest, and reaches the loss."""
    draw = Draw(11)
    model = build(draw, [conv(1, 1, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)])
    batch = batch_for(draw, model, (1, 4, 4))
    batch = batch._replace(support_x=batch.support_x.sign(), query_x=torch.ones_like(batch.query_x))
    assert_equals_loop(model, batch)
    batch.query_x[0, 0, 0, 1, 1] = torch.nan
    outputs = MAML(model, "cross_entropy", 0.1, backend="cpu").adapt(*batch[:2])(batch.query_x)
    assert outputs[0, 0].isnan().all()
    assert not outputs[1:].isnan().any()


def test_the_same_bits_on_any_number_of_threads(threads):
    draw = Draw(12, torch.float32)
    model = omniglot_conv4(3, 5, pooling=True, scale=True)
    batch = batch_for(draw, model, (1, 28, 28), tasks=11, rows=3)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(gradients(MAML(model, "cross_entropy", 0.1, 2, backend="cpu"), batch))
    for name, tensor in found[0].items():
        assert all(torch.equal(tensor, other[name]) for other in found[1:]), name


def test_rows_apart_in_memory(draw):
    """Views of a larger tensor are read where they are."""
    model = build(draw, [conv(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 20, 3)])
    whole = draw.normal(2, 9, 3, 7, 6)
    x, q = whole[:, 1:8:2, 1:], whole[:, ::4, :2]
    batch = TaskBatch(x, draw.classes(2, 4, classes=3), q, draw.classes(2, 3, classes=3))
    assert not x.is_contiguous()
    assert_equals_loop(model, batch)
