"""The loss behaves as autograd's own would: accumulation, scaling, no_grad, freed buffers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from maml_fast import MAML
from tests.networks import assert_close, gradients

SIZES = (3, 5, 2)
BACKENDS = ["reference", "functional", "torch", "cpu"]


@pytest.fixture(params=BACKENDS)
def maml(request, draw):
    return MAML(draw.mlp(SIZES), inner_lr=0.1, inner_steps=2, backend=request.param)


@pytest.fixture
def batch(draw):
    return draw.batch("mse", 4, 3, 3, SIZES)


def test_gradients_accumulate(maml, batch):
    once = {name: g.clone() for name, g in gradients(maml, batch).items()}
    maml(*batch).loss.backward()
    twice = {name: p.grad for name, p in maml.model.named_parameters()}
    assert_close(twice, {name: 2 * g for name, g in once.items()}, 1e-14)


def test_a_scaled_loss_scales_the_gradients(maml, batch):
    once = {name: g.clone() for name, g in gradients(maml, batch).items()}
    maml.zero_grad()
    (3 * maml(*batch).loss + 1).backward()
    scaled = {name: p.grad for name, p in maml.model.named_parameters()}
    assert_close(scaled, {name: 3 * g for name, g in once.items()}, 1e-14)


def test_other_terms_join_the_graph(maml, batch):
    once = {name: g.clone() for name, g in gradients(maml, batch).items()}
    maml.zero_grad()
    penalty = sum(p.square().sum() for p in maml.model.parameters())
    (maml(*batch).loss + 0.5 * penalty).backward()
    for name, p in maml.model.named_parameters():
        torch.testing.assert_close(p.grad, once[name] + p.detach())


def test_autograd_grad(maml, batch):
    parameters = list(maml.model.parameters())
    found = torch.autograd.grad(maml(*batch).loss, parameters)
    names = [name for name, _ in maml.model.named_parameters()]
    assert_close(dict(zip(names, found, strict=True)), gradients(maml, batch), 1e-14)


def test_a_second_backward_is_refused(maml, batch):
    loss = maml(*batch).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_retained_graphs_go_back_twice(maml, batch):
    once = {name: g.clone() for name, g in gradients(maml, batch).items()}
    maml.zero_grad()
    loss = maml(*batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: p.grad for name, p in maml.model.named_parameters()}
    assert_close(twice, {name: 2 * g for name, g in once.items()}, 1e-14)


def test_differentiating_the_gradient_is_refused(maml, batch):
    parameter = next(maml.model.parameters())
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        torch.autograd.grad(maml(*batch).loss, [parameter], create_graph=True)


def test_no_grad_runs_no_adjoint(maml, batch, monkeypatch):
    out = maml(*batch)
    if maml.backend == "torch":
        monkeypatch.setattr("maml_fast.backends.planned.PlannedStepper.pull_back", None)
    if maml.backend == "functional":
        monkeypatch.setattr("maml_fast.backends.functional.FunctionalStepper.pull_back", None)
    if maml.backend == "cpu":
        monkeypatch.setattr("maml_fast.backends.cpu.FlatGradients", None)
    with torch.no_grad():
        bare = maml(*batch)
    with torch.inference_mode():
        inferred = maml(*(t.clone() for t in batch[:4]))  # inference tensors
    for silent in (bare, inferred):
        assert not silent.loss.requires_grad
        for name in ("loss", "task_losses", "support_losses", "query_outputs"):
            torch.testing.assert_close(getattr(silent, name), getattr(out, name).detach())


def test_only_the_loss_is_differentiable(maml, batch):
    out = maml(*batch)
    assert out.loss.requires_grad
    for name in ("task_losses", "support_losses", "query_outputs"):
        assert not getattr(out, name).requires_grad, name


def test_parameters_and_gradients_are_left_alone(maml, batch):
    before = copy.deepcopy(maml.model.state_dict())
    maml(*batch)
    assert all(p.grad is None for p in maml.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in maml.model.state_dict().items())


def test_an_optimiser_lowers_the_loss(maml, batch):
    optimiser = torch.optim.SGD(maml.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = maml(*batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_data_that_are_not_contiguous(maml, batch):
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch[:4]]
    assert not strided[0].is_contiguous()
    wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
    assert_close(gradients(maml, strided), wanted, 1e-12)


def test_autocast_changes_nothing(draw, batch):
    model = draw.mlp(SIZES).float()
    batch = [t.float() for t in batch[:4]]
    for backend in BACKENDS:
        maml = MAML(model, inner_lr=0.1, backend=backend)
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        maml.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maml(*batch).loss.backward()
        for name, p in maml.model.named_parameters():
            assert torch.equal(p.grad, wanted[name]), name


def test_copies_and_pickles(maml, batch):
    wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert_close(gradients(other, batch), wanted, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look
def test_it_runs_inside_a_compiled_function(maml, batch):
    maml(*batch)  # plan outside

    @torch.compile(backend="eager")
    def training_loss(*batch):
        return 2 * maml(*batch).loss

    wanted = {name: 2 * g for name, g in gradients(maml, batch).items()}
    maml.zero_grad()
    training_loss(*batch).backward()
    assert_close({name: p.grad for name, p in maml.model.named_parameters()}, wanted, 1e-14)


def test_a_loader_feeds_it(draw, batch):
    data = torch.utils.data.TensorDataset(*batch[:4])
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    maml = MAML(draw.mlp(SIZES), inner_lr=0.1)
    losses = [maml(*part).task_losses for part in loader]
    torch.testing.assert_close(torch.cat(losses), maml(*batch).task_losses)


def test_value_and_grad(maml, batch):
    """The same numbers without a graph, by the names of the module's parameters."""
    wanted = {f"model.{name}": g for name, g in gradients(maml, batch).items()}
    loss = maml(*batch).loss
    maml.zero_grad()
    out, found = maml.value_and_grad(*batch)
    assert torch.equal(out.loss, loss.detach())
    assert not out.loss.requires_grad
    assert_close(found, wanted, 1e-15)
    assert all(p.grad is None for p in maml.parameters())
    assert set(found) <= {name for name, _ in maml.named_parameters()}


def test_value_and_grad_of_rates(draw, batch):
    rate = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64))
    for backend in BACKENDS:
        maml = MAML(draw.mlp(SIZES), "mse", rate, 2, backend=backend, reduction="sum")
        gradients(maml, batch)
        _, found = maml.value_and_grad(*batch)
        torch.testing.assert_close(found["rates.lr"], rate.grad)
        rate.grad = None
        assert len(found) == 5


def test_gradients_can_be_zeroed_in_place_and_clipped(maml, batch):
    """They may be parts of one tensor; every use of them works all the same."""
    wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
    maml.zero_grad(set_to_none=False)
    maml(*batch).loss.backward()
    assert_close({n: p.grad for n, p in maml.model.named_parameters()}, wanted, 1e-15)
    nn.utils.clip_grad_norm_(maml.parameters(), 0.01)
    norm = torch.stack([p.grad.norm() for p in maml.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    torch.optim.Adam(maml.parameters()).step()
