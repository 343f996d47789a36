"""Every operation with parameters in a made-up meta-step: its rules, fast weights and adjoint,
against torch.func on its oracle. Adding an operation edits no test; forms of linear layers beside
the dense one are in test_linear.py."""

import pytest
import torch
from torch.func import jvp, vjp, vmap

from maml_fast.fast_weights import LayerSpec, LinearSpec, dense_stage, shared_stage
from maml_fast.ops import WEIGHTED, Linear

T, N, M, S = 2, 3, 4, 3
RATES = (0.3, 0.2, 0.1), (0.05, 0.4, 0.25)
EXAMPLES = [
    pytest.param(op, features, id=f"{op}-{features}-{op.weight}-{op.bias}-{i}")
    for kind in WEIGHTED
    for i, (op, features) in enumerate(kind.examples())
]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


class Story:
    """Inputs, cotangents and tangents of all steps, and the parameters formed by torch.func."""

    def __init__(self, op, features, moves, draw):
        self.op, self.names = op, [n for n in ("weight", "bias") if getattr(op, n) is not None]
        out = op.out_features(features)
        shapes = dict(zip(("weight", "bias"), op.shapes, strict=True))
        self.shared = {name: draw.normal(*shapes[name]) for name in self.names}
        self.rates = {
            n: rates for n, rates in zip(("weight", "bias"), RATES, strict=True) if n in moves
        }
        self.x = [draw.normal(T, N, *features) for _ in range(S)] + [draw.normal(T, M, *features)]
        self.dy = [draw.normal(T, N, *out) for _ in range(S)] + [draw.normal(T, M, *out)]
        self.t_x = [draw.normal(T, N, *features) for _ in range(S)]
        self.t_dy = [draw.normal(T, N, *out) for _ in range(S)]
        kind = LinearSpec if isinstance(op, Linear) else LayerSpec
        self.spec = kind(
            op,
            self.shared.get("weight"),
            self.shared.get("bias"),
            self.rates.get("weight"),
            self.rates.get("bias"),
            True,
            T,
            S,
        )
        self.formed = [{n: p.repeat(T, *(1 for _ in p.shape)) for n, p in self.shared.items()}]
        for k in range(S):
            found = self.pull(k)
            self.formed.append(
                {
                    name: p - self.rates[name][k] * found[name] if name in self.rates else p
                    for name, p in self.formed[k].items()
                }
            )

    def apply(self, x, parameters):
        def one(x, parameters):
            return self.op.oracle(x, parameters.get("weight"), parameters.get("bias"))

        return vmap(one)(x, parameters)

    def pull(self, k):
        """g_k of each task"""
        return vjp(self.apply, self.x[k], self.formed[k])[1](self.dy[k])[1]


def moving(op):
    """The parameters that may adapt: all, or one of two."""
    names = [n for n in ("weight", "bias") if getattr(op, n) is not None]
    return [names, *([name] for name in names if len(names) > 1)] if names else []


@pytest.mark.parametrize("constant", [False, True], ids=["", "on the data"])
@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_a_meta_step(op, features, constant, draw):
    for moves in moving(op):
        follow(Story(op, features, moves, draw), moves, constant)


def follow(story, moves, constant):
    stage = dense_stage(story.spec)
    saved = []
    for k in range(S + 1):
        z, kept = stage.forward(k, story.x[k])
        saved.append(kept)
        close(z, story.apply(story.x[k], story.formed[k]))
        dx = vjp(lambda x, k=k: story.apply(x, story.formed[k]), story.x[k])[1](story.dy[k])[0]
        close(stage.backward(k, kept, story.dy[k]), dx)
        if k < S:
            stage.descend(k, kept, story.dy[k])
        for name, formed in zip(("weight", "bias"), stage.weights(k), strict=True):
            assert (formed is None) == (name not in story.names)
            if formed is not None:
                close(formed, story.formed[k][name])
    stage.begin_adjoint(saved[S], story.dy[S])
    lam = {name: g for name, g in story.pull(S).items() if name in moves}
    rates = torch.zeros(2, S, dtype=torch.float64)
    for k in reversed(range(S)):
        x, dy, t_dy = story.x[k], story.dy[k], story.t_dy[k]
        t_x = None if constant else story.t_x[k]
        stage.add_rate_gradients(k, saved[k], dy)
        stage.turn(k)
        found = story.pull(k)
        for name in moves:
            rates[("weight", "bias").index(name), k] = -(found[name] * lam[name]).sum()
        zeros = {n: torch.zeros_like(p) for n, p in story.formed[k].items()}
        direction = {n: story.rates[n][k] * lam[n] if n in lam else zeros[n] for n in zeros}
        t_x_or_0 = torch.zeros_like(x) if t_x is None else t_x
        point, along = (x, story.formed[k]), (t_x_or_0, direction)
        close(stage.tangent(k, saved[k], dy, t_x), jvp(story.apply, point, along)[1])

        def backward(x, parameters, dy):
            return vjp(story.apply, x, parameters)[1](dy)

        t_dx, t_g = jvp(backward, (*point, dy), (*along, t_dy))[1]
        close(stage.tangent_backward(k, saved[k], dy, t_x, t_dy), t_dx)
        stage.pull_back(k, saved[k], dy, t_x, t_dy)
        lam = {name: value - t_g[name] for name, value in lam.items()}
    for i, (name, found) in enumerate(zip(("weight", "bias"), stage.gradient_sums(), strict=True)):
        if name in moves:
            close(found, lam[name].sum(0))
            close(stage.rate_gradients[i], rates[i])


@pytest.mark.parametrize(("op", "features"), EXAMPLES)
def test_frozen(op, features, draw):
    story = Story(op, features, (), draw)
    stage = shared_stage(story.spec)
    x, dy, t_x, t_dy = story.x[0], story.dy[0], story.t_x[0], story.t_dy[0]

    def forward(x):
        return story.apply(x, story.formed[0])

    def backward(x, dy):
        return vjp(forward, x)[1](dy)[0]

    y, saved = stage.forward(0, x)
    close(y, forward(x))
    close(stage.backward(0, saved, dy), backward(x, dy))
    close(stage.tangent(0, saved, dy, t_x), jvp(forward, (x,), (t_x,))[1])
    assert stage.tangent(0, saved, dy, None) is None
    wanted = jvp(backward, (x, dy), (t_x, t_dy))[1]
    close(stage.tangent_backward(0, saved, dy, t_x, t_dy), wanted)
    wanted = jvp(backward, (x, dy), (torch.zeros_like(x), t_dy))[1]
    close(stage.tangent_backward(0, saved, dy, None, t_dy), wanted)
