"""What the planner takes, what it refuses and how it says so, and what it chooses."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maml_fast import MAML, UnsupportedModelError, cpu_cost, ops, outer
from maml_fast.cost import LayerUse, dense_cost, factored_cost
from maml_fast.inner import SGD
from maml_fast.plan import CPU_PASS_BYTES
from maml_fast.trace import register, trace
from tests.networks import IN_DOUBLE as BACKENDS
from tests.networks import Draw, assert_close, by_graph, gradients

IN, OUT = 6, 3


class Own(nn.Module):
    """An own module: nested Sequentials, functional calls, methods, a constant factor."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Sequential(nn.Linear(IN, 5), nn.Tanh()), nn.Identity()
        )
        self.w, self.b = nn.Parameter(torch.empty(4, 5)), nn.Parameter(torch.empty(4))
        self.head = nn.Linear(4, OUT)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        x = x.view(x.size(0), 2, -1)
        x = self.body(x.reshape(x.shape[0], -1).flatten(1))
        x = F.linear(input=x, weight=self.w, bias=self.b)
        x = F.softplus(F.gelu(x, approximate="tanh"), beta=2).sigmoid()
        x = torch.sin(3.0 * x) * 0.5
        return self.head(F.dropout(self.drop(F.silu(x)), 0.5, self.training and False))


class Inherited(nn.Linear):
    """A subclass that leaves forward alone."""


class Changed(nn.Linear):
    """A subclass that does not: its own forward is followed."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class ByMatmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.empty(IN, OUT))

    def forward(self, x):
        return x @ self.w


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, IN), nn.Linear(IN, OUT)

    def forward(self, x):
        return self.b(x + self.a(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, IN), nn.Linear(IN, OUT)

    def forward(self, x):
        return self.b(self.a(torch.tanh(self.a(x))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, OUT)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def initialised(model):
    return Draw(0).initialise(model.double())


PLANNED = [
    Own,
    lambda: nn.Linear(IN, OUT),
    lambda: nn.Sequential(nn.Linear(IN, 4), nn.LeakyReLU(0.2), nn.Linear(4, OUT)),
    lambda: nn.Sequential(Inherited(IN, 4), nn.Softplus(2, 3), Changed(4, OUT)),
    lambda: nn.Sequential(nn.Linear(IN, 4), nn.ReLU(inplace=True), nn.Linear(4, OUT)),
    lambda: nn.Sequential(nn.Linear(IN, 4), nn.Dropout(0.3), nn.Linear(4, OUT)).eval(),
]
REFUSED = [
    (ByMatmul, "'matmul' .*no planned operation|'matmul'.*parameter or buffer"),
    (Branching, "'add'|used 2 times"),
    (Twice, r"layer 'a' \(Linear\): is used twice"),
    (Tied, r"layer 'b' \(Linear\): shares 'a.weight' with layer 'a'"),
    (lambda: nn.Sequential(nn.Linear(IN, OUT), nn.Softmax(-1)), r"layer '1' \(Softmax\)"),
    (
        lambda: nn.Sequential(nn.Linear(IN, OUT), nn.RMSNorm(OUT), nn.ELU()),
        r"layer '1' \(RMSNorm\).*layer '2' \(ELU\)",
    ),
    (
        lambda: nn.utils.parametrize.register_parametrization(
            nn.Linear(IN, OUT), "weight", nn.Tanh()
        ),
        r"layer 'linear' \(linear\)",
    ),
]


def batch_for(draw):
    return draw.batch("cross_entropy", 3, 4, 5, (IN, OUT))


@pytest.mark.parametrize("make", PLANNED)
def test_planned_models_equal_the_loop(make, draw):
    model, batch = initialised(make()), batch_for(draw)
    wanted = by_graph(model, batch, "cross_entropy", 0.2, 2)[1]
    for backend, fast_weights in itertools.product(BACKENDS, ("auto", "factored", "dense")):
        maml = MAML(model, "cross_entropy", 0.2, 2, backend=backend, fast_weights=fast_weights)
        assert_close(gradients(maml, batch), wanted, 1e-10)
    auto = MAML(model, "cross_entropy", 0.2, 2)
    assert auto.plan(batch.support_x, batch.query_x).backend == "cpu"


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_refused_models_are_named_and_run_elsewhere(make, words, draw):
    model, batch = initialised(make()), batch_for(draw)
    for backend in BACKENDS:
        with pytest.raises(UnsupportedModelError, match=words):
            MAML(model, "cross_entropy", backend=backend)(*batch)
    auto = MAML(model, "cross_entropy", 0.2, 2)
    plan = auto.plan(batch.support_x, batch.query_x)
    assert plan.backend == "functional"
    assert plan.refusals
    assert plan.refusals[0] in str(plan)
    wanted = by_graph(model, batch, "cross_entropy", 0.2, 2)[1]
    assert_close(gradients(auto, batch), wanted, 1e-10)


@pytest.mark.parametrize("backend", [*BACKENDS, "functional", "auto"])
def test_dropout_in_training_is_refused(backend, draw):
    model = initialised(nn.Sequential(nn.Linear(IN, 4), nn.Dropout(0.3), nn.Linear(4, OUT)))
    maml, batch = MAML(model, "cross_entropy", backend=backend), batch_for(draw)
    for call in (lambda: maml(*batch), lambda: maml.plan(batch.support_x, batch.query_x)):
        with pytest.raises(UnsupportedModelError, match=r"layer '1' \(Dropout\).*p=0.3.*eval"):
            call()


def test_control_flow_on_data_cannot_be_traced(draw):
    model = initialised(Conditional())
    with pytest.raises(UnsupportedModelError, match=r"torch.fx cannot trace it.*control flow"):
        MAML(model, "cross_entropy", backend="torch")(*batch_for(draw))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused(hook, draw):
    model, batch = initialised(nn.Sequential(nn.Linear(IN, OUT))), batch_for(draw)
    maml = MAML(model, "cross_entropy", backend="torch")
    maml(*batch)
    handle = getattr(model[0], hook)(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=r"layer '0' \(Linear\): has hooks"):
        maml(*batch)
    handle.remove()
    maml(*batch)


def test_other_reasons(draw):
    batch = batch_for(draw)
    model = initialised(nn.Linear(IN, OUT))
    with pytest.raises(UnsupportedModelError, match="loss is a callable"):
        MAML(model, F.cross_entropy, backend="torch")(*batch)
    half = [t.bfloat16() if t.is_floating_point() else t for t in batch[:4]]
    with pytest.raises(UnsupportedModelError, match="bfloat16; planned are float32 and float64"):
        MAML(model.bfloat16(), "cross_entropy", backend="torch")(*half)


def test_rows_must_stay_rows(draw):
    for op in (nn.Flatten(0), nn.Flatten(0, 1)):
        chain = trace(nn.Sequential(op, nn.Linear(IN, OUT)))
        if not chain.refusals:
            with pytest.raises(ValueError, match="flattens the rows"):
                chain.links[0].op.out_features((IN,))


class TestAPlanFollowsItsModel:
    """A plan is kept, but never used for a model that has changed since."""

    def both(self, model, batch):
        maml = MAML(model, "cross_entropy", 0.2, 2)
        maml(*batch)
        return maml, lambda: by_graph(model, batch, "cross_entropy", 0.2, 2)[1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m[1], "negative_slope", 0.9),
            lambda m: m.__setitem__(1, nn.Tanh()),
            lambda m: m.__setitem__(2, initialised(nn.Linear(4, OUT))),
            lambda m: m[0].weight.requires_grad_(False),
            lambda m: m[0].requires_grad_(False),
            lambda m: m.append(nn.Sigmoid()),
            lambda m: setattr(m[2], "bias", None),
        ],
    )
    def test_changes(self, change, draw):
        model = initialised(nn.Sequential(nn.Linear(IN, 4), nn.LeakyReLU(0.2), nn.Linear(4, OUT)))
        batch = batch_for(draw)
        maml, wanted = self.both(model, batch)
        change(model)
        assert_close(gradients(maml, batch), wanted(), 1e-10)

    def test_train_and_eval(self, draw):
        model = initialised(nn.Sequential(nn.Linear(IN, 4), nn.Dropout(0.5), nn.Linear(4, OUT)))
        batch = batch_for(draw)
        maml, wanted = self.both(model.eval(), batch)
        assert_close(gradients(maml, batch), wanted(), 1e-10)
        model.train()
        with pytest.raises(UnsupportedModelError, match=r"eval\(\)"):
            maml(*batch)

    def test_other_shapes(self, draw):
        model = initialised(nn.Linear(IN, OUT))
        maml, _ = self.both(model, batch_for(draw))
        for rows in (1, 2, 7):
            batch = draw.batch("cross_entropy", 2, rows, 3, (IN, OUT))
            wanted = by_graph(model, batch, "cross_entropy", 0.2, 2)[1]
            assert_close(gradients(maml, batch), wanted, 1e-10)


def test_the_plan_prints_what_would_run():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 5))
    model[1].requires_grad_(False)
    maml = MAML(model, "cross_entropy", 0.4)
    plan = maml.plan(torch.zeros(512, 5, 28, 28), torch.zeros(512, 5, 28, 28))
    text = str(plan)
    assert "backend cpu: plans every layer" in text
    assert "512 tasks" in text
    tiles = r"tiles of \d+ tasks in \d+ chunks, arena \d+ KiB a thread; predicted [\d.]+ ms"
    assert re.search(tiles, text)
    assert "linear 784->256" in text
    assert "once, shared" in text
    assert "linear 256->5" in text
    assert "factored" in text
    assert plan.output == (5, 5)


def test_the_cost_model_counts_the_formula():
    """Dense, all layers: S(3F_s - F1_s) + (3F_q - F1_q) + S(6F_s - 4F1_s), F = sum of 2 n I O."""
    sizes, rows, queries, steps = (3, 7, 5, 2), 4, 6, 3
    areas = [i * o for i, o in itertools.pairwise(sizes)]
    total = 0
    for layer, (i, o) in enumerate(itertools.pairwise(sizes)):
        use = LayerUse(i, o, rows, queries, steps, first_order=False, first=layer == 0)
        total += dense_cost(use, itemsize=4).flops
    f_s, f1_s = 2 * rows * sum(areas), 2 * rows * areas[0]
    f_q, f1_q = 2 * queries * sum(areas), 2 * queries * areas[0]
    assert total == steps * (3 * f_s - f1_s) + (3 * f_q - f1_q) + steps * (6 * f_s - 4 * f1_s)


def test_the_factored_cost_by_hand():
    """One step, second order, a layer in the middle: N = 4 rows, M = 6 query rows."""
    use = LayerUse(7, 5, 4, 6, 1, first_order=False, first=False)
    cost = factored_cost(use)
    # forward and backward of 10 rows, 4 rows' tangents both ways, 6 + 2 * 4 rows of the gradient
    assert cost.shared_flops == 2 * 35 * (2 * 10 + 2 * 4 + 14)
    # the query against 4 moved rows both ways; step 0 against the adjoint's 6 rows both ways
    assert cost.small_flops == 2 * 2 * 12 * (6 * 4) + 2 * 2 * 12 * (4 * 6)


def test_few_rows_are_factored_and_many_are_dense():
    for rows, factored in ((5, True), (1024, False)):
        use = LayerUse(256, 128, rows, rows, 1, first_order=False, first=False)
        assert (factored_cost(use).time < dense_cost(use, 4).time) == factored


def test_chunks_bound_what_a_pass_keeps(draw):
    """As many tasks a pass as its bytes allow, in even passes; few go in one; a user may say."""
    model = initialised(nn.Linear(IN, OUT))
    maml = MAML(model, "cross_entropy", backend="torch")
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    for rows in (100, 1000):
        plan = maml.plan(*(x.expand(10**6, rows, IN) for _ in range(2)))
        kept = 2 * rows * OUT + 2 * IN * OUT  # results of both passes, and W_0 and W_1
        most = CPU_PASS_BYTES["torch"] // (kept * 8)
        assert most / 2 < plan.chunk_size <= most
        passes = -(-(10**6) // plan.chunk_size)
        assert plan.chunk_size * passes - 10**6 < passes  # all of about one size
    few = maml.plan(*(x.expand(10, 4, IN) for _ in range(2)))
    assert few.chunk_size == 10
    maml.chunk_size = 3
    assert maml.plan(*(x.expand(10, 4, IN) for _ in range(2))).chunk_size == 3


def test_the_cpu_backend_takes_all_tasks_in_one_call(draw):
    """Its memory does not depend on their number."""
    model = initialised(nn.Linear(IN, OUT))
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    plans = [
        MAML(model, "cross_entropy", backend="cpu").plan(*(x.expand(T, 5, IN) for _ in range(2)))
        for T in (10, 10**6)
    ]
    assert [plan.chunk_size for plan in plans] == [10, 10**6]
    assert plans[0].cpu.arena_bytes == plans[1].cpu.arena_bytes
    assert plans[1].cpu.chunks <= 64


def test_rows_in_lanes_for_one_task_of_many_rows():
    """And tasks in lanes for many tasks; factored where rows are few, dense where they are many."""
    machine = cpu_cost.Machine(lanes=16, vector_bytes=64)

    def choose(rows, tasks, steps=1):
        uses = [
            LayerUse(256, 256, rows, rows, steps, first_order=False, first=first)
            for first in (True, False)
        ]
        return cpu_cost.choose(uses, tasks, "auto", machine)

    many_rows, few_rows = choose(1024, 4), choose(5, 512)
    assert many_rows.layout == "rows_in_lanes"
    assert set(many_rows.forms) == {"dense"}
    assert few_rows.layout == "tasks_in_lanes"
    assert set(few_rows.forms) == {"factored"}


def test_auto_leaves_the_cpu_backend_where_an_operation_has_no_cpp(draw, monkeypatch):
    model = initialised(nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, OUT)))
    batch = batch_for(draw)
    monkeypatch.setattr("maml_fast.ops.Tanh.native", None)
    with pytest.raises(UnsupportedModelError, match=r"layer '1' \(tanh\): has no C\+\+ operation"):
        MAML(model, "cross_entropy", backend="cpu")(*batch)
    plan = MAML(model, "cross_entropy").plan(batch.support_x, batch.query_x)
    assert plan.backend == "torch"
    assert "cpu cannot: layer '1' (tanh)" in str(plan)


def test_bytes_that_must_move(draw):
    """The data once; and dense weights of each task's own, where they are in memory."""
    model, x, q = draw.mlp((IN, 5, OUT)), draw.normal(3, 4, IN), draw.normal(3, 7, IN)
    data = 3 * (4 + 7) * IN * 8
    options = dict(inner_steps=2, backend="torch")
    factored = MAML(model, fast_weights="factored", **options).plan(x, q)
    assert factored.bytes == data
    dense = MAML(model, fast_weights="dense", **options).plan(x, q)
    weights = sum(layer.cost.weight_bytes for layer in dense.layers if layer.cost)
    assert dense.bytes == data + 3 * weights > data
    assert MAML(model, backend="reference").plan(x, q).bytes == 0


@pytest.mark.usefixtures("extension")
def test_more_inner_loops_than_one_are_told(draw):
    batch = draw.batch("mse", 2, 3, 4, (3, 5, 2))
    plan = MAML(draw.mlp((3, 5, 2)), "mse", 0.1, 2, step_weights=[0.2, 0, 0.8], backend="cpu").plan(
        batch.support_x, batch.query_x
    )
    assert "losses of 2 steps, each of an inner loop of its own" in str(plan)
    reptile = outer.Reptile()
    for rule, told in ((SGD(), True), (SGD(momentum=0.5), False)):
        maml = MAML(draw.mlp((3, 5, 2)), "mse", meta_gradient=reptile, inner_optimizer=rule)
        plan = maml.plan(batch.support_x, batch.query_x)
        assert ("Reptile by first-order inner loops" in str(plan)) == told


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (nn.ReLU, TypeError, "wanted is a class derived from maml_fast.ops.Operation"),
        (ops.Tanh, ValueError, "Tanh stands for Tanh, tanh, .*which is planned already"),
    ],
)
def test_what_cannot_be_registered_is_refused(kind, error, message):
    before = list(ops.OPERATIONS)
    with pytest.raises(error, match=message):
        register(kind)
    assert before == ops.OPERATIONS
