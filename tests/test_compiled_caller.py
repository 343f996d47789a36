"""`MAML` inside torch.compile: one operation, which runs what it runs elsewhere."""

import copy

import pytest
import torch
from torch import nn

from maml_fast import MAML
from maml_fast.problem import TaskBatch
from tests.networks import assert_close, gradients

SIZES = (3, 6, 2)
# The compilers in Python: what torch.compile makes of the rest is not what is tested.
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", "torch", "reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def case(backend, draw):
    single = backend == "triton"
    on = "cuda" if single and torch.cuda.is_available() else "cpu"
    model = draw.mlp(SIZES)
    batch = draw.batch("cross_entropy", 3, 4, 5, SIZES)
    if single:
        model = model.float()
        batch = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch[:4]))
    rate = nn.Parameter(torch.tensor(0.2))
    maml = MAML(model, "cross_entropy", rate, 2, backend=backend).to(on)
    return maml, TaskBatch(*(t.to(on) for t in batch[:4]))


@pytest.mark.parametrize("compiler", BACKENDS)
def test_the_same_gradients_without_a_break(case, compiler):
    maml, batch = case
    wanted = {n: g.clone() for n, g in gradients(maml, batch).items()}
    wanted_rate = maml.inner_lr.grad.clone()

    @torch.compile(fullgraph=True, backend=compiler)
    def scaled(*batch):
        out = maml(*batch)
        return out.loss * 3, out.query_outputs.argmax(-1), out.task_losses

    maml.zero_grad()
    loss, _, task_losses = scaled(*batch)
    assert not task_losses.requires_grad
    loss.backward()
    found = {n: p.grad / 3 for n, p in maml.model.named_parameters()}
    assert_close(found, wanted, 1e-6)
    assert maml.inner_lr.grad.item() == pytest.approx(3 * wanted_rate.item(), rel=1e-5)
    assert loss.item() == pytest.approx(3 * maml(*batch).loss.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # torch's
def test_a_compiled_training_step_is_the_step(case):
    """Gradients set to None, meta-step, backward, clipping and optimiser, several times over."""
    maml, batch = case
    twin = copy.deepcopy(maml)

    def step_of(maml):
        optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)

        def step(*batch):
            optimizer.zero_grad()
            loss = maml(*batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(maml.parameters(), 0.5)
            optimizer.step()
            return loss.detach()

        return step

    compiled, plain = torch.compile(step_of(maml), backend="aot_eager"), step_of(twin)
    for _ in range(3):
        assert compiled(*batch).item() == pytest.approx(plain(*batch).item(), rel=1e-6)
        found = {name: p.detach() for name, p in maml.named_parameters()}
        wanted = {name: p.detach() for name, p in twin.named_parameters()}
        assert_close(found, wanted, 1e-5)


def test_modules_do_not_take_each_others_place(case):
    """A compiled function that is handed one module, its copy, and others later."""
    maml, batch = case

    @torch.compile(fullgraph=True, backend="eager")
    def loss_of(maml, *batch):
        return maml(*batch).loss

    assert loss_of(maml, *batch).item() == maml(*batch).loss.item()
    for i in range(3):
        other = copy.deepcopy(maml)
        with torch.no_grad():
            other.model[0].weight.mul_(2 + i)
        wanted = other(*batch).loss.item()
        assert wanted != maml(*batch).loss.item()
        assert loss_of(other, *batch).item() == wanted
    assert loss_of(maml, *batch).item() == maml(*batch).loss.item()


def test_without_gradients(case):
    maml, batch = case
    compiled = torch.compile(maml, fullgraph=True, backend="eager")
    with torch.no_grad():
        out = compiled(*batch)
    assert not out.loss.requires_grad
    assert out.loss.item() == maml(*batch).loss.item()
    assert out.support_losses.shape == (3, 2)


def test_bad_input_is_refused_as_elsewhere(case):
    maml, batch = case
    compiled = torch.compile(maml, backend="eager")
    compiled(*batch)
    batch.query_y[0, 0] = 9
    with pytest.raises(ValueError, match="query_y has class numbers from 0 to 9"):
        compiled(*batch)


def test_the_gradient_is_not_differentiable_once_more(case):
    maml, batch = case
    loss = torch.compile(maml, backend="eager")(*batch).loss
    weight = maml.model[0].weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_the_operation_is_a_good_one(case):
    maml, batch = case
    torch.library.opcheck(
        torch.ops.maml_fast.meta_step.default,
        (maml.inputs(), *batch[:4], maml._number, maml.inner_steps, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_inductor_takes_what_the_operation_gives(draw):
    """Its code relies on the strides that the fake results had."""
    model, batch = draw.mlp(SIZES), draw.batch("mse", 3, 4, 5, SIZES)
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    maml = MAML(model, "mse", 0.2, 2, backend="torch")
    wanted = {n: g.clone() for n, g in gradients(maml, batch).items()}

    @torch.compile(fullgraph=True)
    def doubled(*batch):
        out = maml(*batch)
        return out.loss * 2, out.query_outputs + 1, out.support_losses * 3

    for steps in (2, 1):  # what changes on the module is noticed
        maml.inner_steps = steps
        maml.zero_grad()
        loss, outputs, support_losses = doubled(*batch)
        loss.backward()
        assert outputs.shape == (3, 5, 2)
        assert support_losses.shape == (3, steps)
        found = {n: p.grad / 2 for n, p in maml.model.named_parameters()}
        if steps == 2:
            assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("asked", ["weights", "inputs"])
def test_what_the_operation_has_not_breaks_the_graph(asked, draw):
    """Weights of rows, and gradients by the inputs: as without torch.compile."""
    sizes = (3, 5, 2)
    maml = MAML(draw.mlp(sizes), inner_lr=0.1)
    batch = draw.batch("mse", 2, 4, 3, sizes)[:4]
    weight = torch.ones(2, 4, dtype=torch.float64)
    weight[:, 0] = 0
    more = {"support_weight": weight} if asked == "weights" else {}

    def found_by(call):
        x = batch[0].clone().requires_grad_(asked == "inputs")
        maml.zero_grad()
        loss = call(x, *batch[1:], **more).loss
        loss.backward()
        return loss.detach(), x.grad, *(p.grad.clone() for p in maml.parameters())

    found = found_by(torch.compile(maml, backend="eager"))
    for mine, theirs in zip(found, found_by(maml), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
