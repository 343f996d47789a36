"""The sinusoid tasks and the network of the paper: distribution, formula, seeds, bad arguments."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from maml_fast.models import ACTIVATIONS, sinusoid_mlp
from maml_fast.tasks import Episodes, SinusoidTasks


def test_an_episode_has_the_shapes_that_maml_takes():
    episodes = SinusoidTasks(seed=1).sample(tasks=3, shots=4, query_shots=5)
    assert isinstance(episodes, Episodes)
    support_x, support_y, query_x, query_y = episodes
    assert support_x.shape == support_y.shape == (3, 4, 1)
    assert query_x.shape == query_y.shape == (3, 5, 1)
    assert {tensor.dtype for tensor in episodes} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in episodes)


def test_targets_are_amplitude_times_sine_of_x_minus_phase():
    sampler = SinusoidTasks(seed=2, dtype=torch.float64)
    waves = sampler.waves(7)
    support_x, support_y, query_x, query_y = sampler.episodes(waves, shots=3, query_shots=4)
    for task in range(7):
        amplitude, phase = waves.amplitude[task].item(), waves.phase[task].item()
        for x, y in ((support_x, support_y), (query_x, query_y)):
            wanted = [amplitude * math.sin(value - phase) for value in x[task, :, 0].tolist()]
            assert y[task, :, 0].tolist() == pytest.approx(wanted, rel=1e-14, abs=1e-14)


def test_sample_is_waves_and_then_their_episodes():
    sampler = SinusoidTasks(seed=3)
    in_two_steps = sampler.episodes(sampler.waves(4), shots=2, query_shots=3)
    for one, two in zip(SinusoidTasks(seed=3).sample(4, 2, 3), in_two_steps, strict=True):
        assert torch.equal(one, two)


def test_the_distribution_is_the_papers():
    count = 40_000
    sampler = SinusoidTasks(seed=4, dtype=torch.float64)
    waves = sampler.waves(count)
    episodes = sampler.episodes(waves, shots=1, query_shots=1)
    drawn = [
        (0.1, 5.0, waves.amplitude),
        (0.0, math.pi, waves.phase),
        (-5.0, 5.0, episodes.support_x),
        (-5.0, 5.0, episodes.query_x),
    ]
    for low, high, values in drawn:
        width = high - low
        assert low <= values.min() < low + 0.001 * width
        assert high - 0.001 * width < values.max() <= high
        # Five standard errors of a uniform distribution's mean and variance.
        assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * count)
        assert abs(values.var() - width**2 / 12) < 5 * width**2 / math.sqrt(180 * count)
    columns = torch.cat([values.reshape(1, -1) for _, _, values in drawn])
    off_diagonal = torch.corrcoef(columns) - torch.eye(len(columns), dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / math.sqrt(count)  # drawn independently


def test_ranges_are_settable():
    sampler = SinusoidTasks(seed=5, amplitude=(2.0, 2.0), phase=(0.5, 0.6), x_range=(1.0, 1.5))
    waves = sampler.waves(100)
    x = sampler.episodes(waves, shots=10).support_x
    assert torch.equal(waves.amplitude, torch.full((100, 1, 1), 2.0))
    assert 0.5 <= waves.phase.min() < waves.phase.max() <= 0.6
    assert 1.0 <= x.min() < x.max() <= 1.5


def test_a_seed_fixes_every_bit_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = SinusoidTasks(seed=6), SinusoidTasks(seed=6)
    other = SinusoidTasks(seed=7)
    for _ in range(3):
        a, b, c = one.sample(5), two.sample(5), other.sample(5)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_stream_goes_on_with_the_same_bits():
    sampler = SinusoidTasks(seed=8)
    sampler.sample(3)
    state = sampler.state_dict()
    wanted = [sampler.sample(3), sampler.sample(2, 7, 1)]
    restored = SinusoidTasks(seed=99)
    restored.load_state_dict(state)
    for episodes, found in zip(wanted, [restored.sample(3), restored.sample(2, 7, 1)], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(episodes, found, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tasks_are_drawn_on_the_device():
    sampler = SinusoidTasks(seed=9, device="cuda")
    state = sampler.state_dict()
    episodes = sampler.sample(tasks=4)
    assert {tensor.device.type for tensor in episodes} == {"cuda"}
    sampler.load_state_dict(state)
    assert all(torch.equal(x, y) for x, y in zip(episodes, sampler.sample(tasks=4), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (5.0, 0.1)}, r"amplitude is \(5.0, 0.1\); wanted are two finite numbers"),
        ({"phase": (0.0, math.inf)}, "phase is"),
        ({"x_range": (1.0,)}, "x_range is"),
        ({"x_range": "wide"}, "x_range is 'wide'"),
        ({"seed": -1}, "seed is -1; wanted is a whole number of at least 0"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        SinusoidTasks(**options)


@pytest.mark.parametrize("name", ["tasks", "shots", "query_shots"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_a_bad_size_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; wanted is a whole number"):
        SinusoidTasks().sample(**{name: value})


def test_an_integer_dtype_is_refused():
    with pytest.raises(TypeError, match=r"dtype is torch.int64"):
        SinusoidTasks(dtype=torch.int64)


def test_a_foreign_state_is_refused():
    sampler = SinusoidTasks(seed=1)
    with pytest.raises(ValueError, match=r"keys \['seed'\]; wanted is \['generator'\]"):
        sampler.load_state_dict({"seed": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"state\['generator'\] is torch.uint8 \[16\]"):
        sampler.load_state_dict({"generator": torch.zeros(16, dtype=torch.uint8)})
    before = sampler.state_dict()["generator"]
    damaged = before.clone()
    damaged[9] = 255
    with pytest.raises(ValueError, match="is no state of a generator: Invalid mt19937 state"):
        sampler.load_state_dict({"generator": damaged})
    assert torch.equal(sampler.state_dict()["generator"], before)


def test_the_network_is_the_papers():
    model = sinusoid_mlp()
    layers = [(type(layer), getattr(layer, "weight", torch.empty(0)).shape) for layer in model]
    assert layers == [
        (nn.Linear, (40, 1)),
        (nn.ReLU, (0,)),
        (nn.Linear, (40, 40)),
        (nn.ReLU, (0,)),
        (nn.Linear, (1, 40)),
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 1761


def test_initial_weights_are_truncated_normal_and_biases_zero():
    model = sinusoid_mlp(hidden=(400, 400), seed=1, dtype=torch.float64)
    weights = model[2].weight.detach()
    # Cut off at two standard deviations, a normal distribution keeps 0.8796 of its own.
    assert weights.std().item() == pytest.approx(0.01 * 0.87962566, rel=0.01)
    assert weights.mean().abs() < 5 * 0.0088 / 400
    assert 0.0199 < weights.abs().max() <= 0.02
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.abs().max() <= (0 if name.endswith("bias") else 0.02)


def test_a_models_seed_fixes_its_bits_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (list(sinusoid_mlp(seed=seed).parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_sizes_and_activation_are_settable(activation):
    model = sinusoid_mlp(hidden=(8, 6, 4), activation=activation)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [8, 6, 4, 1]
    assert all(a.out_features == b.in_features for a, b in pairwise(linear))
    assert [type(layer) for layer in model][1::2] == [ACTIVATIONS[activation]] * 3
    assert model(torch.zeros(2, 5, 1)).shape == (2, 5, 1)


def test_bad_networks_are_refused():
    with pytest.raises(ValueError, match=r"hidden is \(40, 0\)"):
        sinusoid_mlp(hidden=(40, 0))
    with pytest.raises(ValueError, match="activation is 'swish'; wanted is one of"):
        sinusoid_mlp(activation="swish")
