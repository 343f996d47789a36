"""Where there is a GPU: every backend there, against the plain loop on the CPU; and of the Triton
kernels all tiles, few and many tasks, and large tensors.

T tasks, N support rows, M query rows, F features of queries and keys, O of values.
"""

import copy
import gc

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, check
from maml_fast.problem import TaskBatch
from maml_fast.triton_plan import TILES
from tests import gpu_cases
from tests.gpu_cases import BOUND, KINDS, LESS_EXACT, PRECISIONS, Twins, error_of
from tests.networks import SMOOTH, Draw, assert_close, by_graph, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = (3, 17, 9, 4)
BACKENDS = [
    ("reference", "auto"),
    ("functional", "auto"),
    ("torch", "factored"),
    ("torch", "dense"),
    ("auto", "auto"),
]


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip("triton")
    return request.param


def on_gpu(batch, dtype=torch.float64):
    return [t.to("cuda", dtype if t.is_floating_point() else t.dtype) for t in batch[:4]]


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS)
@pytest.mark.parametrize("activation", sorted(SMOOTH))
def test_meta_gradients(backend, fast_weights, activation):
    draw = Draw(0)
    model = draw.mlp(SIZES, SMOOTH[activation])
    batch = draw.batch("cross_entropy", 7, 5, 6, SIZES)
    wanted = by_graph(model, batch, "cross_entropy", 0.2, 3)[1]
    options = dict(backend=backend, fast_weights=fast_weights, inner_lr=0.2, inner_steps=3)
    maml = MAML(model.to("cuda"), "cross_entropy", **options)
    found = {name: g.cpu() for name, g in gradients(maml, on_gpu(batch)).items()}
    assert_close(found, wanted, 1e-10)


@pytest.mark.parametrize(("backend", "fast_weights"), BACKENDS[1:])
def test_float32_error_and_same_bits(backend, fast_weights):
    draw = Draw(1)
    model = draw.mlp((20, 100, 100, 4)).to("cuda", torch.float32)
    batch = on_gpu(draw.batch("mse", 40, 20, 20, (20, 4)), torch.float32)
    maml = MAML(model, inner_lr=0.05, backend=backend, fast_weights=fast_weights)
    report = check(maml, *batch)
    assert report.passed, str(report)
    first = {name: g.clone() for name, g in gradients(maml, batch).items()}
    assert all(torch.equal(g, first[name]) for name, g in gradients(maml, batch).items())


def test_learned_rates():
    draw = Draw(2)
    model, batch = draw.mlp(SIZES), draw.batch("mse", 4, 5, 5, SIZES)
    rate = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64))
    by_name = {name: rate for name, _ in model.named_parameters()}
    wanted = by_graph(model, batch, "mse", by_name, 2)[1]["rate of 0.weight"]
    maml = MAML(model, inner_lr=rate, inner_steps=2).to("cuda")
    gradients(maml, on_gpu(batch))
    torch.testing.assert_close(maml.inner_lr.grad.cpu(), wanted, rtol=1e-10, atol=0)


def test_bad_input():
    draw = Draw(3)
    model, batch = draw.mlp(SIZES).to("cuda"), draw.batch("cross_entropy", 4, 5, 5, SIZES)
    maml = MAML(model, "cross_entropy")
    with pytest.raises(ValueError, match="support_x is on cpu; the model is on cuda"):
        maml(*batch)
    support_x, support_y, query_x, query_y = on_gpu(batch)
    with pytest.raises(ValueError, match="query_y.*wanted is 0 to 3"):
        maml(support_x, support_y, query_x, query_y + 2)
    with pytest.raises(NonFiniteError, match="4 of 4 tasks"):
        maml(support_x * torch.nan, support_y, query_x, query_y)


def test_auto_is_triton_where_it_can_be(draw):
    pytest.importorskip("triton")
    batch = draw.batch("mse", 4, 5, 6, SIZES)
    maml = MAML(draw.mlp(SIZES).to(gpu_cases.DEVICE, torch.float32))
    assert maml.plan(*gpu_cases.on_device(batch)[:4:2]).backend == "triton"
    plan = maml.double().plan(*gpu_cases.on_device(batch, torch.float64)[:4:2])
    assert plan.backend == "torch"
    assert "its kernels take float32" in plan.reason


class TestTiles:
    """Every way to cut the work, against float64, tensor by tensor."""

    @pytest.mark.parametrize(("network", "precision"), gpu_cases.FUSED)
    @pytest.mark.parametrize("position", range(len(TILES)))
    def test_fused(self, network, position, precision):
        pytest.importorskip("triton")
        case = gpu_cases.fused(network)
        errors = case.errors(case.tiles[position], precision)
        if precision in LESS_EXACT:
            least, most = LESS_EXACT[precision]
            assert least < max(errors.values()) < most, errors
            return
        for name, error in errors.items():
            assert error <= case.bounds[name], (name, error, case.bounds[name])

    @pytest.mark.parametrize("shape", gpu_cases.attend_shapes(), ids=str)
    @pytest.mark.parametrize(
        ("kind", "precision"),
        [
            ("tangent_backward", "tf32x3"),
            ("tangent", "ieee"),
            ("forward", "tf32"),
            ("backward", "bf16"),
        ],
    )
    def test_attend(self, kind, precision, shape, draw, monkeypatch):
        from tests import test_attend

        def attend(kind, terms, ops, out, _, **options):
            launch(kind, terms, ops, out, precision, **options)

        launch = test_attend.attend
        monkeypatch.setattr(test_attend, "attend", attend)
        monkeypatch.setattr(test_attend, "SMALL", None)  # what `default_config` says
        if precision in LESS_EXACT:
            monkeypatch.setattr(test_attend, "BOUND", LESS_EXACT[precision][1])
        test_attend.test_attend(kind, shape, draw)

    @pytest.mark.parametrize("width", [2, 3, 7, 12, 16, 30, 100, 128, 200, 256])
    def test_an_activation_alone(self, width, draw):
        from tests import test_attend

        test_attend.test_an_activation_alone(width, draw)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("n", [5, 20, 70])
    @pytest.mark.parametrize("m", [7, 20, 40, 150])
    def test_matmul(self, m, n, precision, draw):
        from tests import test_matmul

        a, b, bias = draw.normal(m, 50), draw.normal(n, 50).mT, draw.normal(n)
        bound = LESS_EXACT[precision][1] if precision in LESS_EXACT else BOUND
        options = dict(engine="triton", precision=precision, bound=bound)
        test_matmul.check(a @ b + bias, a, b, bias, **options)


def by_torch(twins, batch):
    """Results and gradients in float64, by backend "torch"."""
    maml = MAML(
        copy.deepcopy(twins.model).double(),
        twins.loss,
        gpu_cases.RATE,
        twins.plain.inner_steps,
        backend="torch",
    )
    double = TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch[:4]))
    result, found = maml.value_and_grad(*double)
    return vars(result), found


@pytest.mark.parametrize("tasks", [1, 100_000])
def test_few_and_many_tasks(kind, tasks):
    """One task too few or twice would move a gradient by 1e-5 of a task's own."""
    twins = Twins(kind)
    # torch's convolutions of each task's own are groups of one, which takes it long
    batch = twins.batch(min(tasks, 3000) if kind == "images" else tasks)
    results, wanted = by_torch(twins, batch)
    some = [by_torch(twins, task)[1] for task in TaskBatch(*(t[:16] for t in batch[:4])).chunks(1)]
    found = twins.values_of_plain(batch)
    bound = 5 * BOUND if kind == "images" else 2 * BOUND  # through norms, autograd is no better
    for name, tensor in results.items():
        assert error_of(found[name], tensor) <= bound, name
    for name, tensor in wanted.items():
        scale = sum(task[name].norm().item() for task in some) / len(some)
        assert (found[name].double() - tensor).norm().item() <= bound * scale, name


class TestPast2To31:
    """Numbers whose place in a tensor no 32 bits can say."""

    tasks, rows, features = 1_700_000, 10, 128

    @pytest.fixture(autouse=True)
    def memory(self):
        assert self.tasks * self.rows * self.features > 2**31
        if why := gpu_cases.needs_memory(20):
            pytest.skip(why)
        yield
        gc.collect()
        torch.cuda.empty_cache()

    @pytest.fixture
    def normal(self):
        generator = torch.Generator(gpu_cases.DEVICE).manual_seed(0)
        return lambda *shape: torch.randn(*shape, generator=generator, device=gpu_cases.DEVICE)

    def places(self, per_task):
        """Tasks at the beginning, around number 2^31, and at the end."""
        border = min(2**31 // per_task, self.tasks - 50)
        return [slice(0, 50), slice(border - 50, border + 50), slice(self.tasks - 50, self.tasks)]

    def test_fused(self, normal, draw):
        tasks = self.tasks
        x, y = normal(tasks, self.rows, self.features), normal(tasks, self.rows, 1)
        batch = TaskBatch(x, y, normal(tasks, 1, self.features), normal(tasks, 1, 1))
        model = draw.mlp((self.features, 8, 1)).to(gpu_cases.DEVICE, torch.float32)
        options = dict(inner_lr=0.01, inner_steps=1, cuda_graphs=False)
        maml = MAML(model, backend="triton", **options)
        assert maml.plan(*batch[:4:2]).triton.kernels == "fused"
        result, found = maml.value_and_grad(*batch)
        double = MAML(copy.deepcopy(model).double(), inner_lr=0.01, backend="torch")
        for place in self.places(self.rows * self.features):
            wanted = double.value_and_grad(*(t[place].double() for t in batch[:4]))[0]
            for name in ("task_losses", "support_losses", "query_outputs"):
                error = error_of(getattr(result, name)[place], getattr(wanted, name))
                assert error <= 5 * BOUND, (name, place)
        quarters = [maml.value_and_grad(*part)[1] for part in batch.chunks(tasks // 4)]
        assert len(quarters) == 4
        for name, tensor in found.items():  # a sum over tasks is that of its parts
            mean = torch.stack([quarter[name].double() for quarter in quarters]).mean(0)
            assert error_of(tensor, mean) <= 1e-4, name

    @pytest.mark.parametrize("rows", [10, 1], ids=["rows", "keys"])
    @pytest.mark.parametrize("sums", ["moved", "adjoint"])
    def test_attend(self, rows, sums, normal):
        """More rows than that, or more values."""
        from maml_fast.kernels.attend import Segment, Terms, attend

        keys = 11 - rows
        query, key = normal(self.tasks, rows, 16), normal(self.tasks, keys, 16)
        value = normal(self.tasks, keys, self.features)
        segment = Segment(query, key, value, keys)
        if sums == "moved":
            rates = torch.full((2, 1), 0.5, device=gpu_cases.DEVICE)
            terms = Terms(None, moved=segment, rates=rates, step=1, step_rows=keys)
        else:
            terms = Terms(None, adjoint=segment, step_rows=keys, query_rows=keys)
        out = query.new_empty(self.tasks, rows, self.features)
        attend("backward", terms, (), out, "tf32x3")
        for place in self.places(10 * self.features):
            gram = query[place].double() @ key[place].double().mT
            wanted = (-0.5 if sums == "moved" else 1) * gram @ value[place].double()
            assert error_of(out[place], wanted) <= BOUND, place

    def test_an_activation_alone(self, normal):
        from maml_fast.kernels.attend import Terms, attend

        base, bias = normal(self.tasks, self.rows, self.features), normal(self.features)
        places = self.places(self.rows * self.features)
        wanted = [(base[place].double() + bias).tanh() for place in places]
        attend("forward", Terms(base, bias), (("tanh",),), base, "tf32x3")  # in place
        for place, tensor in zip(places, wanted, strict=True):
            assert error_of(base[place], tensor) <= BOUND, place

    @pytest.mark.parametrize("large", ["a", "out"])
    def test_matmul(self, large, normal):
        from maml_fast.kernels.matmul import product

        k, n = (self.features, 5) if large == "a" else (5, self.features)
        a, b = normal(self.tasks * self.rows, k), normal(k, n)
        out = product(a, b, engine="triton")
        for place in self.places(self.rows * self.features):
            place = slice(place.start * self.rows, place.stop * self.rows)
            assert error_of(out[place], a[place].double() @ b.double()) <= BOUND, place
