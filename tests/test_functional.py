"""Backend functional: what it runs, what it refuses with advice, and that it keeps no graph."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maml_fast import MAML, UnsupportedModelError
from tests.networks import assert_close, by_graph, gradients

SIZES = (3, 4, 2)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        z = self.linear(x)
        self.last.add_(z.mean(0))
        return z


class Item(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) * self.linear.weight.norm().item()


class Conditional(Item):
    def forward(self, x):
        z = self.linear(x)
        return z if z.sum() > 0 else 2 * z


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), r"model.eval\(\) or set p=0"),
        (InPlace, "replace the in-place operation"),
        (Item, r"no .item\(\)"),
        (Conditional, "torch.where"),
    ],
)
def test_what_vmap_cannot_run_gets_advice(make, advice, draw):
    model, batch = draw.initialise(make().double()), draw.batch("mse", 3, 4, 4, (3, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for backend in ("functional", "auto"):
        with pytest.raises(UnsupportedModelError, match=advice) as caught:
            MAML(model, inner_steps=2, backend=backend)(*batch)
        assert "backend='reference'" in str(caught.value)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_reference_runs_them_and_leaves_running_statistics_alone(draw):
    model = draw.initialise(nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)).double())
    batch = draw.batch("mse", 3, 4, 4, (3, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradients(MAML(model, inner_lr=0.1, backend="reference"), batch)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    plain = nn.Sequential(
        nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2, track_running_stats=False)
    ).double()
    plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
    assert_close(found, by_graph(plain, batch, "mse", 0.1, 1)[1], 1e-10)


def test_attention(draw):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))

    model = draw.initialise(Attend().double())
    batch = draw.batch("mse", 2, 3, 3, (4, 2))
    batch = batch._replace(support_x=draw.normal(2, 3, 5, 4), query_x=draw.normal(2, 3, 5, 4))
    maml = MAML(model, inner_lr=0.1, inner_steps=2)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = by_graph(model, batch, "mse", 0.1, 2)[1]
        # keys' biases move no attention: their gradient is rounding
        query_key_value = wanted.pop("attend.in_proj_bias")
        found = gradients(maml, batch)
        found_bias = found.pop("attend.in_proj_bias")
    assert_close(found, wanted, 1e-9)
    torch.testing.assert_close(found_bias, query_key_value, rtol=1e-9, atol=1e-15)


def test_fused_attention(draw):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            x = self.project(x)
            return nn.functional.scaled_dot_product_attention(x, x, x).mean(1)

    model, batch = draw.initialise(Attend().double()), draw.batch("mse", 2, 3, 3, (4, 4))
    batch = batch._replace(support_x=draw.normal(2, 3, 5, 4), query_x=draw.normal(2, 3, 5, 4))
    maml = MAML(model, backend="functional")
    with sdpa_kernel(SDPBackend.MATH):
        wanted = by_graph(model, batch, "mse", 0.01, 1)[1]
        assert_close(gradients(maml, batch), wanted, 1e-9)
    assert_close(gradients(maml, batch), wanted, 1e-9)


def test_token_inputs(draw):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    draw.initialise(model)
    batch = draw.batch("mse", 2, 3, 3, (4, 2))
    tokens = [draw.classes(2, 3, 3, classes=10) for _ in range(2)]
    batch = batch._replace(support_x=tokens[0], query_x=tokens[1])
    wanted = by_graph(model, batch, "mse", 0.1, 2)[1]
    for backend in ("reference", "functional", "auto"):
        maml = MAML(model, inner_lr=0.1, inner_steps=2, backend=backend)
        assert_close(gradients(maml, batch), wanted, 1e-9)


def test_memory_grows_by_parameters_not_by_graphs(draw):
    """What is alive after S inner steps: S copies of the parameters, and no autograd graph."""
    from maml_fast.backends.functional import FunctionalStepper
    from maml_fast.problem import Problem, RateTable

    model, steps = draw.mlp(SIZES), 6
    named = {name: p.detach() for name, p in model.named_parameters()}
    rates = RateTable(dict.fromkeys(named, (0.1,) * steps))
    problem = Problem(model, named, "mse", steps, False, rates)
    stepper = FunctionalStepper(problem, draw.batch("mse", 5, 3, 3, SIZES))
    fast = stepper.start()
    for step in range(steps):
        _, fast, trace = stepper.inner_step(fast, step)
        kept = trace.theta
        assert set(kept) == set(named)
        assert not any(tensor.requires_grad for tensor in kept.values())
        if step:
            assert all(kept[name].shape == (5, *named[name].shape) for name in named)
