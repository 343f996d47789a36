"""Models that do what a tracer or torch.func does not see are refused or right, never wrong."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from maml_fast import MAML, UnsupportedModelError
from tests.networks import IN_DOUBLE, Draw, assert_close, by_graph, gradients

IN, OUT = 4, 3
REASONS = ("another result than autograd", "no planned operation", "only chains")
BACKENDS = ["reference", "functional", "torch", "cpu", "auto"]


def batch_of(draw, tasks=3):
    return draw.batch("mse", tasks, 5, 5, (IN, OUT))


def ready(model):
    return Draw(0).initialise(model.double())


class Two(nn.Module):
    """Two linear layers, and between them whatever a test wants."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, 6), nn.Linear(6, OUT)

    def forward(self, x):
        return self.b(self.middle(self.a(x)))

    def middle(self, h):
        return h


class FrozenFeatures(Two):
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.a(x))
        return self.b(h)


class Normalised(Two):
    def middle(self, h):
        with torch.no_grad():
            scale = h.abs().amax(-1, keepdim=True)
        return torch.tanh(h / scale)


class ByData(Two):
    def middle(self, h):
        return torch.tanh(h / h.data.norm())


class AsksForTheType(Two):
    def middle(self, h):
        return torch.tanh(h) if isinstance(h, torch.Tensor) and type(h) is torch.Tensor else h


class WithADefault(Two):
    def forward(self, x, parameters=None, flag=True):
        h = self.a(x)
        if parameters is None and flag:
            h = torch.tanh(h)
        return self.b(h)


@pytest.mark.parametrize("kind", [FrozenFeatures, Normalised, ByData, WithADefault])
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_or_refused(kind, backend, draw):
    model, batch = ready(kind()), batch_of(draw)
    wanted = by_graph(model, batch, "mse", 0.1, 2)[1]
    maml = MAML(model, inner_lr=0.1, inner_steps=2, backend=backend)
    try:
        found = gradients(maml, batch)
    except UnsupportedModelError as error:
        assert backend != "reference"
        assert kind is not WithADefault
        assert any(reason in str(error) for reason in REASONS), error  # noqa: PT017
    else:
        assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("kind", [FrozenFeatures, Normalised])
def test_no_grad_inside_takes_reverse_mode(kind, draw):
    """Forward mode does not heed torch.no_grad; auto goes on to what does."""
    model, batch = ready(kind()), batch_of(draw)
    maml = MAML(model, inner_lr=0.1, inner_steps=2)
    assert_close(gradients(maml, batch), by_graph(model, batch, "mse", 0.1, 2)[1], 1e-9)
    plan = maml.plan(batch.support_x, batch.query_x)
    assert plan.backend == "functional"
    assert plan.forward_mode == (kind is FrozenFeatures)  # there no tangent passes no_grad


def test_no_grad_inside_a_loss(draw):
    def reweighted(z, y):
        with torch.no_grad():
            weight = 1 / (1 + (z - y).abs())
        return (weight * (z - y) ** 2).mean()

    model, batch = draw.mlp((IN, 5, OUT)), batch_of(draw)
    wanted = gradients(MAML(model, reweighted, 0.1, 2, backend="reference"), batch)
    wanted = {name: g.clone() for name, g in wanted.items()}
    for backend in ("functional", "auto"):
        maml = MAML(model, reweighted, 0.1, 2, backend=backend)
        maml.plan(batch.support_x, batch.query_x)
        assert_close(gradients(maml, batch), wanted, 1e-9)


def test_a_test_of_the_type_is_refused_by_the_planner(draw):
    model, batch = ready(AsksForTheType()), batch_of(draw)
    with pytest.raises(UnsupportedModelError, match="another result than autograd"):
        MAML(model, backend="torch")(*batch)


@pytest.mark.parametrize(
    "patch",
    [
        lambda m: setattr(m.a, "forward", lambda x: 3 * nn.Linear.forward(m.a, x)),
        lambda m: setattr(m, "forward", lambda x: 3 * Two.forward(m, x)),
        lambda m: m.a.register_full_backward_pre_hook(lambda mod, g: tuple(2 * x for x in g)),
        lambda m: m.a.register_full_backward_hook(lambda mod, gi, go: None),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["planned before", "fresh"])
def test_patched_modules_are_refused_by_the_planner(patch, before, draw):
    model, batch = ready(Two()), batch_of(draw)
    maml = MAML(model, backend="torch")
    if before:
        maml(*batch)
    patch(model)
    with pytest.raises(UnsupportedModelError, match=r"a forward of its own|has hooks"):
        maml(*batch)


def test_global_hooks_are_refused_by_the_planner(draw):
    model, batch = ready(Two()), batch_of(draw)
    handle = nn_module.register_module_forward_hook(lambda mod, args, out: None)
    try:
        with pytest.raises(UnsupportedModelError, match="hooks on all modules"):
            MAML(model, backend="torch")(*batch)
    finally:
        handle.remove()
    MAML(model, backend="torch")(*batch)


class Configured(Two):
    def __init__(self):
        super().__init__()
        self.fn, self.factors, self.pair, self.table = torch.tanh, [2.0], (1.0, 3.0), {"s": 1.0}

    def middle(self, h):
        return self.fn(h * self.factors[0] * self.pair[0] * self.table["s"])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "fn", torch.sigmoid),
        lambda m: m.factors.__setitem__(0, -1.0),
        lambda m: setattr(m, "pair", (3.0, 1.0)),
        lambda m: m.table.update(s=2.0),
        lambda m: setattr(m, "__class__", Two),
    ],
)
def test_a_changed_model_is_planned_anew(change, draw):
    model, batch = ready(Configured()), batch_of(draw)
    maml = MAML(model, inner_lr=0.1, backend="torch")
    maml(*batch)
    change(model)
    assert_close(gradients(maml, batch), by_graph(model, batch, "mse", 0.1, 1)[1], 1e-10)


def test_modules_that_take_the_place_of_freed_ones(draw):
    """A freed module's id may come again, for a module of another kind."""
    model = ready(nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT)))
    batch = batch_of(draw)
    maml = MAML(model, backend="torch")
    reference = MAML(model, backend="reference")
    for i in range(120):
        model[1] = (nn.Tanh, nn.Sigmoid, nn.Softplus)[i * i % 3]()
        found, wanted = maml(*batch).loss.item(), reference(*batch).loss.item()
        assert found == pytest.approx(wanted, rel=1e-12)


def test_functions_that_take_the_place_of_freed_ones(draw):
    model, batch = ready(Configured()), batch_of(draw)
    maml = MAML(model, backend="torch")
    reference = MAML(model, backend="reference")
    for i in range(60):
        model.fn = (lambda h: torch.tanh(h)) if i * i % 3 else (lambda h: torch.sigmoid(h))
        found, wanted = maml(*batch).loss.item(), reference(*batch).loss.item()
        assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("layer", [nn.LeakyReLU(0.1, inplace=True), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_layers_leave_the_data_alone(layer, backend, draw):
    model = ready(nn.Sequential(layer, nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT)))
    batch = batch_of(draw)
    before = [t.clone() for t in batch[:4]]
    maml = MAML(model, inner_lr=0.1, backend=backend)
    found = gradients(maml, batch)
    maml.adapt(batch.support_x, batch.support_y)(batch.query_x)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(batch[:4], before, strict=True))
    plain = nn.Sequential(nn.LeakyReLU(0.1) if layer is model[0] else layer, *model[1:])
    plain[0] = nn.ReLU() if isinstance(layer, nn.ReLU) else nn.LeakyReLU(0.1)
    assert_close(found, by_graph(plain, batch, "mse", 0.1, 1)[1], 1e-10)


@pytest.mark.parametrize(
    ("backend", "fast_weights"),
    [
        ("reference", "auto"),
        ("functional", "auto"),
        *((backend, form) for backend in IN_DOUBLE for form in ("factored", "dense")),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_was_adapted_stays(backend, fast_weights, steps, draw):
    model, batch = draw.mlp((IN, 6, OUT)), batch_of(draw)
    maml = MAML(model, inner_lr=0.1, backend=backend, fast_weights=fast_weights)
    adapted = maml.adapt(batch.support_x, batch.support_y, inner_steps=steps)
    wanted = adapted(batch.query_x).clone()
    kept = {name: p.clone() for name, p in adapted.parameters().items()}
    adapted(batch.support_x).zero_()  # predictions are the caller's own
    on_support = adapted(batch.support_x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x = batch.support_x.clone()
    batch.support_x.copy_(batch.query_x)
    torch.testing.assert_close(adapted(batch.query_x), wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(adapted(x), on_support, rtol=1e-12, atol=1e-13)
    assert on_support.abs().sum() > 0
    for name, p in adapted.parameters().items():
        assert torch.equal(p, kept[name]), name


@pytest.mark.parametrize("backend", ["reference", "functional", "torch", "cpu"])
def test_two_threads_share_a_model(backend, draw):
    model = draw.mlp((IN, 6, OUT))
    batches = [batch_of(Draw(seed), tasks=4) for seed in range(2)]
    mamls = [MAML(model, inner_lr=0.1, inner_steps=2, backend=backend) for _ in range(2)]
    wanted = [m(*b).loss.item() for m, b in zip(mamls, batches, strict=True)]
    found = [[], []]

    def work(i):
        for _ in range(15):
            found[i].append(mamls[i](*batches[i]).loss.item())
            mamls[i].adapt(*batches[i][:2])(batches[i].query_x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[loss] * 15 for loss in wanted]
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert len(list(model.parameters())) == 4


class TestOptionsSetLater:
    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("reduction", "avg", "reduction is 'avg'"),
            ("inner_steps", -1, "inner_steps is -1"),
            ("loss", "mae", "loss is 'mae'"),
            ("backend", "foo", "backend is 'foo'"),
            ("chunk_size", 0, "chunk_size is 0"),
        ],
    )
    def test_bad_ones_are_refused(self, name, value, words, draw):
        maml, batch = MAML(draw.mlp((IN, OUT))), batch_of(draw)
        setattr(maml, name, value)
        with pytest.raises(ValueError, match=words):
            maml(*batch)

    def test_good_ones_count(self, draw):
        maml, batch = MAML(draw.mlp((IN, OUT)), inner_lr=0.1), batch_of(draw)
        maml(*batch)
        maml.inner_steps, maml.reduction = 3, "sum"
        wanted = by_graph(maml.model, batch, "mse", 0.1, 3)
        torch.testing.assert_close(maml(*batch).loss.detach(), 3 * wanted[0])


def test_losses_that_are_modules(draw):
    model, batch = draw.mlp((IN, OUT)), batch_of(draw)
    wanted = gradients(MAML(model, inner_lr=0.1, backend="reference"), batch)
    wanted = {name: g.clone() for name, g in wanted.items()}
    assert_close(gradients(MAML(model, nn.MSELoss(), 0.1), batch), wanted, 1e-10)

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, z, y):
            return self.weight * (z - y).square().mean()

    with pytest.raises(ValueError, match=r"loss has parameters.*requires_grad_\(False\)"):
        MAML(model, Weighted())


def test_a_parameter_may_have_any_name(draw):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.empty(OUT, IN))
            self.training_ = nn.Parameter(torch.empty(OUT))

        def forward(self, x):
            return nn.functional.linear(x, self.table, self.training_)

    model, batch = ready(Named()), batch_of(draw)
    rates = {name: nn.Parameter(torch.tensor(0.1).double()) for name in ("table", "training_")}
    maml = MAML(model, inner_lr=rates)
    wanted = by_graph(model, batch, "mse", rates, 1)[1]
    found = gradients(maml, batch)
    assert_close(found, {n: g for n, g in wanted.items() if "rate" not in n}, 1e-10)
    assert set(maml.inner_lr) == {"table", "training_"}


def test_a_rate_beyond_the_models_type(draw):
    model, batch = draw.mlp((IN, OUT)).float(), [t.float() for t in batch_of(draw)[:4]]
    with pytest.raises(ValueError, match="inner_lr.*1e\\+40.*dtype"):
        MAML(model, inner_lr=1e40)(*batch)
