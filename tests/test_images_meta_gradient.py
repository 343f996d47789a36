"""Networks of images by the planned engine on torch, against an independent loop in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from maml_fast import MAML, UnsupportedModelError, models
from maml_fast.problem import TaskBatch
from tests.image_networks import NETWORKS, assert_near, image_batch, nudged, random_network
from tests.networks import Draw, by_graph, gradients

RATE = 0.1


@pytest.mark.parametrize("inner_steps", [1, 3, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_loop(name, inner_steps, draw):
    make, shape = NETWORKS[name]
    model = draw.initialise(make().double())
    batch = image_batch(draw, 2, 4, 5, shape, classes=3)
    for first_order in (False, True):
        options = dict(inner_steps=inner_steps, first_order=first_order)
        wanted = by_graph(model, batch, "cross_entropy", RATE, **options)[1]
        maml = MAML(model, "cross_entropy", RATE, backend="torch", **options)
        assert_near(gradients(maml, batch), wanted, 1e-9)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**20), layers=st.integers(1, 8), steps=st.sampled_from([1, 3, 5]))
def test_random_networks(seed, layers, steps):
    draw = Draw(seed)
    model, shape = random_network(seed, layers)
    model = draw.initialise(model.double())
    batch = image_batch(draw, 2, 3, 4, shape, classes=3)
    wanted, when_nudged = (
        by_graph(*case, "cross_entropy", RATE, steps)[1]
        for case in [(model, batch), nudged(draw, model, batch)]
    )
    maml = MAML(model, "cross_entropy", RATE, steps, backend="torch")
    assert_near(gradients(maml, batch), wanted, 1e-9, when_nudged)


def test_second_order_is_there(draw):
    make, shape = NETWORKS["conv4, pooled"]
    model = draw.initialise(make().double())
    batch = image_batch(draw, 2, 4, 5, shape, classes=3)
    found = {
        first_order: gradients(MAML(model, "cross_entropy", 0.5, 3, first_order), batch)
        for first_order in (False, True)
    }
    weight = "0.weight"
    difference = (found[True][weight] - found[False][weight]).norm()
    assert difference > 0.01 * found[False][weight].norm()


class ByCalls(nn.Module):
    """The same operations as functions and methods."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.gamma, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.gamma2, self.beta2 = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride=1, padding="same")
        x = F.batch_norm(x, None, None, self.gamma, self.beta, training=True)
        x = F.max_pool2d(torch.tanh(x), 2)
        x = F.layer_norm(x, (3, 3))
        x = F.group_norm(x, 2, self.gamma2, bias=self.beta2)
        x = F.avg_pool2d(x, kernel_size=2, stride=1)
        return self.head(x.mean(dim=(-2, -1)))


def test_functions_and_methods(draw):
    model = draw.initialise(ByCalls().double())
    batch = image_batch(draw, 2, 4, 5, (1, 6, 6), classes=3)
    wanted = by_graph(model, batch, "cross_entropy", RATE, 2)[1]
    maml = MAML(model, "cross_entropy", RATE, 2, backend="torch")
    assert_near(gradients(maml, batch), wanted, 1e-9)
    text = str(maml.plan(batch.support_x, batch.query_x))
    for operation in ("conv 3x3 1->4", "batch norm 4", "max pool 2x2", "layer norm 3x3"):
        assert operation in text
    assert "group norm 4 in 2" in text


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(2, 2, 5), "kernel is"),
        (nn.Conv2d(2, 2, (1, 3)), "the same both ways"),
        (nn.Conv2d(2, 2, 3, stride=3), "stride is"),
        (nn.Conv2d(2, 2, 3, padding=2), "padding is"),
        (nn.Conv2d(2, 2, 3, dilation=2), "dilation is"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups is 2"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (nn.MaxPool2d(3), "windows 2x2"),
        (nn.MaxPool2d(2, stride=1), "windows 2x2"),
        (nn.MaxPool2d(2, ceil_mode=True), "windows 2x2"),
        (nn.AvgPool2d(2, padding=1), "no padding"),
        (nn.AdaptiveAvgPool2d(2), "output_size is 2"),
        (nn.InstanceNorm2d(2), "no planned operation"),
    ],
)
def test_what_is_not_planned_is_named_and_runs_elsewhere(layer, words, draw):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    batch = image_batch(draw, 2, 3, 4, (1, 9, 9), classes=3)
    model.double()(batch.support_x[0])
    draw.initialise(model)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        MAML(model, "cross_entropy", RATE, backend="torch")(*batch)
    assert "'1'" in str(caught.value)
    wanted = by_graph(model, batch, "cross_entropy", RATE, 1)[1]
    assert_near(gradients(MAML(model, "cross_entropy", RATE), batch), wanted, 1e-9)


BACKENDS = ("torch", "functional", "reference", "auto")


class TestBatchStatistics:
    """A task's own statistics, whatever the mode; running ones are neither read nor updated."""

    def model(self, draw, **options):
        layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, **options), nn.Tanh(), nn.Flatten()
        return draw.initialise(nn.Sequential(*layers, nn.Linear(8, 3)).double())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_running_statistics_are_left_alone(self, backend, draw):
        model = self.model(draw)
        batch = image_batch(draw, 2, 3, 4, (1, 4, 4), classes=3)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
        found = gradients(maml, batch)
        maml.adapt(batch.support_x, batch.support_y)(batch.query_x)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        plain = self.model(draw, track_running_stats=False)
        plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
        assert_near(found, by_graph(plain, batch, "cross_entropy", RATE, 2)[1], 1e-9)
        text = str(maml.plan(batch.support_x, batch.query_x))
        assert "transductive" in text
        assert "running statistics are neither read nor updated" in text

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_eval_with_running_statistics_is_refused(self, backend, draw):
        batch = image_batch(draw, 2, 3, 4, (1, 4, 4), classes=3)
        maml = MAML(self.model(draw), "cross_entropy", RATE, backend=backend).eval()
        with pytest.raises(UnsupportedModelError, match=r"layer '1' .*track_running_stats=False"):
            maml(*batch)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_eval_without_them_changes_nothing(self, backend, draw):
        model = self.model(draw, track_running_stats=False)
        batch = image_batch(draw, 2, 3, 4, (1, 4, 4), classes=3)
        maml = MAML(model, "cross_entropy", RATE, backend=backend)
        before = {name: g.clone() for name, g in gradients(maml, batch).items()}
        assert_near(gradients(maml.eval(), batch), before, 1e-14)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_beta_without_gamma(self, backend, draw):
        model = self.model(draw, track_running_stats=False)
        model[1].weight = nn.Parameter(torch.ones(2).double(), requires_grad=False)
        batch = image_batch(draw, 2, 3, 4, (1, 4, 4), classes=3)
        wanted = by_graph(model, batch, "cross_entropy", RATE, 2)[1]
        model[1].register_parameter("weight", None)
        maml = MAML(model, "cross_entropy", RATE, 2, backend=backend)
        assert_near(gradients(maml, batch), wanted, 1e-9)

    def test_one_number_has_no_statistics(self, draw):
        model = self.model(draw)
        batch = image_batch(draw, 2, 1, 4, (1, 3, 3), classes=3)
        with pytest.raises(ValueError, match="support_x"):
            MAML(model, "cross_entropy", RATE)(*batch)


INITIAL = {  # standard deviation, and bound, of weights as the paper's code draws them
    "glorot": lambda w: ((2 / _fans(w)) ** 0.5, (6 / _fans(w)) ** 0.5),
    "truncated": lambda w: (0.01 * 0.8796, 0.02),  # of a normal cut off at two deviations
    "normal": lambda w: (1.0, None),
}


def _fans(weight):
    return (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()


class TestModels:
    @pytest.mark.parametrize(
        ("make", "hidden", "last"),
        [
            (models.omniglot_conv4, "glorot", "normal"),
            (lambda **o: models.omniglot_conv4(pooling=True, **o), "glorot", "glorot"),
            (models.miniimagenet_conv4, "glorot", "glorot"),
            (models.omniglot_mlp, "truncated", "truncated"),
        ],
    )
    def test_initial_weights(self, make, hidden, last):
        """Mean, deviation, bounds and fourth moment, layer by layer."""
        layers = [m for m in make(ways=40, seed=3) if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            weight = layer.weight.detach().double()
            kind = last if layer is layers[-1] else hidden
            deviation, bound = INITIAL[kind](weight)
            count = weight.numel()
            assert abs(weight.mean()) < 5 * deviation / count**0.5
            assert weight.std() == pytest.approx(deviation, rel=5 / count**0.5)
            kurtosis = {"glorot": 1.8, "truncated": 2.372, "normal": 3.0}[kind]
            fourth = (weight / deviation).pow(4).mean().item()
            assert fourth == pytest.approx(kurtosis, rel=15 / count**0.5)
            if bound is not None:
                assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
            assert layer.bias is None or (layer.bias == 0).all()

    @pytest.mark.parametrize(
        ("model", "shape", "learned"),
        [
            (models.omniglot_conv4(), (1, 28, 28), 112_005),
            (models.omniglot_conv4(20, pooling=True), (1, 28, 28), 112_980),
            (models.miniimagenet_conv4(), (3, 84, 84), 32_773),
            (models.omniglot_mlp(), (1, 28, 28), 247_109),
        ],
    )
    def test_shapes(self, model, shape, learned):
        out = model(torch.rand(3, *shape))
        assert out.shape[0] == 3
        assert out.isfinite().all()
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert counted == learned

    def test_seeds(self):
        first, same, other = (models.omniglot_conv4(seed=seed) for seed in (1, 1, 2))
        for name, value in first.state_dict().items():
            assert torch.equal(value, same.state_dict()[name])
        assert not torch.equal(first[0].weight, other[0].weight)

    @pytest.mark.parametrize("kind", [models.omniglot_conv4, models.miniimagenet_conv4])
    @pytest.mark.parametrize(("name", "value"), [("ways", 0), ("filters", 2.5), ("channels", True)])
    def test_bad_sizes(self, kind, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            kind(**{name: value})
        with pytest.raises(ValueError, match="image_size is 15"):
            kind(image_size=15, **({} if kind is models.miniimagenet_conv4 else {"pooling": True}))
        with pytest.raises(ValueError, match="hidden is"):
            models.omniglot_mlp(hidden=(4, 0))


def test_float32_is_as_exact_as_autograd(draw):
    model = models.omniglot_conv4(filters=8)
    draw = Draw(3, torch.float32)
    batch = TaskBatch(*image_batch(draw, 3, 5, 5, (1, 28, 28), classes=5))
    from maml_fast import check

    report = check(MAML(model, "cross_entropy", 0.4, 1, backend="torch"), *batch)
    assert report.passed, str(report)
