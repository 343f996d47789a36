"""`maml_fast.profile`: its parts are the plan's layers and add up; results have the same bits."""

import json

import pytest
import torch
from torch import nn

from maml_fast import MAML, inner, profile
from maml_fast.live_memory import LiveMemory
from maml_fast.profile import recording
from maml_fast.progress import cpu_threads
from maml_fast.recorder import PASSES
from tests.image_networks import NETWORKS
from tests.networks import Draw

BACKENDS = ["cpu", "torch", "functional", "reference"]
pytestmark = pytest.mark.usefixtures("extension")


def flat(**options):
    """A network of flat rows, and data."""
    draw = Draw(3)
    sizes = (6, 20, 9, 3)
    return MAML(draw.mlp(sizes, nn.ReLU), "mse", 0.1, 2, **options), draw.batch(
        "mse", 5, 4, 6, sizes
    )


def images(name="conv4, pooled", tasks=3, rows=4, queries=5, **options):
    """A network of images, and data."""
    make, shape = NETWORKS[name]
    draw = Draw(5)
    model = make().double()
    x, q = draw.normal(tasks, rows, *shape), draw.normal(tasks, queries, *shape)
    y, yq = draw.classes(tasks, rows, classes=3), draw.classes(tasks, queries, classes=3)
    return MAML(model, "cross_entropy", 0.1, 2, **options), (x, y, q, yq)


def normed():
    """Norms of flat rows, an activation that is no ReLU, and what learns but does not adapt."""
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.LayerNorm(7), nn.ReLU()),
        nn.Linear(7, 3),
    ).double()
    draw = Draw(8)
    x, q = draw.normal(4, 5, 2, 3), draw.normal(4, 6, 2, 3)
    maml = MAML(draw.initialise(model), "mse", 0.1, 2, inner_params=["3.*", "4.*", "6.*"])
    return maml, (x, draw.normal(4, 5, 3), q, draw.normal(4, 6, 3))


def forms(**options):
    return lambda: flat(backend="cpu", **options)


# Of backend "cpu"
KINDS = {
    "factored": forms(fast_weights="factored"),
    "dense": forms(fast_weights="dense"),
    "first order": forms(first_order=True),
    "several losses": forms(step_weights=[0.2, 0.3, 0.5]),
    "momentum": forms(inner_optimizer=inner.SGD(momentum=0.9)),
    "learned rate": lambda: (
        MAML(flat()[0].model, "mse", nn.Parameter(torch.tensor(0.1).double()), 2, backend="cpu"),
        flat()[1],
    ),
    "what learns and does not adapt": normed,
    **{
        name: lambda name=name: images(name, backend="cpu")
        for name in ("conv4, pooled", "conv4", "layer norm", "group norm", "no norm")
    },
    "frozen below": lambda: images("frozen below", backend="cpu"),
}


def plan_of(maml, data):
    return maml.plan(data[0], data[2])


def gradients(maml, data):
    result = maml(*data)
    return [result.loss, *torch.autograd.grad(result.loss, maml.inputs()), result.query_outputs]


def told(found):
    return sum(part.total for part in (*found.layers, *found.parts))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_engine_are_the_plans_and_add_up(kind):
    maml, data = KINDS[kind]()
    found = profile(maml, *data, repeats=2)
    plan = plan_of(maml, data)
    layers = [*plan.body, *plan.layers]
    assert found.backend == plan.backend == "cpu"
    names = [name for layer in found.layers for name in layer.layers]
    assert names == [layer.link.name for layer in layers]
    operations = [name for layer in found.layers for name in layer.operations]
    assert operations == [str(layer.link.op) for layer in layers]
    assert sum(layer.flops for layer in found.layers) == (0 if plan.loops else plan.flops)
    assert 0 < told(found) <= found.total_ms * (1 + 1e-6)
    assert found.rest_ms + told(found) == pytest.approx(found.total_ms)
    assert all(ms >= 0 for layer in found.layers for ms in layer.milliseconds)
    weighted = [layer for layer in found.layers if layer.flops]
    passes = PASSES if maml.meta_gradient is None and not maml.first_order else PASSES[:2]
    for i, name in enumerate(passes):
        assert sum(layer.milliseconds[i] for layer in weighted) > 0 or plan.loops, name
    held = sum((layer.own_bytes or 0) + (layer.value_bytes or 0) for layer in found.layers)
    held += sum(part.bytes or 0 for part in found.parts)
    assert held == found.arena_bytes
    if not maml.rates.learning():  # which keep more than the plan was made for
        assert found.arena_bytes == plan.cpu.arena_bytes
    assert found.peak_bytes > found.threads * found.arena_bytes


def test_threads_share_the_time_that_passes():
    draw = Draw(4)
    sizes = (6, 30, 30, 3)
    maml = MAML(draw.mlp(sizes), "mse", 0.1, 2, backend="cpu")
    data = draw.batch("mse", 90, 5, 7, sizes)[:4]
    with cpu_threads(2):
        found = profile(maml, *data, repeats=3)
    assert 1 <= found.threads <= 2
    assert 0 < told(found) <= found.total_ms * (1 + 1e-6)
    assert "waiting for threads" in {part.name for part in found.parts}


@pytest.mark.parametrize("layout", ["tasks_in_lanes", "rows_in_lanes"])
def test_both_layouts(monkeypatch, layout):
    monkeypatch.setattr("maml_fast.cpu_cost.LAYOUTS", (layout,))
    maml, data = flat(backend="cpu")
    found = profile(maml, *data, repeats=1)
    assert plan_of(maml, data).cpu.layout == layout
    assert layout.replace("_", " ") in found.about
    assert all(layer.total > 0 for layer in found.layers)
    assert {"loss", "rows in and out", "sums over tasks"} <= {part.name for part in found.parts}


def test_what_runs_as_one_is_shown_as_one():
    maml, data = images("conv4, pooled", backend="cpu")
    found = profile(maml, *data, repeats=1)
    first = found.layers[0]
    assert first.operations[0].startswith("conv")
    assert [text.split()[0] for text in first.operations[1:]] == ["batch", "relu", "max"]
    assert found.layers[1].operations[0].startswith("conv")
    assert len(found.layers[1].layers) == 1
    maml, data = flat(backend="cpu")
    relu = profile(maml, *data, repeats=1).layers[1]
    assert relu.operations == ("relu",)
    assert relu.note == "in the layers beside it"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [flat, images])
def test_the_same_bits_as_without(backend, make):
    maml, data = make(backend=backend)
    wanted = gradients(maml, data)
    with recording(maml._prepare(maml._batch(*data, None, None), 2)[0].plan) as recorder:
        found = gradients(maml, data)
    assert recorder.seconds
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, gradients(maml, data), wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_bits(kind):
    maml, data = KINDS[kind]()
    wanted = gradients(maml, data)
    with recording(maml._prepare(maml._batch(*data, None, None), 2)[0].plan):
        found = gradients(maml, data)
    assert all(map(torch.equal, found, wanted))


def test_torch_tells_layers_apart():
    maml, data = normed()
    maml.backend = "torch"
    found = profile(maml, *data, repeats=2)
    plan = plan_of(maml, data)
    assert plan.body  # the first linear layer, which learns
    names = [name for layer in found.layers for name in layer.layers]
    assert names == [layer.link.name for layer in (*plan.body, *plan.layers)]
    assert all(layer.total > 0 for layer in found.layers)
    assert any(layer.alive_bytes for layer in found.layers)
    assert 0 < told(found) <= found.total_ms * (1 + 1e-6)
    assert found.arena_bytes == 0 < found.peak_bytes


@pytest.mark.parametrize("backend", ["functional", "reference"])
def test_passes_where_layers_are_not_told_apart(backend):
    maml, data = flat(backend=backend)
    found = profile(maml, *data, repeats=1)
    assert found.layers == ()
    (part,) = found.parts
    assert part.name == "all layers"
    assert all(ms > 0 for ms in part.milliseconds)
    assert told(found) <= found.total_ms * (1 + 1e-6)
    assert any("layers are not told apart" in note for note in found.notes)
    assert "layers are not told apart" in str(found)


@pytest.mark.parametrize("hidden", [8, 130])
def test_triton_says_what_it_cannot_tell(hidden):
    draw = Draw(1, torch.float32)
    sizes = (2, hidden, 1)
    maml = MAML(draw.mlp(sizes), "mse", 0.1, 1, backend="triton")
    data = draw.batch("mse", 2, 3, 2, sizes)[:4]
    wanted = gradients(maml, data)
    found = profile(maml, *data, repeats=1)
    assert all(layer.milliseconds is None and layer.gflops is None for layer in found.layers)
    fused = maml.plan(data[0], data[2]).triton.kernels == "fused"
    assert fused == (hidden == 8)
    (part,) = found.parts
    assert part.total > 0
    assert (part.outside > 0 and sum(part.milliseconds) == 0) or not fused
    assert fused or all(ms > 0 for ms in part.milliseconds)
    assert any("told apart" in note for note in found.notes)
    assert all(map(torch.equal, gradients(maml, data), wanted))


def test_json_and_table():
    maml, data = images(backend="cpu")
    found = profile(maml, *data, repeats=2)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["backend"] == "cpu"
    assert [layer["layers"] for layer in document["layers"]] == [
        list(layer.layers) for layer in found.layers
    ]
    first = document["layers"][0]
    assert first["milliseconds"].keys() == set(PASSES)
    assert first["total_ms"] == pytest.approx(sum(first["milliseconds"].values()))
    assert first["gflops"] == pytest.approx(first["flops"] / first["total_ms"] / 1e6)
    shares = [part["share"] for part in (*document["layers"], *document["parts"])]
    rest = document["rest_ms"] / document["total_ms"]
    assert sum(shares) + rest == pytest.approx(1)
    assert document["by_pass_ms"].keys() == set(PASSES)
    lines = str(found).splitlines()
    assert lines[2].split()[:3] == ["layer", "operation", "weights"]
    assert len(lines) >= 3 + len(found.layers) + len(found.parts)


def test_gradients_of_the_caller_are_left_alone():
    maml, data = flat(backend="cpu")
    before = torch.ones_like(maml.model[0].weight)
    maml.model[0].weight.grad = before.clone()
    profile(maml, *data, repeats=1)
    assert torch.equal(maml.model[0].weight.grad, before)
    assert maml.model[0].bias.grad is None


def test_data_that_require_grad_and_rows_that_count_less():
    maml, data = flat(backend="cpu")
    weight = torch.tensor([1.0, 0.5, 0, 2]).double().expand(5, 4)
    data = [data.support_x.clone().requires_grad_(), *data[1:4]]
    found = profile(maml, *data, support_weight=weight, repeats=1)
    assert found.layers[0].milliseconds[2] > 0
    assert data[0].grad is None


def test_bad_input():
    maml, data = flat(backend="cpu")
    with pytest.raises(TypeError, match="maml is Sequential; wanted is a maml_fast.MAML"):
        profile(maml.model, *data[:4])
    with pytest.raises(ValueError, match="repeats is 0"):
        profile(maml, *data[:4], repeats=0)
    with pytest.raises(TypeError, match="support_x is list"):
        profile(maml, [1.0], *data[1:4])
    plan = plan_of(maml, data)
    with pytest.raises(RuntimeError, match="broken"), recording(plan):
        raise RuntimeError("broken")
    assert plan.recorder is None


def test_memory_that_lives_at_once():
    with LiveMemory(lambda: "owner") as live:
        x = torch.ones(1000)  # 4000 bytes
        y = x + 1
        del x
        z = y.view(10, 100)  # no memory of its own
        y = y * 2
        del z
        y = y * 2
    assert live.peak == 8000
    assert live.at_peak == {"owner": 8000}
    assert y.numel() == 1000


def test_programs_of_other_lengths_count_in_the_peak():
    draw = Draw(0)
    model, batch = draw.mlp((3, 64, 2)), draw.batch("mse", 3, 4, 4, (3, 64, 2))
    maml = MAML(model, inner_steps=3, step_weights=[0.1, 0.2, 0.3, 0.4], backend="cpu")
    found = profile(maml, *batch[:4], repeats=1)
    programs = maml.plan(batch.support_x, batch.query_x).programs.values()
    arenas = [program.prepared.sizes(3)["arena_bytes"] for program in programs]
    assert len(arenas) == 4
    assert found.arena_bytes == max(arenas)
    assert found.peak_bytes >= found.threads * sum(arenas)
    more = (sum(arenas) - max(arenas)) / 1024
    assert f"other lengths keep {more:.1f} KiB a thread more" in str(found)
