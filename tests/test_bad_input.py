"""What does not fit is refused by name, with what was found and what is wanted."""

import pytest
import torch
from torch import nn

from maml_fast import (
    MAML,
    NonFiniteError,
    UnavailableBackendError,
    UnsupportedModelError,
    cpu_features,
    triton_features,
)
from tests.networks import Draw

T, N, M, IN, OUT = 3, 4, 5, 6, 2
BACKENDS = ["reference", "functional", "torch", "cpu", "auto"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def model():
    return Draw(0).mlp((IN, 5, OUT))


def good(loss="mse"):
    return Draw(1).batch(loss, T, N, M, (IN, OUT))._asdict()


def call(data, backend, loss="mse", **options):
    return MAML(model(), loss, backend=backend, **options)(**data)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"support_x": [1.0, 2.0]}, TypeError, "support_x is list; wanted is a torch.Tensor"),
        ({"query_y": None}, TypeError, "query_y is NoneType"),
        ({"query_y": torch.zeros(T).numpy()}, TypeError, "query_y is ndarray"),
        ({"support_x": torch.zeros(4).double()}, ValueError, r"support_x has shape \[4\]"),
        ({"query_x": torch.zeros(2, M, IN).double()}, ValueError, "query_x has 2 tasks.*has 3"),
        ({"support_y": torch.zeros(4, N, OUT).double()}, ValueError, "support_y has 4 tasks"),
        ({"support_y": torch.zeros(T, 9, OUT).double()}, ValueError, "support_y has rows 9.* 4"),
        ({"query_y": torch.zeros(T, N, OUT).double()}, ValueError, "query_y has rows 4.* 5"),
        ({"query_x": torch.zeros(T, M, 7).double()}, ValueError, r"query_x has features \[7\]"),
        (
            {
                "support_x": torch.zeros(T, N, 7).double(),
                "query_x": torch.zeros(T, M, 7).double(),
            },
            ValueError,
            r"support_x has rows of shape \[7\].*Sequential cannot take",
        ),
        (
            {
                "support_y": torch.zeros(T, N, 3).double(),
                "query_y": torch.zeros(T, M, 3).double(),
            },
            ValueError,
            r"support_y has rows of shape \[3\].*prediction has \[2\]",
        ),
        (
            {
                "support_y": torch.zeros(T, N, 1).double(),
                "query_y": torch.zeros(T, M, 1).double(),
            },
            ValueError,
            r"support_y has rows of shape \[1\].*prediction has \[2\]",
        ),
        ({"support_x": torch.zeros(T, N, IN)}, TypeError, "float"),
        ({"query_x": torch.zeros(T, M, IN)}, TypeError, "query_x is torch.float32.*float64"),
        ({"query_y": torch.zeros(T, M, OUT)}, TypeError, "query_y is torch.float32.*float64"),
        ({"support_x": torch.zeros(T, 0, IN).double()}, ValueError, "support_x.*at least one row"),
        ({"support_x": torch.zeros(0, N, IN).double()}, ValueError, "support_x.*at least one task"),
        ({"query_x": torch.zeros(T, 0, IN).double()}, ValueError, "query_x.*at least one row"),
        ({"support_x": torch.zeros(T, N, IN).cdouble()}, TypeError, "support_x is torch.complex"),
        ({"support_x": torch.zeros(T, N, IN).double().to_sparse()}, TypeError, "support_x.*layout"),
        (
            {"query_x": torch.zeros(T, M, IN, device="meta").double()},
            TypeError,
            "query_x is a meta tensor",
        ),
        (
            {"query_y": torch.zeros(T, M, OUT).double().requires_grad_()},
            ValueError,
            "query_y requires grad",
        ),
    ],
)
def test_data_that_do_not_fit(backend, changes, error, words):
    with pytest.raises(error, match=words):
        call({**good(), **changes}, backend)


def test_whole_numbers_for_a_network_of_real_ones(backend):
    data = good()
    data |= {"support_x": torch.ones(T, N, IN).long(), "query_x": torch.ones(T, M, IN).long()}
    with pytest.raises(TypeError, match="support_x.*int64"):
        call(data, backend)


def test_a_model_of_another_type(backend):
    data = {name: t.float() for name, t in good().items() if t is not None}
    with pytest.raises(TypeError, match="support_x is torch.float32; the model is torch.float64"):
        call(data, backend)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"support_y": torch.full((T, N), 2)}, ValueError, "support_y.*from 2 to 2.*0 to 1"),
        ({"query_y": torch.full((T, M), -1)}, ValueError, "query_y.*from -1 to -1.*0 to 1"),
        ({"query_y": torch.full((T, M), -100)}, ValueError, "query_y.*-100"),
        (
            {"support_y": torch.zeros(T, N), "query_y": torch.zeros(T, M)},
            TypeError,
            "support_y is torch.float32.*int64 classes",
        ),
        (
            {"support_y": torch.zeros(T, N).int(), "query_y": torch.zeros(T, M).int()},
            TypeError,
            "support_y is torch.int32.*int64 classes",
        ),
        (
            {"support_y": torch.zeros(T, N, OUT).long(), "query_y": torch.zeros(T, M, OUT).long()},
            ValueError,
            r"support_y has shape \[3, 4, 2\].*\[tasks, rows\]",
        ),
    ],
)
def test_classes_that_do_not_fit(backend, changes, error, words):
    with pytest.raises(error, match=words):
        call({**good("cross_entropy"), **changes}, backend, "cross_entropy")


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_classes_that_do_not_fit_a_call_like_an_earlier_one(backend, mode, chunk_size):
    """A call that was right once is not checked again in full; its class numbers are."""
    data = good("cross_entropy")
    maml = MAML(model(), "cross_entropy", backend=backend, chunk_size=chunk_size)
    with mode():
        maml(**data)
        data["query_y"] = data["query_y"] + OUT
        with pytest.raises(ValueError, match=f"query_y.*wanted is 0 to {OUT - 1}"):
            maml(**data)


@pytest.mark.parametrize("loss", ["bce_with_logits", "huber"])
def test_class_targets_for_a_loss_of_real_ones(backend, loss):
    data = {**good(), "support_y": torch.ones(T, N, OUT).long()}
    data["query_y"] = torch.ones(T, M, OUT).long()
    with pytest.raises(TypeError, match="support_y is torch.int64.*float64"):
        call(data, backend, loss)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "mae"}, ValueError, "loss is 'mae'.*mse"),
        ({"loss": 3}, TypeError, "loss is int"),
        ({"inner_steps": -1}, ValueError, "inner_steps is -1.*0 or more"),
        ({"inner_steps": 1.5}, TypeError, "inner_steps is 1.5"),
        ({"inner_steps": True}, TypeError, "inner_steps is True"),
        ({"first_order": 1}, TypeError, "first_order is 1"),
        ({"reduction": "none"}, ValueError, "reduction is 'none'.*mean.*sum"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'.*auto"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0.*1 or more"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is 2.0"),
        ({"fast_weights": "sparse"}, ValueError, "fast_weights is 'sparse'"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        MAML(model(), **options)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match=r"model is function; wanted is an nn.Module"):
        MAML(lambda x: x)


@pytest.mark.parametrize(
    ("has_triton", "words"),
    [(False, "package triton is not installed"), (True, "no GPU.*TRITON_INTERPRET=1.*'torch'")],
)
def test_triton_without_what_it_needs(monkeypatch, has_triton, words):
    monkeypatch.setattr(triton_features, "installed", lambda: has_triton)
    monkeypatch.setattr(triton_features, "interpreted", lambda: False)
    monkeypatch.setattr(triton_features, "asked_to_interpret", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableBackendError, match=f"'triton'.*{words}"):
        call(good(), "triton")
    call(good(), "auto")


def test_cpu_without_its_extension(monkeypatch):
    monkeypatch.setattr(cpu_features, "_load", lambda: (None, "it was not built: no compiler"))
    cpu_features.extension.cache_clear()
    try:
        with pytest.raises(UnavailableBackendError, match=r"_cpu is missing.*no compiler.*Install"):
            call(good(), "cpu")
        plan = MAML(model()).plan(good()["support_x"], good()["query_x"])
        assert plan.backend == "torch"
        assert "cpu cannot: the C++ extension maml_fast._cpu is missing" in plan.reason
    finally:
        cpu_features.extension.cache_clear()


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.linear, self.what = nn.Linear(IN, OUT, dtype=torch.float64), what

    def forward(self, x):
        return self.what(self.linear(x))


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda z: (z, z), TypeError, "model returns tuple"),
        (lambda z: z.sum(), ValueError, r"model returns shape \[\] for 4 rows"),
        (lambda z: z[:1], ValueError, r"model returns shape \[1, 2\] for 4 rows"),
    ],
)
def test_models_that_return_something_else(backend, what, error, words):
    with pytest.raises(error, match=words):
        MAML(Returns(what), backend=backend)(**good())


@pytest.mark.parametrize("backend", ["reference", "functional"])
def test_a_callable_loss_must_be_a_scalar(backend):
    maml = MAML(model(), lambda z, y: (z - y).square(), backend=backend)
    with pytest.raises(ValueError, match=r"loss returns shape \[4, 2\].*scalar"):
        maml(**good())


class TestNonFinite:
    def test_losses_name_their_tasks(self, backend):
        data = good()
        data["support_x"][1, 2, 3] = float("nan")
        with pytest.raises(NonFiniteError, match="support loss before inner step 0.*1 of 3.*: 1"):
            call(data, backend)

    def test_query_losses_name_their_tasks(self, backend):
        data = good()
        data["query_y"][2, 0, 0] = float("inf")
        data["query_y"][0, 0, 0] = float("nan")
        maml = MAML(model(), backend=backend)
        with pytest.raises(NonFiniteError, match="the query loss.*2 of 3 tasks: 0, 2") as caught:
            maml(**data)
        assert caught.value.tasks == [0, 2]
        assert all(p.grad is None for p in maml.parameters())

    def test_divergence_is_named(self, backend):
        with pytest.raises(NonFiniteError, match="lower inner_lr"):
            call(good(), backend, inner_lr=1e200, inner_steps=3)

    @pytest.mark.parametrize("grad", [True, False])
    def test_in_a_later_pass(self, backend, grad):
        data = good()
        maml = MAML(model(), backend=backend, chunk_size=1)
        with torch.set_grad_enabled(grad):
            maml(**data)
            data["support_x"][T - 1] = torch.nan
            with pytest.raises(NonFiniteError, match=f"1 of {T} tasks: {T - 1}"):
                maml(**data)

    def test_under_no_grad_too(self, backend):
        data = good()
        data["query_x"][0] = float("nan")
        with torch.no_grad(), pytest.raises(NonFiniteError, match="the query loss"):
            call(data, backend)

    def test_gradients_name_their_tasks(self, backend):
        """A finite loss whose derivative overflows: 1e160^2 in the Hessian-vector product."""
        one = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(one.weight)
        x = torch.tensor([1.0, 1e100, 1.0], dtype=torch.float64).view(3, 1, 1)
        zero = torch.zeros_like(x)
        # w = 0 and y = 0 keep both losses 0 but for the query's own target
        maml = MAML(one, inner_lr=1e110, backend=backend)
        with pytest.raises(NonFiniteError, match=r"meta-gradient of \['weight'\].*1 of 3 tasks: 1"):
            maml(x, zero, torch.ones_like(x), torch.ones_like(x))


class TestAdapt:
    def test_data_that_do_not_fit(self, backend):
        maml, data = MAML(model(), backend=backend), good()
        with pytest.raises(ValueError, match="support_y has rows 5"):
            maml.adapt(data["support_x"], data["query_y"])
        with pytest.raises(TypeError, match="support_y is NoneType"):
            maml.adapt(data["support_x"], None)
        with pytest.raises(ValueError, match="inner_steps is -2"):
            maml.adapt(data["support_x"], data["support_y"], inner_steps=-2)

    def test_queries_that_do_not_fit(self, backend):
        maml, data = MAML(model(), backend=backend), good()
        adapted = maml.adapt(data["support_x"], data["support_y"])
        with pytest.raises(ValueError, match=r"query_x has shape \[2, 5, 6\].*3 tasks"):
            adapted(data["query_x"][:2])
        with pytest.raises(ValueError, match=r"query_x has features \[4\].*\[6\]"):
            adapted(data["query_x"][..., :4])
        with pytest.raises(TypeError, match="query_x is list"):
            adapted([1])
        with pytest.raises(TypeError, match="query_x is torch.float32"):
            adapted(data["query_x"].float())

    def test_support_losses_that_are_not_finite(self, backend):
        maml, data = MAML(model(), backend=backend), good()
        data["support_y"][1] = float("nan")
        with pytest.raises(NonFiniteError, match="support loss.*1 of 3 tasks: 1"):
            maml.adapt(data["support_x"], data["support_y"])


def test_forced_forms_need_the_planned_engine():
    for backend in ("reference", "functional"):
        with pytest.raises(UnsupportedModelError, match="fast_weights='dense'"):
            call(good(), backend, fast_weights="dense")
