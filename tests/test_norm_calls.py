"""Norms of whole networks, as modules and as function calls, on every backend: a task's own
statistics, or a refusal that says what to change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maml_fast import MAML, UnsupportedModelError
from tests.image_networks import assert_near, image_batch
from tests.networks import Draw, by_graph, gradients

BACKENDS = ("reference", "functional", "torch", "cpu", "auto")
RATE = 0.1


class Calls(nn.Module):
    """A convolution, a norm by whatever `norm` calls, and a head."""

    def __init__(self, norm, gamma=True, beta=True):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.norm = norm
        self.gamma = nn.Parameter(torch.ones(2)) if gamma else None
        self.beta = nn.Parameter(torch.zeros(2)) if beta else None
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("var", torch.ones(2))

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self, self.conv(x))).flatten(1))


def with_gamma(model):
    """The same with gammas of 1 that stay, for the loop by autograd."""
    model = copy.deepcopy(model)
    for module in model.modules():
        bias = getattr(module, "beta", None)
        if isinstance(bias, nn.Parameter) and module.gamma is None:
            module.gamma = nn.Parameter(torch.ones_like(bias), requires_grad=False)
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d, nn.InstanceNorm2d)):
            ones = torch.ones_like(module.bias)
            module.weight = nn.Parameter(ones, requires_grad=False)
    return model


def module_of_beta(norm):
    norm.register_parameter("weight", None)
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def images(draw):
    return image_batch(draw, 2, 3, 4, (1, 4, 4), classes=3)


def batch_call(m, x):
    return F.batch_norm(x, None, None, m.gamma, m.beta, True)


def group_call(m, x):
    return F.group_norm(x, 2, m.gamma, m.beta)


def torch_batch_call(m, x):
    return torch.batch_norm(x, m.gamma, m.beta, None, None, True, 0.1, 1e-5, False)


def torch_group_call(m, x):
    return torch.group_norm(x, 2, m.gamma, m.beta, 1e-5, False)


def layer_call(m, x):
    return torch.layer_norm(x, (2,), m.gamma, m.beta, 1e-5)


CALLED = [batch_call, group_call, torch_batch_call, torch_group_call, layer_call]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: module_of_beta(nn.GroupNorm(2, 2)),
        lambda: module_of_beta(nn.LayerNorm((2, 2, 2))),
        lambda: module_of_beta(nn.BatchNorm2d(2)),
        lambda: module_of_beta(nn.BatchNorm2d(2, track_running_stats=False)),
        *(lambda call=call: Calls(call, gamma=False) for call in CALLED),
    ],
)
def test_a_beta_alone(make, backend, draw):
    model = draw.initialise(make().double())
    batch = images(draw)
    wanted = by_graph(with_gamma(model), batch, "cross_entropy", RATE, 2)[1]
    maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
    assert_near(gradients(maml, batch), wanted, 1e-9)


def test_an_instance_norm_of_beta(draw):
    model = draw.initialise(module_of_beta(nn.InstanceNorm2d(2, affine=True)).double())
    batch = images(draw)
    wanted = by_graph(with_gamma(model), batch, "cross_entropy", RATE, 2)[1]
    for backend in ("reference", "functional", "auto"):
        maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
        assert_near(gradients(maml, batch), wanted, 1e-9)


@pytest.mark.parametrize("call", [torch_batch_call, torch_group_call, layer_call])
def test_torchs_own_functions_are_planned(call, draw):
    model, batch = draw.initialise(Calls(call).double()), images(draw)
    wanted = by_graph(model, batch, "cross_entropy", RATE, 2)[1]
    maml = MAML(model, "cross_entropy", RATE, 2, backend="torch")
    assert_near(gradients(maml, batch), wanted, 1e-9)


def by_f(m, x):
    return F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, training=m.training)


def by_torch(m, x):
    return torch.batch_norm(x, m.gamma, m.beta, m.mean, m.var, m.training, 0.1, 1e-5, False)


def by_instance(m, x):
    return F.instance_norm(x, m.mean, m.var, m.gamma, m.beta, m.training)


RUNNING = {
    "F.batch_norm": (by_f, lambda m, x: F.batch_norm(x, None, None, m.gamma, m.beta, True)),
    "torch.batch_norm": (by_torch, lambda m, x: F.batch_norm(x, None, None, m.gamma, m.beta, True)),
    "F.instance_norm": (by_instance, lambda m, x: F.instance_norm(x, None, None, m.gamma, m.beta)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics_by_call(name, backend, draw):
    """In train() they are neither read nor updated; in eval() the call is refused."""
    call, own = RUNNING[name]
    model, batch = draw.initialise(Calls(call).double()), images(draw)
    plain = copy.deepcopy(model)
    plain.norm = own
    maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
    if name == "F.instance_norm" and backend in ("torch", "cpu"):
        with pytest.raises(
            UnsupportedModelError, match="instance_norm.*no planned operation|buffer"
        ):
            maml(*batch)
    else:
        wanted = by_graph(plain, batch, "cross_entropy", RATE, 2)[1]
        assert_near(gradients(maml, batch), wanted, 1e-9)
        assert model.mean.abs().max() == 0
        assert (model.var == 1).all()
    model.eval()
    flag = "use_input_stats" if name == "F.instance_norm" else "training"
    words = f"_norm: would normalise by running statistics.* pass {flag}=True"
    for call in (
        lambda: maml(*batch),
        lambda: maml.adapt(*batch[:2]),
        lambda: maml.plan(batch.support_x, batch.query_x),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_after_adapting(backend, draw):
    """A prediction by running statistics would be another model's."""
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    model, batch = draw.initialise(nn.Sequential(*layers).double()), images(draw)
    adapted = MAML(model, "cross_entropy", RATE, backend=backend).adapt(*batch[:2])
    wanted = adapted(batch.query_x)
    model.eval()
    with pytest.raises(UnsupportedModelError, match=r"layer '1' \(BatchNorm2d\).*running"):
        adapted(batch.query_x)
    model.train()
    torch.testing.assert_close(adapted(batch.query_x), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "functional"])
def test_eval_after_adapting_by_call(backend, draw):
    model, batch = draw.initialise(Calls(by_f).double()), images(draw)
    adapted = MAML(model, "cross_entropy", RATE, backend=backend).adapt(*batch[:2])
    model.eval()
    with pytest.raises(UnsupportedModelError, match="batch_norm: would normalise by running"):
        adapted(batch.query_x)


@pytest.mark.parametrize("backend", ["reference", "functional", "auto"])
def test_instance_norm_with_running_statistics(backend, draw):
    """In train() it takes its own, as without them."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    )
    model.extend([nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)])
    model, batch = draw.initialise(model.double()), images(draw)
    plain = copy.deepcopy(model)
    plain[1] = nn.InstanceNorm2d(2, affine=True).double()
    plain[1].load_state_dict({"weight": model[1].weight, "bias": model[1].bias})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
    wanted = by_graph(plain, batch, "cross_entropy", RATE, 2)[1]
    assert_near(gradients(maml, batch), wanted, 1e-9)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UnsupportedModelError, match=r"layer '1' \(InstanceNorm2d\)"):
        maml.eval()(*batch)


@pytest.mark.parametrize("backend", ["functional", "torch", "cpu", "auto"])
def test_advice_about_dropout_beside_tracked_norms(backend, draw):
    """Followed, it leads to a model that runs."""
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8, 3)
    model, batch = draw.initialise(nn.Sequential(*layers).double()), images(draw)
    maml = MAML(model, "cross_entropy", RATE, backend=backend)
    words = r"layer '2' \(Dropout\): draws.*; call eval\(\) of this layer alone or set p=0"
    with pytest.raises(UnsupportedModelError, match=words):
        maml(*batch)
    model.eval()
    with pytest.raises(UnsupportedModelError, match=r"layer '1' .*; call train\(\) of it"):
        maml(*batch)
    model[1].train()
    in_eval = maml(*batch).loss
    model.train()
    model[2].eval()
    torch.testing.assert_close(maml(*batch).loss, in_eval)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.norm(torch.tanh(self.norm(self.a(x.flatten(1)[:, :4])))))


def shaped(m, x):
    return F.layer_norm(x, x.shape[3:], m.gamma)


def shaped_in_a_tuple(m, x):
    return F.layer_norm(x, (x.shape[3],), m.gamma)


@pytest.mark.parametrize("call", [shaped, shaped_in_a_tuple])
def test_sizes_from_the_data_are_refused_by_name(call, draw):
    model, batch = draw.initialise(Calls(call, beta=False).double()), images(draw)
    with pytest.raises(UnsupportedModelError, match=r"'layer_norm.*computed from the data"):
        MAML(model, "cross_entropy", RATE, backend="torch")(*batch)
    wanted = by_graph(model, batch, "cross_entropy", RATE, 2)[1]
    assert_near(gradients(MAML(model, "cross_entropy", RATE, 2), batch), wanted, 1e-9)


def test_a_norm_used_twice(draw):
    model = draw.initialise(Twice().double())
    rows = draw.batch("cross_entropy", 2, 3, 4, (4, 3))
    with pytest.raises(UnsupportedModelError, match=r"'norm' \(LayerNorm\): is used twice"):
        MAML(model, "cross_entropy", RATE, backend="torch")(*rows)


@pytest.mark.parametrize("pool", [lambda x: F.max_pool2d(x, (2,)), lambda x: F.avg_pool2d(x, [2])])
def test_one_number_in_a_tuple_is_a_window(pool, draw):
    model = Calls(lambda m, x: pool(x), gamma=False, beta=False)
    model.head = nn.Linear(2, 3)
    model, batch = draw.initialise(model.double()), images(draw)
    wanted = by_graph(model, batch, "cross_entropy", RATE, 2)[1]
    maml = MAML(model, "cross_entropy", RATE, 2, backend="torch")
    assert_near(gradients(maml, batch), wanted, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["functional", "torch", "cpu", "auto"])
def test_gradients_that_cancel_in_norms_are_no_disagreement(backend, dtype):
    """Groups of one number normalise to 0: what is left is rounding, enlarged by each norm."""
    draw = Draw(0, dtype)
    hidden = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6)]
    layers = *hidden, nn.Tanh(), nn.Linear(6, 2), nn.GroupNorm(2, 2, eps=1e-8, affine=False)
    for layer in hidden:
        if isinstance(layer, nn.LayerNorm):
            layer.elementwise_affine, layer.weight, layer.bias = False, None, None
    model, batch = nn.Sequential(*layers).to(dtype), draw.batch("mse", 3, 5, 6, (4, 2))
    maml = MAML(draw.initialise(model), "mse", 0.1, 3, backend=backend)
    assert maml(*batch).query_outputs.abs().max() < 1e-2
    expected = "cpu" if backend == "auto" else backend
    assert maml.plan(batch.support_x, batch.query_x).backend == expected
