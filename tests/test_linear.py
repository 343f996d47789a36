"""The forms of a linear layer's fast weights: each rule against torch.func on F.linear."""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from maml_fast.fast_weights import (
    DenseLinear,
    FactoredInput,
    FactoredLinear,
    LinearSpec,
    SharedLinear,
)
from maml_fast.ops import Linear

T, N, M, IN, OUT, S = 3, 4, 5, 6, 7, 3
WEIGHT_RATES, BIAS_RATES = (0.3, 0.2, 0.1), (0.05, 0.4, 0.25)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def spec_of(draw, bias=True, learns=False):
    return LinearSpec(
        Linear("weight", "bias" if bias else None, IN, OUT),
        draw.normal(OUT, IN),
        draw.normal(OUT) if bias else None,
        WEIGHT_RATES,
        BIAS_RATES if bias else None,
        learns,
        T,
        S,
    )


class Story:
    """A made-up meta-step of one layer: its inputs and cotangents, and the dense truth."""

    def __init__(self, draw, form, bias):
        self.spec = spec_of(draw, bias)
        constant = form is FactoredInput
        x = draw.normal(T, N, IN)
        self.x = [x if constant else draw.normal(T, N, IN) for _ in range(S)]
        self.xq = draw.normal(T, M, IN)
        self.dy = [draw.normal(T, N, OUT) for _ in range(S)]
        self.dq = draw.normal(T, M, OUT)
        self.t_x = [None if constant else draw.normal(T, N, IN) for _ in range(S)]
        self.t_dy = [draw.normal(T, N, OUT) for _ in range(S)]
        if form is DenseLinear:
            self.stage = DenseLinear(self.spec)
        elif form is FactoredInput:
            self.stage = FactoredInput(self.spec, x, self.xq, second_order=True)
        else:
            self.stage = FactoredLinear(self.spec, N, M, second_order=True)
        # the truth, formed: W_k, b_k of every step
        zero = torch.zeros(OUT, dtype=torch.float64)
        self.w = [self.spec.weight.repeat(T, 1, 1)]
        self.b = [(self.spec.bias if bias else zero).repeat(T, 1)]
        for k in range(S):
            self.w.append(self.w[k] - WEIGHT_RATES[k] * self.dy[k].mT @ self.x[k])
            self.b.append(self.b[k] - (BIAS_RATES[k] * self.dy[k].sum(1) if bias else 0))

    def linear(self, k):
        """x, weight, bias -> z for all tasks"""
        return lambda x: vmap(self.spec.op.oracle)(x, self.w[k], self.b[k])


FORMS = [DenseLinear, FactoredLinear, FactoredInput]


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def test_inner_loop(form, bias, draw):
    story = Story(draw, form, bias)
    stage = story.stage
    for k in range(S):
        z, saved = stage.forward(k, story.x[k])
        close(z, story.linear(k)(story.x[k]))
        if form is not FactoredInput:
            wanted = vjp(story.linear(k), story.x[k])[1](story.dy[k])[0]
            close(stage.backward(k, saved, story.dy[k]), wanted)
        stage.descend(k, saved, story.dy[k])
    close(stage.forward(S, story.xq)[0], story.linear(S)(story.xq))
    other = draw.normal(T, 2, IN)
    close(stage.forward(S, other)[0], story.linear(S)(other))
    for k in range(S + 1):
        weight, b = stage.weights(k)
        close(weight, story.w[k])
        assert (b is None) == (not bias)
        if bias:
            close(b, story.b[k])


def test_adjoint(form, bias, draw):
    """Tangents in the direction eta_k * Lam, and Lam itself, against jvp of the dense layer."""
    story = Story(draw, form, bias)
    stage = story.stage
    for k in range(S):
        _, saved = stage.forward(k, story.x[k])
        stage.descend(k, saved, story.dy[k])
    _, saved = stage.forward(S, story.xq)
    stage.begin_adjoint(saved, story.dq)
    lam, lam_b = story.dq.mT @ story.xq, story.dq.sum(1) * bias
    rates = torch.zeros(2, S, dtype=torch.float64)
    for k in reversed(range(S)):
        x, dy, t_x, t_dy = story.x[k], story.dy[k], story.t_x[k], story.t_dy[k]
        t_x_or_0 = torch.zeros_like(x) if t_x is None else t_x
        stage.add_rate_gradients(k, x, dy)
        rates[0, k] = -(dy.mT @ x * lam).sum()
        rates[1, k] = -(dy.sum(1) * lam_b).sum()
        direction = (WEIGHT_RATES[k] * lam, BIAS_RATES[k] * lam_b)

        def forward(x, w, b):
            return vmap(story.spec.op.oracle)(x, w, b)

        point = (x, story.w[k], story.b[k])
        wanted = jvp(forward, point, (t_x_or_0, *direction))[1]
        close(stage.tangent(k, x, dy, t_x), wanted)

        def backward(x, w, b, dy):
            return vjp(forward, x, w, b)[1](dy)

        t_dx, t_dw, t_db = jvp(backward, (*point, dy), (t_x_or_0, *direction, t_dy))[1]
        if form is not FactoredInput:
            close(stage.tangent_backward(k, x, dy, t_x, t_dy), t_dx)
        stage.pull_back(k, x, dy, t_x, t_dy)
        lam, lam_b = lam - t_dw, lam_b - t_db * bias
    weight, b = stage.gradient_sums()
    close(weight, lam.sum(0))
    close(stage.rate_gradients[0], rates[0])
    if bias:
        close(b, lam_b.sum(0))
        close(stage.rate_gradients[1], rates[1])


def test_shared(draw):
    spec = spec_of(draw)
    stage = SharedLinear(spec)
    x, dy = draw.normal(T, N, IN), draw.normal(T, N, OUT)
    t_x, t_dy = draw.normal(T, N, IN), draw.normal(T, N, OUT)

    def forward(x):
        return spec.op.oracle(x, spec.weight, spec.bias)

    close(stage.forward(0, x)[0], forward(x))
    close(stage.backward(0, x, dy), vjp(forward, x)[1](dy)[0])
    close(stage.tangent(0, x, dy, t_x), jvp(forward, (x,), (t_x,))[1])
    assert stage.tangent(0, x, dy, None) is None
    wanted = grad(lambda x: (forward(x) * t_dy).sum())(x)
    close(stage.tangent_backward(0, x, dy, t_x, t_dy), wanted)
