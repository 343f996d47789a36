"""`adapt`: adapted parameters and predictions, by every backend."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from maml_fast import MAML
from tests.engines import FORMS, tried
from tests.networks import ORACLES

SIZES, T = (3, 5, 2), 4
BACKENDS = tried(FORMS)


@pytest.fixture(params=BACKENDS, ids=["-".join(b) for b in BACKENDS])
def options(request):
    return dict(backend=request.param[0], fast_weights=request.param[1])


def by_hand(model, x, y, rate, steps):
    """Adapted parameters of one task, by plain gradient descent."""
    fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for _ in range(steps):
        loss = ORACLES["mse"](functional_call(model, fast, (x,)), y)
        found = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: (p - rate * g).detach().requires_grad_()
            for (name, p), g in zip(fast.items(), found, strict=True)
        }
    return fast


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_adapted_models(options, steps, bias, draw):
    model, batch = draw.mlp(SIZES, bias=bias), draw.batch("mse", T, 4, 6, SIZES)
    maml = MAML(model, inner_lr=0.2, inner_steps=1, **options)
    adapted = maml.adapt(batch.support_x, batch.support_y, inner_steps=steps)
    parameters, predicted = adapted.parameters(), adapted(batch.query_x)
    again = adapted(draw.normal(T, 2, 3))
    assert again.shape == (T, 2, 2)
    assert set(parameters) == {name for name, _ in model.named_parameters()}
    assert adapted.support_losses.shape == (T, steps)
    for task in range(T):
        wanted = by_hand(model, batch.support_x[task], batch.support_y[task], 0.2, steps)
        for name, tensor in wanted.items():
            torch.testing.assert_close(parameters[name][task], tensor.detach(), rtol=1e-10, atol=0)
        prediction = functional_call(model, wanted, (batch.query_x[task],))
        torch.testing.assert_close(predicted[task], prediction.detach(), rtol=1e-10, atol=1e-14)
    assert not predicted.requires_grad
    assert all(not p.requires_grad for p in parameters.values())


def test_it_is_the_meta_steps_inner_loop(options, draw):
    model, batch = draw.mlp(SIZES), draw.batch("mse", T, 4, 6, SIZES)
    maml = MAML(model, inner_lr=torch.tensor([0.2, 0.1]), inner_steps=2, **options)
    out, adapted = maml(*batch), maml.adapt(batch.support_x, batch.support_y)
    torch.testing.assert_close(adapted(batch.query_x), out.query_outputs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(adapted.support_losses, out.support_losses, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="inner_lr has 2 rates.*inner_steps is 5"):
        maml.adapt(batch.support_x, batch.support_y, inner_steps=5)


def test_frozen_parameters_stay(options, draw):
    model, batch = draw.mlp(SIZES), draw.batch("mse", T, 4, 6, SIZES)
    model[0].requires_grad_(False)
    adapted = MAML(model, inner_lr=0.2, **options).adapt(batch.support_x, batch.support_y)
    parameters = adapted.parameters()
    for name in ("0.weight", "0.bias"):
        wanted = model.get_parameter(name)
        torch.testing.assert_close(parameters[name], wanted.detach().expand(T, *wanted.shape))
    assert not torch.equal(parameters["2.weight"][0], model[2].weight)


def test_parameters_predict_by_torch(options, draw):
    """Users take the parameters elsewhere: vmap over them gives the same predictions."""
    model, batch = draw.mlp(SIZES, nn.GELU), draw.batch("mse", T, 4, 6, SIZES)
    adapted = MAML(model, inner_lr=0.2, inner_steps=3, **options).adapt(*batch[:2])
    call = torch.vmap(lambda p, x: functional_call(model, p, (x,)))
    torch.testing.assert_close(
        call(adapted.parameters(), batch.query_x), adapted(batch.query_x), rtol=1e-11, atol=1e-13
    )
