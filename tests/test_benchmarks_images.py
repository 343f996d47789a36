"""The benchmarks of image networks: peers that are right, operations counted, kinks allowed for."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import check, problem, registry, report, timing
from benchmarks.cases import CASES, CONV4_FIVE_STEPS, Case
from benchmarks.episodes import pictures, sinusoid
from benchmarks.networks import CONV4, CONV4_STRIDED, WIDE, Network
from benchmarks.ours import OurBackend
from benchmarks.peers import AutogradLoop, VmapGrad
from benchmarks.results import Results, Row
from maml_fast import models
from tests.test_benchmarks import CPU, MACHINE, PEERS, shown
from tests.test_benchmarks_gpu import run_on

# Both have frozen gammas and biases that batch norm takes away; the first flattens 2x2 positions of
# several channels, whose order differs between torch and JAX. Where gamma is learned, torch 2.13
# gives a wrong gradient of vmapped batch norm, so peers would rightly fail here.
POOLED = replace(
    CONV4,
    make=lambda: models.omniglot_conv4(5, 3, pooling=True, channels=2, image_size=33),
    row=(2, 33, 33),
    draw=pictures(2, 33),
)
STRIDED = replace(CONV4_STRIDED, make=lambda: models.omniglot_conv4(5, 3))
TINY = {
    "pooled": Case(POOLED, T=3, S=1, N=5, M=10),
    "strided": Case(STRIDED, T=3, S=1, N=5, M=10),
}
BOUND = 1e-5  # no kink lies near in these
ZERO = "4.bias"  # of a convolution before batch norm

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    drawn = problem.load(TINY[request.param], CPU)
    return drawn, check.reference(drawn)


@pytest.fixture(scope="module")
def pooled():
    drawn = problem.load(TINY["pooled"], CPU)
    return drawn, check.reference(drawn)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_gives_the_gradient_of_the_float64_loop(peer, tiny):
    drawn, reference = tiny
    if why := peer.cannot(drawn):
        pytest.skip(why)
    step = peer.prepare(drawn)
    errors = reference.errors(*step.read(step.run()))
    adapting = {name for name, value in drawn.model.named_parameters() if value.requires_grad}
    assert errors.keys() == {"loss", *adapting}
    assert check.broken(errors, dict.fromkeys(errors, BOUND)) is None


def test_a_first_order_gradient_is_beyond_what_kinks_excuse(tiny):
    drawn, reference = tiny
    step = AutogradLoop().prepare(replace(drawn, case=replace(drawn.case, S=0)))
    errors = reference.errors(*step.read(step.run()))
    assert check.broken(errors, reference.bounds(strict=False))


def test_a_gradient_that_is_zero_is_judged_beside_the_largest(pooled):
    _, reference = pooled
    gradient = reference.gradient
    largest = max(value.norm().item() for value in gradient.values())
    assert gradient[ZERO].norm() < 1e-12 * largest
    wrong = torch.zeros_like(gradient[ZERO])
    wrong[0] = 1e-3 * largest
    assert reference.errors(reference.loss, gradient)[ZERO] == 0
    errors = reference.errors(reference.loss, {**gradient, ZERO: wrong})
    assert errors[ZERO] == pytest.approx(1e-3)
    assert sum(errors.values()) == errors[ZERO]


class Single(OurBackend):
    """Exact but for rounding its gradient to float32."""

    def __init__(self):
        super().__init__("torch")
        self.name, self.title = "single", "rounds"

    def prepare(self, drawn):
        step = super().prepare(drawn)

        def read(result):
            loss, gradient = step.read(result)
            return loss, {name: value.float() for name, value in gradient.items()}

        return step._replace(read=read)


def test_ours_are_held_to_float64_where_kinks_are(pooled):
    drawn, reference = pooled
    errors = check.in_double(OurBackend("torch"), drawn, reference)
    assert errors.keys() == reference.autograd.keys()
    assert check.broken(errors, dict.fromkeys(errors, 1e-12)) is None
    errors = check.in_double(Single(), drawn, reference)
    assert check.broken(errors, dict.fromkeys(errors, check.EXACT))
    assert "float64, on 2 tasks" in reference.allowance(strict=False)
    assert check.in_double(OurBackend("torch"), drawn, replace(reference, few=None)) is None
    no_double = OurBackend("triton")  # on a CPU it cannot run at all
    assert check.in_double(no_double, drawn, reference) is None


def test_a_run_tells_the_error_in_float64_and_refuses_one_that_is_too_large(
    tmp_path, pooled, monkeypatch
):
    measured = (OurBackend("torch"), Single(), VmapGrad())
    monkeypatch.setattr(registry, "implementations", lambda: measured)
    monkeypatch.setattr(timing, "problem_and_reference", lambda *_: pooled)
    code, file = run_on("cpu", tmp_path, "--case=conv4-T32-S1", "--no-memory", "--minutes=1")
    assert code == 1
    results = Results.load(file)
    ours, single, vmap = results.rows
    assert (ours.status, single.status, vmap.status) == ("timed", "wrong", "timed")
    assert ours.double_error < 1e-12
    assert single.reason.startswith("in float64 the error of ")
    assert vmap.double_error is None
    assert f"in float64 {ours.double_error:.1e}" in shown(results)


def test_a_call_beyond_the_limit_is_timed_by_the_one_that_is_checked(tmp_path, pooled, monkeypatch):
    calls = []

    class Slow(VmapGrad):
        def prepare(self, drawn):
            step = super().prepare(drawn)
            return step._replace(run=lambda: calls.append(0) or step.run())

    from benchmarks import __main__ as command

    settings = timing.Settings("cpu", limit_s=1e-9, peak=False)
    monkeypatch.setattr(command, "_settings", lambda *_: settings)
    monkeypatch.setattr(registry, "implementations", lambda: (Slow(),))
    monkeypatch.setattr(timing, "problem_and_reference", lambda *_: pooled)
    code, file = run_on("cpu", tmp_path, "--case=conv4-T32-S1")
    assert code == 0
    (row,) = Results.load(file).rows
    assert row.status == "timed"
    assert len(row.times) == len(calls) == 1
    assert "timed once" in shown(Results.load(file))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_what_compiles_for_too_long_is_skipped_and_the_next_is_not(tmp_path, pooled, monkeypatch):
    class Compiles(VmapGrad):
        name = "compiles"

        def prepare(self, drawn):
            while True:
                pass

    from benchmarks import __main__ as command

    settings = timing.Settings("cpu", seconds=0.1, ready_s=5.0, peak=False)
    monkeypatch.setattr(command, "_settings", lambda *_: settings)
    monkeypatch.setattr(registry, "implementations", lambda: (Compiles(), VmapGrad()))
    monkeypatch.setattr(timing, "problem_and_reference", lambda *_: pooled)
    code, file = run_on("cpu", tmp_path, "--case=conv4-T32-S1")
    assert code == 0
    compiles, vmap = Results.load(file).rows
    assert (compiles.status, vmap.status) == ("skipped", "timed")
    assert compiles.reason == "for time: not ready within 5 s"


def hand() -> nn.Sequential:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    norm.weight.requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)
    )


def test_operations_of_a_convolution_are_those_of_an_example_by_hand():
    # An image of 2x5x4 becomes 3x3x2: 18 numbers of 2*3*3 multiply-adds, 2 * 18 * 18 = 648
    # operations; then 4 numbers of 18, 144 operations.
    network = Network("hand", "by hand", hand, (2, 5, 4), "mse", 0.1, sinusoid)
    assert network.forward_flops(5) == [5 * 648, 5 * 144]
    # Support, 5 rows: F = 3960, F1 = 3240. Query, 7 rows: F = 5544, F1 = 4536.
    # S(3F_s - F1_s) = 2 * 8640; 3F_q - F1_q = 12096; S(6F_s - 4F1_s) = 2 * 10800.
    assert Case(network, T=4, S=2, N=5, M=7).flops == 4 * (17280 + 12096 + 21600)
    assert network.parameters == 54 + 3 + 3 + 72 + 4  # without the frozen gamma
    assert network.units == 18 + 4
    assert not network.strict
    # 12 rows of 22 units are more numbers than the parameters.
    assert problem.tasks_at_once(Case(network, T=4, S=2, N=5, M=7), CPU) == 2**23 // (12 * 22)


def test_a_network_without_kinks_or_kept_off_them_is_strict():
    def smooth():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))

    network = Network("smooth", "smooth", smooth, (1, 4, 4), "mse", 0.1, sinusoid)
    assert network.strict
    assert not WIDE.strict
    assert replace(WIDE, off_kink=True).strict


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tasks_fit_their_network(case):
    network = case.network
    drawn = network.draw(torch.Generator().manual_seed(0), 2, case.N, case.M)
    assert drawn.support_x.shape == (2, case.N, *network.row)
    assert drawn.query_x.shape == (2, case.M, *network.row)
    outputs = network.build()(drawn.support_x[1])
    if network.loss == "cross_entropy":
        assert drawn.query_y.shape == (2, case.M)
        assert drawn.support_y[1].tolist() == [i % 5 for i in range(case.N)]
        assert outputs.shape == (case.N, 5)
    else:
        assert outputs.shape == drawn.support_y[1].shape
    assert network.title in case.title


def test_pictures_of_a_class_are_alike_and_no_two_pixels_equal():
    drawn = pictures(3, 20)(torch.Generator().manual_seed(0), 2, 5, 10)
    again = pictures(3, 20)(torch.Generator().manual_seed(0), 2, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    for task in range(2):
        support, query = drawn.support_x[task].flatten(1), drawn.query_x[task].flatten(1)
        nearest = torch.cdist(query, support).argmin(1)
        assert torch.equal(drawn.support_y[task][nearest], drawn.query_y[task])
        assert not torch.equal(drawn.support_x[0], drawn.support_x[1])
        windows = nn.functional.unfold(drawn.query_x[task], 2, stride=2).unflatten(1, (3, 4))
        differences = windows.sort(2).values.diff(dim=2)
        assert differences.min() >= 0
        assert (differences == 0).float().mean() < 1e-3


def test_a_layer_that_is_not_written_for_jax_is_named():
    pytest.importorskip("jax", reason="jax is not installed")
    from benchmarks.peers import jax_layers

    with pytest.raises(TypeError, match="layer 1 is Softplus; written for JAX are Linear, Conv2d"):
        jax_layers.network(nn.Sequential(nn.Linear(1, 2), nn.Softplus()))


@pytest.mark.parametrize("scale", [False, True])
def test_layers_written_for_jax_give_what_torch_gives(scale):
    pytest.importorskip("jax", reason="jax is not installed")
    from benchmarks.peers import jax_layers

    for make, shape in (
        (models.omniglot_conv4, (6, 1, 28, 28)),
        (POOLED.make, (6, 2, 33, 33)),
        (models.omniglot_mlp, (6, 784)),
    ):
        model = make() if make is POOLED.make else make(scale=scale)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=generator)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=generator)
        theta = {name: jax_layers.weights(value) for name, value in problem.adapting(model).items()}
        found = jax_layers.network(model)(theta, jax_layers.images_last(x[None])[0])
        assert torch.allclose(torch.from_numpy(np.array(found)), model(x), rtol=1e-4, atol=1e-5)


def test_the_peak_memory_of_five_steps_is_set_against_the_loop():
    name = CONV4_FIVE_STEPS.name
    rows = [
        Row(name, "cpu", "ours", True, 1, "timed", times=[1.0], peak_bytes=20_000_000),
        Row(name, "loop", "loop", False, 1, "timed", times=[5.0], peak_bytes=100_000_000),
    ]
    lines = shown(Results(MACHINE, {}, rows)).splitlines()
    goals = lines[lines.index(next(line for line in lines if "as a share of a peer" in line)) :]
    (line,) = (line for line in goals if name in line)
    assert "0.200" in line
    assert "met" in line
    assert any(goal.case == name and goal.at_most == 1 / 4 for goal in report.GOALS)
