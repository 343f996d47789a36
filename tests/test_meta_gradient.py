"""Whole meta-gradients in float64: every backend against the reference, and that against a loop."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from maml_fast import MAML, check
from maml_fast.plan import PLANNED
from tests.engines import FORMS, tried
from tests.networks import SMOOTH, Draw, assert_close, by_graph, gradients

BOUND = 1e-10


@st.composite
def problems(draw):
    depth = draw(st.integers(1, 4))
    sizes = tuple(draw(st.integers(1, 9)) for _ in range(depth + 1))
    loss = draw(st.sampled_from(["mse", "cross_entropy", "bce_with_logits", "huber"]))
    if loss == "cross_entropy":
        sizes = (*sizes[:-1], max(2, sizes[-1]))
    return {
        "sizes": sizes,
        "loss": loss,
        "activation": draw(st.sampled_from(sorted(SMOOTH))),
        "bias": draw(st.booleans()),
        "tasks": draw(st.integers(1, 4)),
        "rows": draw(st.integers(1, 6)),
        "queries": draw(st.integers(1, 6)),
        "inner_steps": draw(st.integers(0, 5)),
        "first_order": draw(st.booleans()),
        "chunk_size": draw(st.sampled_from([None, 1, 2])),
        "frozen": draw(st.sets(st.integers(0, 2 * depth - 1), max_size=depth)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def build(p):
    draw = Draw(p["seed"])
    model = draw.mlp(p["sizes"], SMOOTH[p["activation"]], p["bias"])
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i not in p["frozen"])
    batch = draw.batch(p["loss"], p["tasks"], p["rows"], p["queries"], p["sizes"])
    return model, batch


BACKENDS = tried(
    [
        *FORMS,
        ("torch", "auto"),
        ("cpu", "auto"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_every_backend_equals_a_plain_loop(p):
    model, batch = build(p)
    options = dict(
        loss=p["loss"],
        inner_lr=0.3,
        inner_steps=p["inner_steps"],
        first_order=p["first_order"],
        chunk_size=p["chunk_size"],
    )
    adapting = [q for q in model.parameters() if q.requires_grad]
    wanted_loss, wanted = None, {}
    if adapting:
        wanted_loss, wanted = by_graph(
            model, batch, p["loss"], 0.3, p["inner_steps"], p["first_order"]
        )
    for backend, fast_weights in BACKENDS:
        maml = MAML(model, backend=backend, fast_weights=fast_weights, **options)
        if not adapting:
            assert not maml(*batch).loss.requires_grad
            continue
        out = maml(*batch)
        torch.testing.assert_close(out.loss.detach(), wanted_loss, rtol=1e-10, atol=0)
        assert_close(gradients(maml, batch), wanted, BOUND)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_backend_agrees_on_all_it_yields(p):
    model, batch = build({**p, "frozen": set()})
    options = dict(loss=p["loss"], inner_lr=0.2, inner_steps=p["inner_steps"])
    outs = [
        MAML(model, backend=backend, fast_weights=fast_weights, **options)(*batch)
        for backend, fast_weights in BACKENDS
    ]
    reference = outs[0]
    assert reference.task_losses.shape == (p["tasks"],)
    assert reference.support_losses.shape == (p["tasks"], p["inner_steps"])
    assert reference.query_outputs.shape == (p["tasks"], p["queries"], p["sizes"][-1])
    for out in outs:
        for name in ("loss", "task_losses", "support_losses", "query_outputs"):
            found, wanted = getattr(out, name).detach(), getattr(reference, name).detach()
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(out.loss.detach(), out.task_losses.mean())


@settings(max_examples=40, deadline=None)
@given(problems())
def test_float32_error_is_autograds(p):
    """At most twice autograd's own error, or 1e-6, tensor by tensor, is the rule of `check`; five
    times that here, for in networks of a few numbers autograd's may be small by luck."""
    model, batch = build({**p, "frozen": set()})
    model.float()
    batch = [t.float() if t.is_floating_point() else t for t in batch[:4]]
    options = dict(loss=p["loss"], inner_lr=0.1, inner_steps=p["inner_steps"])
    for backend, fast_weights in BACKENDS[1:]:
        maml = MAML(model, backend=backend, fast_weights=fast_weights, **options)
        report = check(maml, *batch)
        assert all(t.error <= 5 * t.bound for t in report.tensors), str(report)


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_piecewise_linear_activations(backend, fast_weights, activation, draw):
    """Kinks are a set of measure zero: in float64 random pre-activations stay clear of them."""
    sizes = (4, 6, 5, 3)
    model, batch = draw.mlp(sizes, activation), draw.batch("cross_entropy", 3, 5, 4, sizes)
    maml = MAML(model, "cross_entropy", 0.1, 3, backend=backend, fast_weights=fast_weights)
    assert_close(gradients(maml, batch), by_graph(model, batch, "cross_entropy", 0.1, 3)[1], BOUND)


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS)
def test_first_order_differs_from_second(backend, fast_weights, draw):
    sizes = (3, 8, 8, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 4, 5, 5, sizes)
    options = dict(inner_lr=0.1, inner_steps=2, backend=backend, fast_weights=fast_weights)
    second = gradients(MAML(model, **options), batch)
    first = gradients(MAML(model, first_order=True, **options), batch)
    for name, tensor in second.items():
        assert (tensor - first[name]).norm() > 0.05 * tensor.norm(), name


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS)
def test_sum_is_tasks_times_mean(backend, fast_weights, draw):
    sizes = (2, 4, 3)
    model, batch = draw.mlp(sizes), draw.batch("huber", 5, 3, 3, sizes)
    options = dict(loss="huber", backend=backend, fast_weights=fast_weights)
    mean, total = MAML(model, **options), MAML(model, reduction="sum", **options)
    torch.testing.assert_close(5 * mean(*batch).loss, total(*batch).loss)
    wanted = {name: 5 * g for name, g in gradients(mean, batch).items()}
    assert_close(gradients(total, batch), wanted, 1e-13)


def test_same_inputs_same_bits(draw):
    sizes = (3, 40, 40, 2)
    model, batch = draw.mlp(sizes).float(), draw.batch("mse", 50, 5, 5, sizes)
    batch = [t.float() for t in batch[:4]]
    maml = MAML(model, inner_steps=2, backend="torch", chunk_size=16)
    first = {name: g.clone() for name, g in gradients(maml, batch).items()}
    for name, g in gradients(maml, batch).items():
        assert torch.equal(g, first[name])


@pytest.mark.parametrize("backend", ["reference", "functional", "torch", "cpu"])
def test_unused_parameters_get_zeros(backend, draw):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = draw.initialise(Unused().double())
    batch = draw.batch("mse", 3, 4, 4, (3, 2))
    found = gradients(MAML(model, backend=backend, inner_lr=0.1), batch)
    assert_close(found, by_graph(model, batch, "mse", 0.1, 1)[1], BOUND)
    assert torch.equal(found["spare.weight"], torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "functional"])
def test_tied_parameters(backend, draw):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = draw.initialise(Tied().double())
    batch = draw.batch("mse", 3, 4, 4, (3, 3))
    wanted = by_graph(model, batch, "mse", 0.1, 2)[1]
    assert set(wanted) == {"first.weight", "first.bias", "second.bias"}
    for chosen in (backend, "auto"):
        maml = MAML(model, backend=chosen, inner_lr=0.1, inner_steps=2)
        assert_close(gradients(maml, batch), wanted, BOUND)


@pytest.mark.parametrize("backend", ["reference", "functional", "torch", "cpu"])
def test_linear_over_positions(backend, draw):
    """A linear layer before a flatten sees every position of a row."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 2)
    )
    draw.initialise(model.double())
    batch = draw.batch("mse", 3, 4, 4, (3, 2))
    batch = batch._replace(support_x=draw.normal(3, 4, 5, 3), query_x=draw.normal(3, 4, 5, 3))
    wanted = by_graph(model, batch, "mse", 0.1, 2)[1]
    for fast_weights in ("auto", "factored", "dense") if backend in PLANNED else ("auto",):
        options = dict(backend=backend, fast_weights=fast_weights)
        maml = MAML(model, inner_lr=0.1, inner_steps=2, **options)
        assert_close(gradients(maml, batch), wanted, BOUND)


@pytest.mark.parametrize("backend", ["reference", "functional"])
def test_a_convolutional_network(backend, draw):
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 2),
    )
    draw.initialise(model.double())
    batch = draw.batch("cross_entropy", 2, 4, 3, (1, 2))
    batch = batch._replace(support_x=draw.normal(2, 4, 1, 6, 6), query_x=draw.normal(2, 3, 1, 6, 6))
    wanted = by_graph(model, batch, "cross_entropy", 0.1, 2)[1]
    for chosen in (backend, "auto"):
        maml = MAML(model, "cross_entropy", 0.1, 2, backend=chosen)
        assert_close(gradients(maml, batch), wanted, 1e-9)


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, nn.functional.huber_loss])
def test_a_loss_without_forward_mode(loss, draw):
    """torch cannot differentiate these forward over reverse; functional takes reverse mode."""
    sizes = (3, 4, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 3, 4, 4, sizes)
    options = dict(loss=loss, inner_lr=0.1, inner_steps=3)
    wanted = gradients(MAML(model, backend="reference", **options), batch)
    wanted = {name: g.clone() for name, g in wanted.items()}
    assert_close(gradients(MAML(model, backend="functional", **options), batch), wanted, BOUND)
    assert_close(gradients(MAML(model, backend="auto", **options), batch), wanted, BOUND)


def test_the_reference_by_hand():
    """One weight, one row: L = (w x - y)^2, so every derivative can be written down.

    w1 = w - a 2 x (w x - y);  dL_q/dw = 2 x_q (w1 x_q - y_q) (1 - 2 a x^2)
    """
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 0.7)
    w, a, x, y, xq, yq = 0.7, 0.1, 1.5, 2.0, -0.5, 1.0
    w1 = w - a * 2 * x * (w * x - y)
    wanted = 2 * xq * (w1 * xq - yq) * (1 - 2 * a * x**2)
    batch = [torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x, y, xq, yq)]
    for backend in ("reference", "functional", "torch", "cpu"):
        maml = MAML(model, inner_lr=a, backend=backend)
        out = maml(*batch)
        assert out.loss.item() == pytest.approx((w1 * xq - yq) ** 2, rel=1e-14)
        assert out.support_losses.item() == pytest.approx((w * x - y) ** 2, rel=1e-14)
        assert gradients(maml, batch)["weight"].item() == pytest.approx(wanted, rel=1e-13)
        first = MAML(model, inner_lr=a, backend=backend, first_order=True)
        by_hand = 2 * xq * (w1 * xq - yq)
        assert gradients(first, batch)["weight"].item() == pytest.approx(by_hand, rel=1e-13)


def test_the_reference_against_finite_differences(draw):
    sizes = (2, 3, 2)
    model, batch = draw.mlp(sizes), draw.batch("cross_entropy", 2, 3, 3, sizes)
    maml = MAML(model, "cross_entropy", 0.5, 3, backend="reference")
    found = gradients(maml, batch)
    step = 1e-5
    for name, parameter in model.named_parameters():
        flat, wanted = parameter.data.view(-1), torch.zeros(parameter.numel(), dtype=torch.float64)
        for i in range(len(flat)):
            losses = []
            for sign in (1, -1):
                flat[i] += sign * step
                losses.append(maml(*batch).loss.item())
                flat[i] -= sign * step
            wanted[i] = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(found[name].view(-1), wanted, rtol=1e-7, atol=1e-9)
