"""Inner learning rates: numbers, tensors and mappings; and the gradients of those that learn."""

import itertools

import pytest
import torch
from torch import nn

from maml_fast import MAML, check
from maml_fast.rates import InnerRates
from tests.engines import FORMS, tried
from tests.networks import assert_close, by_graph, gradients

SIZES, STEPS = (3, 5, 4, 2), 3
BACKENDS = tried(FORMS)
double = {"dtype": torch.float64}


@pytest.fixture(params=BACKENDS, ids=["-".join(b) for b in BACKENDS])
def options(request):
    return dict(backend=request.param[0], fast_weights=request.param[1], inner_steps=STEPS)


@pytest.fixture
def model(draw):
    return draw.mlp(SIZES)


@pytest.fixture
def batch(draw):
    return draw.batch("mse", 3, 4, 5, SIZES)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_mapping_of_every_kind(options, first_order, model, batch):
    names = [name for name, _ in model.named_parameters()]
    kinds = [
        0.2,
        nn.Parameter(torch.tensor(0.15, **double)),
        nn.Parameter(torch.tensor([0.1, 0.2, 0.3], **double)),
        torch.tensor(0.25, **double),
        torch.tensor([0.3, 0.1, 0.2], **double),
        nn.Parameter(torch.tensor([0.05, 0.0, 0.1], **double)),
    ]
    rates = dict(zip(names, kinds, strict=True))
    maml = MAML(model, inner_lr=rates, first_order=first_order, **options)
    loss, wanted = by_graph(model, batch, "mse", rates, STEPS, first_order)
    out = maml(*batch)
    torch.testing.assert_close(out.loss.detach(), loss)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {
        f"rate of {name}": rate.grad
        for name, rate in rates.items()
        if isinstance(rate, nn.Parameter)
    }
    assert_close(found, wanted, 1e-10)


@pytest.mark.parametrize("shape", [(), (STEPS,)])
def test_one_rate_for_all(options, shape, model, batch):
    rate = nn.Parameter(torch.full(shape, 0.2, **double))
    maml = MAML(model, inner_lr=rate, **options)
    by_name = {name: rate for name, _ in model.named_parameters()}
    wanted = by_graph(model, batch, "mse", by_name, STEPS)[1]
    gradients(maml, batch)
    assert rate.grad.shape == shape
    # the plain loop gives the one tensor's gradient under every name
    torch.testing.assert_close(rate.grad, wanted["rate of 0.weight"], rtol=1e-10, atol=0)


def test_one_parameter_under_several_names(options, model, batch):
    weight, bias = (nn.Parameter(torch.tensor(r, **double)) for r in (0.2, 0.1))
    rates = {name: weight if "weight" in name else bias for name, _ in model.named_parameters()}
    maml = MAML(model, inner_lr=rates, **options)
    wanted = by_graph(model, batch, "mse", rates, STEPS)[1]
    gradients(maml, batch)
    torch.testing.assert_close(weight.grad, wanted["rate of 0.weight"], rtol=1e-10, atol=0)
    torch.testing.assert_close(bias.grad, wanted["rate of 0.bias"], rtol=1e-10, atol=0)
    assert len(list(maml.parameters())) == len(list(model.parameters())) + 2


def test_frozen_parameters_beside_learned_rates(options, model, batch):
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    rate = nn.Parameter(torch.tensor(0.2, **double))
    adapting = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = by_graph(model, batch, "mse", dict.fromkeys(adapting, rate), STEPS)[1]
    maml = MAML(model, inner_lr=rate, **options)
    found = gradients(maml, batch)
    assert_close(found, {name: g for name, g in wanted.items() if "rate" not in name}, 1e-10)
    torch.testing.assert_close(rate.grad, wanted["rate of 0.bias"], rtol=1e-10, atol=0)
    assert model[0].weight.grad is None


def test_a_frozen_model_depends_on_no_rate(options, model, batch):
    model.requires_grad_(False)
    maml = MAML(model, inner_lr=nn.Parameter(torch.tensor(0.2, **double)), **options)
    assert not maml(*batch).loss.requires_grad


def test_rates_of_zero_move_nothing(options, model, batch):
    out = MAML(model, inner_lr=0.0, **options)(*batch)
    still = MAML(model, backend=options["backend"], inner_steps=0)(*batch)
    torch.testing.assert_close(out.task_losses, still.task_losses)


def test_rates_move_and_are_saved_with_the_module(model):
    rates = {name: 0.1 for name, _ in model.named_parameters()}
    rates["0.weight"] = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    rates["0.bias"] = torch.tensor(0.4)
    maml = MAML(model, inner_lr=rates, inner_steps=3)
    state = maml.state_dict()
    assert torch.equal(state["rates.0/weight/lr"], torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(state["rates.0/bias/lr"], torch.tensor(0.4))
    assert "rates.0/weight/lr" in dict(maml.named_parameters())
    assert maml.inner_lr["2.bias"] == 0.1
    maml.double()
    assert maml.inner_lr["0.weight"] is rates["0.weight"]
    assert maml.inner_lr["0.weight"].dtype == torch.float64
    other = MAML(model, inner_lr=nn.Parameter(torch.zeros(3)), inner_steps=3)
    other.load_state_dict({**other.state_dict(), "rates.lr": torch.ones(3)})
    assert torch.equal(other.inner_lr, torch.ones(3))


def test_a_rate_that_comes_from_other_tensors(model, batch):
    """Positive by construction: the gradient goes on into what the rate was made from."""
    raw = torch.tensor(-1.5, **double, requires_grad=True)
    MAML(model, inner_lr=nn.functional.softplus(raw))(*batch).loss.backward()
    step = 1e-6
    losses = [
        MAML(model, inner_lr=nn.functional.softplus(raw.detach() + s))(*batch).loss.item()
        for s in (step, -step)
    ]
    assert raw.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_float32_rate_gradients(draw):
    model, batch = draw.mlp(SIZES).float(), draw.batch("mse", 6, 5, 5, SIZES)
    batch = [t.float() for t in batch[:4]]
    for backend, fast_weights in BACKENDS[1:]:
        rate = nn.Parameter(torch.full((STEPS,), 0.1))
        maml = MAML(model, "mse", rate, STEPS, backend=backend, fast_weights=fast_weights)
        report = check(maml, *batch)
        assert report.passed, str(report)
        assert sum(t.name.startswith("rates of ") for t in report.tensors) == 6


@pytest.mark.parametrize(
    ("rate", "error", "words"),
    [
        (float("nan"), ValueError, "inner_lr.*nan.*finite"),
        (float("inf"), ValueError, "inner_lr.*inf.*finite"),
        (torch.tensor([0.1, float("nan")]), ValueError, "inner_lr.*nan.*finite"),
        (torch.ones(2, 2), ValueError, r"inner_lr has shape \[2, 2\]"),
        (torch.ones(2, dtype=torch.int64), TypeError, "inner_lr.*int64"),
        ("0.1", TypeError, "inner_lr is str"),
        (True, TypeError, "inner_lr is bool"),
        (None, TypeError, "inner_lr is NoneType"),
        ({"0.weight": "fast"}, TypeError, r"inner_lr\['0.weight'\] is str"),
        ({"nonsense": 0.1}, ValueError, "nonsense.*does not have"),
    ],
)
def test_bad_rates(rate, error, words, model):
    with pytest.raises(error, match=words):
        MAML(model, inner_lr=rate)


def test_rates_that_do_not_fit_the_call(model, batch):
    maml = MAML(model, inner_lr=torch.tensor([0.1, 0.2]), inner_steps=3)
    with pytest.raises(ValueError, match="inner_lr has 2 rates.*inner_steps is 3"):
        maml(*batch)
    maml = MAML(model, inner_lr={"0.weight": 0.1})
    with pytest.raises(ValueError, match="inner_lr has no rate for.*0.bias"):
        maml(*batch)
    rate = nn.Parameter(torch.tensor(0.1))
    maml = MAML(model, inner_lr=rate)
    with torch.no_grad():
        rate.fill_(float("nan"))
    with pytest.raises(ValueError, match="inner_lr.*nan.*finite"):
        maml(*batch)


def test_a_rate_that_learns_for_a_parameter_that_does_not(options, model, batch):
    names = [name for name, _ in model.named_parameters()]
    rates = dict.fromkeys(names, 0.2) | {names[0]: nn.Parameter(torch.tensor(0.1, **double))}
    model.get_parameter(names[0]).requires_grad_(False)
    gradients(MAML(model, inner_lr=rates, **options), batch)
    assert rates[names[0]].grad.item() == 0


def test_one_rate_for_all_sums_in_one_order():
    """Whatever that of the names: it may come from a set, whose order each process chooses anew."""
    rates = InnerRates(nn.Parameter(torch.tensor(0.1)))
    # Added to 1 one by one the small ones vanish; together they do not.
    values = 1.0, 2**-24, 2**-24
    found = {name: torch.tensor([value]) for name, value in zip("abc", values, strict=True)}
    sums = [
        rates.gather({name: found[name] for name in order})[0].item()
        for order in itertools.permutations("abc")
    ]
    assert len(set(sums)) == 1
