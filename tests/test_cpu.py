"""The C++ backend: every instruction set and both layouts against a plain loop.

The tests of all backends hold it to the loop too. Its data: test_cpu_data.py; its threads:
test_cpu_threads.py; its operations: test_operations_cpu.py.
"""

import os

import pytest
import torch
from torch import nn

from maml_fast import MAML, check, cpu_features
from maml_fast.problem import TaskBatch
from tests.engines import ENGINES
from tests.networks import SMOOTH, Draw, assert_close, by_graph, gradients

pytestmark = pytest.mark.usefixtures("extension")
FORMS = ["factored", "dense"]


def the_plan(maml, batch):
    return maml.plan(batch.support_x, batch.query_x)


# sizes, loss, steps, rows, query rows, tasks: on both sides of every block and vector
CASES = [
    ((1, 40, 40, 1), "mse", 1, 10, 10, 25),
    ((3, 9, 7, 5, 2), "cross_entropy", 3, 4, 5, 17),
    ((20, 67, 33, 5), "cross_entropy", 2, 17, 6, 5),
    ((130, 70, 4), "huber", 2, 3, 9, 33),
    ((4, 3), "bce_with_logits", 2, 1, 1, 1),
    ((5, 6, 4), "mse", 0, 3, 2, 2),
    ((2, 1, 1, 3), "mse", 4, 33, 1, 3),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_engine_equals_a_plain_loop(engine, form, case):
    sizes, loss, steps, rows, queries, tasks = case
    draw = Draw(7)
    model, batch = draw.mlp(sizes), draw.batch(loss, tasks, rows, queries, sizes)
    maml = MAML(model, loss, 0.2, steps, backend="cpu", fast_weights=form)
    plan = the_plan(maml, batch)
    assert (plan.cpu.instruction_set, plan.cpu.layout) == engine
    assert {layer.form for layer in plan.layers if layer.use} == {form}
    wanted_loss, wanted = by_graph(model, batch, loss, 0.2, steps)
    torch.testing.assert_close(maml(*batch).loss.detach(), wanted_loss, rtol=1e-10, atol=0)
    assert_close(gradients(maml, batch), wanted, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", [*SMOOTH.values(), nn.ReLU, nn.LeakyReLU])
def test_every_engine_and_activation_in_float32(engine, form, activation):
    """At most twice autograd's error; these tasks keep a ReLU off its kink."""
    draw = Draw(2)
    sizes = (5, 18, 9, 3)
    model, batch = draw.mlp(sizes, activation).float(), draw.batch("mse", 19, 6, 7, sizes)
    batch = TaskBatch(*(tensor.float() for tensor in batch[:4]))
    maml = MAML(model, inner_lr=0.05, inner_steps=2, backend="cpu", fast_weights=form)
    report = check(maml, *batch)
    assert report.passed, str(report)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x) * 1.5


ODD = {
    "frozen layers and activations before the first that adapts": lambda: [
        nn.Flatten(), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Softplus(), nn.Linear(5, 4),
        nn.ReLU(), nn.Linear(4, 3),
    ],
    "positions": lambda: [
        nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 2), nn.Flatten(), nn.Linear(4, 3), nn.SiLU(),
    ],
    "positions to the end": lambda: [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)],
    "several activations in a row": lambda: [
        nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.ReLU(),
        Sine(), nn.Linear(8, 5), nn.ReLU(), nn.Sigmoid(), nn.Linear(5, 3), nn.LeakyReLU(0.3),
    ],
    "activations first and last": lambda: [
        nn.Flatten(), nn.Softplus(), nn.Linear(6, 4), nn.Linear(4, 3), nn.ReLU(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (2, False), (2, True)])
def test_odd_networks(engine, form, odd, steps, first_order):
    """Rows of shape [2, 3] through chains of every kind, with learned rates."""
    draw = Draw(11)
    model = draw.initialise(nn.Sequential(*ODD[odd]()).double())
    if odd.startswith("frozen"):
        model[2].requires_grad_(False)
    x, q = draw.normal(9, 5, 2, 3), draw.normal(9, 4, 2, 3)
    y, yq = (torch.stack([draw.normal(*model(r).shape) for r in rows]) for rows in (x, q))
    batch = TaskBatch(x, y, q, yq)
    rate = nn.Parameter(torch.full((), 0.1, dtype=torch.float64))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = by_graph(model, batch, "mse", dict.fromkeys(names, rate), steps, first_order)[1]
    options = dict(first_order=first_order, backend="cpu", fast_weights=form)
    found = gradients(MAML(model, "mse", rate, steps, **options), batch)
    assert_close(found, {name: wanted[name] for name in names}, 1e-10)
    by_rate = wanted[f"rate of {names[0]}"]
    torch.testing.assert_close(rate.grad, by_rate, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("first_order", [False, True])
def test_rates_and_frozen_parameters(engine, first_order):
    """Learned rates, a frozen weight, a frozen bias and a frozen layer between adapting ones."""
    draw = Draw(3)
    sizes = (3, 6, 5, 4, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 18, 4, 5, sizes)
    model[2].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    adapting = [name for name, p in model.named_parameters() if p.requires_grad]
    double = dict(dtype=torch.float64)
    rates = {
        name: nn.Parameter(torch.tensor([0.1, 0.2, 0.05], **double)) if i % 2 else 0.15
        for i, name in enumerate(adapting)
    }
    wanted = by_graph(model, batch, "mse", rates, 3, first_order)[1]
    for form in FORMS:
        options = dict(first_order=first_order, backend="cpu", fast_weights=form)
        maml = MAML(model, "mse", rates, 3, **options)
        found = gradients(maml, batch)
        learned = {f"rate of {n}": r.grad for n, r in rates.items() if isinstance(r, nn.Parameter)}
        assert_close(found | learned, wanted, 1e-10)


def test_adapted_models(engine):
    draw = Draw(4)
    sizes = (3, 6, 5, 2)
    model, batch = draw.mlp(sizes), draw.batch("mse", 18, 4, 5, sizes)
    wanted = MAML(model, inner_lr=0.2, inner_steps=3, backend="reference").adapt(*batch[:2])
    for form in FORMS:
        maml = MAML(model, inner_lr=0.2, inner_steps=3, backend="cpu", fast_weights=form)
        adapted = maml.adapt(*batch[:2])
        found = {"outputs": adapted(batch.query_x), "losses": adapted.support_losses}
        right = {"outputs": wanted(batch.query_x), "losses": wanted.support_losses}
        assert_close(found | adapted.parameters(), right | wanted.parameters(), 1e-11)


def test_nothing_that_adapts(engine, draw):
    model, batch = draw.mlp((3, 5, 2)).requires_grad_(False), draw.batch("mse", 3, 4, 5, (3, 2))
    maml = MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu")
    out, found = maml.value_and_grad(*batch)
    wanted = MAML(model, inner_lr=0.1, inner_steps=2, backend="reference")(*batch)
    assert found == {}
    torch.testing.assert_close(out.task_losses, wanted.task_losses)
    torch.testing.assert_close(out.support_losses, wanted.support_losses)


def test_programs_are_not_kept_for_ever(draw):
    model, batch = draw.mlp((3, 5, 2)), draw.batch("mse", 3, 4, 5, (3, 2))
    maml = MAML(model, backend="cpu")
    adapted = maml.adapt(*batch[:2])
    for rows in range(1, 30):
        adapted(draw.normal(3, rows, 3))
    (planned,) = maml._planner._plans.values()
    assert len(planned.plan.programs) <= 8


def test_a_float32_plan_is_judged_in_float64(draw):
    """Where the model fits its data exactly, float32 has only rounding to compare."""
    model = draw.mlp((3, 16, 2)).float()
    batch = TaskBatch(*(t.float() for t in draw.batch("mse", 5, 7, 6, (3, 2))[:4]))
    with torch.no_grad():
        batch = batch._replace(
            support_y=torch.stack([model(x) for x in batch.support_x]),
            query_y=torch.stack([model(x) for x in batch.query_x]),
        )
    maml = MAML(model, inner_lr=0.1)
    assert maml(*batch).loss < 1e-10
    assert the_plan(maml, batch).backend == "cpu"


class TestInstructionSets:
    def test_the_highest_is_taken(self, monkeypatch):
        monkeypatch.delenv(cpu_features.FORCED, raising=False)
        assert cpu_features.instruction_set() == cpu_features.instruction_sets()[-1]
        # The sanitizers' build has the lowest and the highest.
        built = cpu_features.instruction_sets()
        if "MAML_FAST_TEST_BACKENDS" in os.environ and len(built) > 2:
            built = [built[0], built[-1]]
        assert list(cpu_features.engines()) == built

    def test_one_that_is_not_there_is_refused(self, monkeypatch, draw):
        monkeypatch.setenv(cpu_features.FORCED, "avx1024")
        batch = draw.batch("mse", 2, 3, 3, (3, 2))
        with pytest.raises(ValueError, match=r"MAML_FAST_INSTRUCTION_SET is 'avx1024'.*baseline"):
            MAML(draw.mlp((3, 2)), backend="cpu")(*batch)

    @pytest.mark.parametrize("name", ENGINES)
    def test_peak_is_a_speed(self, name):
        assert 1e8 < cpu_features.extension().peak(name, False) < 1e13


def test_memory_does_not_grow_with_tasks(draw):
    """What is kept beside inputs and outputs: an arena a thread, and at most 64 partial sums."""
    model = draw.mlp((3, 8, 2))
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    few, many = (
        MAML(model, backend="cpu").plan(*(x.expand(tasks, 4, 3) for _ in range(2)))
        for tasks in (1000, 10**7)
    )
    assert few.cpu.arena_bytes == many.cpu.arena_bytes
    assert few.cpu.chunks == many.cpu.chunks <= 64
