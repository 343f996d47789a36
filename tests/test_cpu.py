"""The C++ backend: every instruction set, both layouts, and what only it can get wrong.

The tests of all backends hold it to the plain loop too; here are its own edges.
"""

import itertools
import multiprocessing
import threading

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, check, cpu_cost, cpu_features
from maml_fast.problem import TaskBatch
from tests.networks import SMOOTH, Draw, assert_close, by_graph, gradients
from tests.test_packaging import needs_extension

ENGINES = list(cpu_features.engines()) or ["none"]
LAYOUTS = cpu_cost.LAYOUTS
FORMS = ["factored", "dense"]


@pytest.fixture(autouse=True)
def extension():
    needs_extension()


@pytest.fixture
def threads():
    """Sets torch's number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=list(itertools.product(ENGINES, LAYOUTS)), ids="-".join)
def engine(request, monkeypatch):
    """One instruction set and one layout."""
    name, layout = request.param
    monkeypatch.setenv(cpu_features.FORCED, name)
    monkeypatch.setattr(cpu_cost, "LAYOUTS", (layout,))
    return name, layout


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
    batch = TaskBatch(*(tensor.float() for tensor in batch))
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


class TestSameBits:
    """Sums over tasks have one order, whatever the threads."""

    @pytest.mark.parametrize("tasks", [1, 25, 300])
    @pytest.mark.parametrize("own_threads", [False, True])
    def test_any_number_of_threads(self, engine, tasks, own_threads, threads):
        draw = Draw(5)
        sizes = (4, 24, 9, 3)
        model, batch = draw.mlp(sizes, nn.ReLU).float(), draw.batch("mse", tasks, 5, 6, sizes)
        batch = TaskBatch(*(tensor.float() for tensor in batch))
        rate = nn.Parameter(torch.tensor(0.1))
        maml = MAML(model, "mse", rate, 2, backend="cpu")
        found = []
        extension = cpu_features.extension()
        if own_threads:
            extension.share_openmp(0)
        try:
            for count in (1, 2, 4, 2):
                threads(count)
                rate.grad = None
                out = {name: g.clone() for name, g in gradients(maml, batch).items()}
                found.append({**out, "rate": rate.grad, "loss": maml(*batch).loss.detach()})
        finally:
            cpu_features.extension.cache_clear()
            cpu_features.extension()
        for other in found[1:]:
            assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())

    def test_large_layers_are_summed_by_all_threads(self, threads):
        draw = Draw(6)
        sizes = (300, 200, 5)
        model = draw.mlp(sizes).float()
        batch = TaskBatch(*(t.float() for t in draw.batch("mse", 150, 3, 3, sizes)))
        maml = MAML(model, "mse", 0.05, backend="cpu")
        found = []
        for count in (1, 2, 4):
            threads(count)
            found.append({name: g.clone() for name, g in gradients(maml, batch).items()})
        report = check(maml, *batch)
        assert report.passed, str(report)
        for other in found[1:]:
            assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


class TestData:
    """Tensors as they come."""

    @pytest.fixture
    def model(self, draw):
        return draw.mlp((3, 5, 2))

    @pytest.fixture
    def batch(self, draw):
        return draw.batch("mse", 19, 4, 6, (3, 2))

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.repeat_interleave(2, 0)[::2],
            lambda t: t.repeat_interleave(3, 1)[:, ::3],
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            lambda t: t.mT.contiguous().mT,
            lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        ],
        ids=["tasks", "rows", "tasks and rows", "features", "columns"],
    )
    def test_not_contiguous(self, change, model, batch):
        maml = MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        other = TaskBatch(*map(change, batch))
        assert not other.support_x.is_contiguous()
        assert_close(gradients(maml, other), wanted, 1e-15)

    def test_classes_that_are_not_contiguous(self, draw):
        model, batch = draw.mlp((3, 5, 4)), draw.batch("cross_entropy", 5, 4, 6, (3, 4))
        maml = MAML(model, "cross_entropy", 0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        other = TaskBatch(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch))
        assert_close(gradients(maml, other), wanted, 1e-15)

    def test_parameters_that_are_not_contiguous(self, model, batch):
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        model[0].weight.data = model[0].weight.data.mT.contiguous().mT
        assert not model[0].weight.is_contiguous()
        assert_close(gradients(maml, batch), wanted, 1e-15)

    def test_parameters_whose_memory_moves(self, model, batch):
        """A call that is recalled reads the parameters where they are now."""
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        gradients(maml, batch)
        for parameter in model.parameters():
            parameter.data = parameter.data * 2
        assert_close(gradients(maml, batch), by_graph(model, batch, "mse", 0.1, 1)[1], 1e-10)

    def test_more_than_2_31_numbers(self, draw):
        """Tasks that share their rows: expanded tensors are read as they are, without copies."""
        sizes = (4096, 2)
        model = draw.mlp(sizes).float()
        one = TaskBatch(*(t.float() for t in draw.batch("mse", 1, 16, 1, sizes)))
        tasks = 2**31 // one.support_x.numel() + 5
        many = TaskBatch(*(t.expand(tasks, *t.shape[1:]) for t in one))
        assert many.support_x.numel() > 2**31
        maml = MAML(model, inner_lr=1e-3, first_order=True, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, one).items()}
        out = maml(*many)
        assert torch.equal(out.task_losses, out.task_losses[:1].expand(tasks))
        assert torch.equal(out.query_outputs, out.query_outputs[:1].expand(tasks, 1, 2))
        maml.zero_grad()
        out.loss.backward()
        # sums of so many equal numbers in float32
        assert_close({n: p.grad for n, p in model.named_parameters()}, wanted, 1e-3)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nan_stays_with_its_task(self, layout, model, batch, monkeypatch):
        monkeypatch.setattr(cpu_cost, "LAYOUTS", (layout,))
        batch.support_x[3] = torch.nan
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        with pytest.raises(NonFiniteError, match="1 of 19 tasks: 3") as caught:
            maml(*batch)
        assert caught.value.tasks == [3]

    def test_padding_lanes_count_for_nothing(self, engine, model, batch):
        """One task fewer or more than the lanes: each counts once."""
        lanes = cpu_features.engines()[engine[0]] // 8
        for tasks in (1, lanes - 1, lanes, lanes + 1):
            part = TaskBatch(*(t[:tasks] for t in batch))
            maml = MAML(model, inner_lr=0.1, reduction="sum", backend="cpu")
            wanted = by_graph(model, part, "mse", 0.1, 1)[1]
            wanted = {name: g * tasks for name, g in wanted.items()}
            assert_close(gradients(maml, part), wanted, 1e-10)

    def test_signs_and_zeros_that_torch_has_left_for_later(self, model, batch):
        """Views with the sign to be applied when read, and tensors of zeros without memory."""
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        negative = torch.complex(torch.zeros_like(batch.support_x), -batch.support_x).conj().imag
        assert negative.is_neg()
        assert torch.equal(negative, batch.support_x)
        assert_close(gradients(maml, batch._replace(support_x=negative)), wanted, 1e-15)
        zeros = torch._efficientzerotensor(*batch.query_x.shape, dtype=torch.float64)
        at_zero = gradients(maml, batch._replace(query_x=zeros))
        at_zero = {name: g.clone() for name, g in at_zero.items()}
        plain = batch._replace(query_x=torch.zeros_like(batch.query_x))
        assert_close(gradients(maml, plain), at_zero, 1e-15)

    def test_parameters_without_memory(self, model, batch):
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        maml(*batch)
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"shape \[5, 3\].*lost its memory"):
            maml(*batch)

    def test_infinite_data_behind_saturated_units(self, engine, draw):
        """A frozen weight does not meet infinities that autograd would not have it meet."""
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
        draw.initialise(model)
        model[0].weight.requires_grad_(False)
        batch = draw.batch("mse", 3, 5, 4, (3, 2))
        batch.support_x[1, 2, 0] = torch.inf
        wanted = MAML(model, inner_lr=0.1, backend="reference")
        wanted = {name: g.clone() for name, g in gradients(wanted, batch).items()}
        assert all(g.isfinite().all() for g in wanted.values())
        assert_close(gradients(MAML(model, inner_lr=0.1, backend="cpu"), batch), wanted, 1e-10)


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
    batch = TaskBatch(*(t.float() for t in draw.batch("mse", 5, 7, 6, (3, 2))))
    with torch.no_grad():
        batch = batch._replace(
            support_y=torch.stack([model(x) for x in batch.support_x]),
            query_y=torch.stack([model(x) for x in batch.query_x]),
        )
    maml = MAML(model, inner_lr=0.1)
    assert maml(*batch).loss < 1e-10
    assert the_plan(maml, batch).backend == "cpu"


def test_several_threads_at_once(threads):
    """Calls of one module and of others, at the same time, on one set of threads."""
    threads(2)
    draw = Draw(8)
    sizes = (4, 20, 3)
    model, batch = draw.mlp(sizes), draw.batch("mse", 60, 5, 5, sizes)
    mamls = [MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu") for _ in range(2)]
    _, wanted = mamls[0].value_and_grad(*batch)
    failures = []

    def work(maml):
        for _ in range(20):
            _, found = maml.value_and_grad(*batch)
            if not all(torch.equal(found[name], g) for name, g in wanted.items()):
                failures.append(maml)

    workers = [threading.Thread(target=work, args=(mamls[i % 2],)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _in_child_with_threads(maml, batch, wanted, queue):
    """Several threads of the child find at once that it is one."""
    results = []

    def work():
        _, found = maml.value_and_grad(*batch)
        results.append(all(torch.equal(found[name], g) for name, g in wanted.items()))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    queue.put(results == [True] * 4)


def _in_child(maml, batch, wanted, queue):
    torch.set_num_threads(2)
    _, found = maml.value_and_grad(*batch)
    queue.put(all(torch.equal(found[name], g) for name, g in wanted.items()))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
@pytest.mark.parametrize("work", [_in_child, _in_child_with_threads])
def test_after_a_fork(work, threads):
    """A child that was forked off, as DataLoader's workers are, computes on threads of its own."""
    threads(2)
    draw = Draw(9)
    sizes = (4, 20, 3)
    model, batch = draw.mlp(sizes), draw.batch("mse", 60, 5, 5, sizes)
    maml = MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu")
    _, wanted = maml.value_and_grad(*batch)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(maml, batch, wanted, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get()


class TestInstructionSets:
    def test_the_highest_is_taken(self, monkeypatch):
        monkeypatch.delenv(cpu_features.FORCED, raising=False)
        assert cpu_features.instruction_set() == cpu_features.instruction_sets()[-1]
        assert list(cpu_features.engines()) == cpu_features.instruction_sets()

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
