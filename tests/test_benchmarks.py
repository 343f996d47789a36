"""The benchmarks' own code: peers are right, operations are counted right, nothing is left out."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import check, memory, plot, problem, report
from benchmarks.cases import CASES, Case, choose
from benchmarks.episodes import sinusoid
from benchmarks.networks import OMNIGLOT_FC, POLICY, SINUSOID, perceptron
from benchmarks.peers import AutogradLoop, CompiledVmapGrad, JaxJit, ParallelMetalearn, VmapGrad
from benchmarks.results import Results, Row

pytestmark = pytest.mark.usefixtures("alone")

CPU = torch.device("cpu")
TINY = {
    "omniglot-fc": Case(OMNIGLOT_FC, T=2, S=1, N=5, M=15),
    "policy": Case(POLICY, T=3, S=2, N=4, M=6),
}
# "eager" traces as "inductor" does, and spares the tests its compiler.
PEERS = [AutogradLoop(), VmapGrad(), CompiledVmapGrad("eager"), JaxJit(), ParallelMetalearn()]
MACHINE = {
    "device": "cpu",
    "cpu": "a processor",
    "cores": 2,
    "flags": ["avx2"],
    "load_before": 3.5,
    "torch_threads": 2,
    "torch_instructions": "AVX2",
    "python": "3.11.0",
    "versions": {"torch": "2.13.0"},
    "commit": "unknown",
    "date": "2026-01-31T00:00:00+00:00",
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    drawn = problem.load(TINY[request.param], CPU)
    return drawn, check.reference(drawn)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_gives_the_gradient_of_the_float64_loop(peer, tiny):
    drawn, reference = tiny
    if why := peer.cannot(drawn):
        pytest.skip(why)
    step = peer.prepare(drawn)
    errors = reference.errors(*step.read(step.run()))
    assert check.broken(errors, dict.fromkeys(errors, 2e-6)) is None


@pytest.mark.parametrize("peer", [AutogradLoop(), VmapGrad()], ids=lambda peer: peer.name)
def test_a_second_run_does_not_add_to_the_first(peer, tiny):
    drawn, reference = tiny
    step = peer.prepare(drawn)
    step.run()
    errors = reference.errors(*step.read(step.run()))
    assert check.broken(errors, dict.fromkeys(errors, 2e-6)) is None


def test_the_stand_in_for_the_loop_agrees_with_it(monkeypatch):
    drawn = problem.load(Case(SINUSOID, T=9, S=2, N=5, M=5), CPU)
    by_loop = check.reference(drawn)
    monkeypatch.setattr(check, "LOOP_TASKS", 4)
    monkeypatch.setattr(check, "tasks_at_once", lambda *_: 4)  # 9 tasks in 4, 4 and 1
    by_vmap = check.reference(drawn)
    assert "loop in float64" in by_loop.how
    assert "vmap in float64" in by_vmap.how
    errors = by_loop.errors(by_vmap.loss, by_vmap.gradient)
    assert check.broken(errors, dict.fromkeys(errors, 1e-12)) is None


def test_a_first_order_gradient_is_found_wrong(tiny):
    drawn, reference = tiny
    step = AutogradLoop().prepare(replace(drawn, case=replace(drawn.case, S=drawn.case.S - 1)))
    errors = reference.errors(*step.read(step.run()))
    assert check.broken(errors, reference.bounds(strict=True))
    assert check.broken(errors, reference.bounds(strict=False))


def test_an_error_that_is_not_a_number_is_the_worst_and_beyond_any_bound():
    errors = {"a": 0.5, "b": float("nan"), "c": 2.0}
    assert check.worst(errors)[0] == "b"
    assert "error of b is nan" in check.broken(errors, dict.fromkeys(errors, 10.0))


def test_a_gradient_that_lacks_a_parameter_is_refused(tiny):
    _, reference = tiny
    gradient = {name: value for name, value in reference.gradient.items() if name != "0.bias"}
    with pytest.raises(ValueError, match="gradients of"):
        reference.errors(reference.loss, gradient)


def test_problems_are_drawn_alike_each_time_and_stay_off_the_kinks():
    case = Case(SINUSOID, T=200, S=3, N=10, M=10)
    first, second = problem.load(case, CPU), problem.load(case, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first.episodes, second.episodes, strict=True))
    assert first.episodes.tasks == 200
    assert problem.distance_to_kink(case, first.model, first.episodes).min() > problem.KINK


def test_the_distance_to_a_kink_is_the_nearest_pre_activation():
    network = perceptron("one", (1, 2, 1), nn.ReLU, "mse", 0.01, sinusoid)
    case = Case(network, T=1, S=0, N=1, M=2)
    model = network.build()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [4.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 0.0]))
    drawn = sinusoid(torch.Generator().manual_seed(0), 1, 1, 2)
    drawn = drawn._replace(query_x=torch.tensor([[[1.0], [2.0]]]))  # z: 1.5, 4, 2.5, 8
    assert problem.distance_to_kink(case, model, drawn).tolist() == [1.5 / 8]


def test_operations_are_those_of_an_example_by_hand():
    # 2-3-1: a row takes 2*2*3 = 12 operations in the first layer, 2*3*1 = 6 in the second.
    network = perceptron("hand", (2, 3, 1), nn.ReLU, "mse", 0.1, sinusoid)
    # Support, 5 rows: F = 90, F1 = 60. Query, 7 rows: F = 126, F1 = 84.
    # S(3F_s - F1_s) = 2 * 210; 3F_q - F1_q = 294; S(6F_s - 4F1_s) = 2 * 300: 1314 a task.
    assert Case(network, T=4, S=2, N=5, M=7).flops == 4 * 1314
    assert network.parameters == 13


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert choose(names, ["sinusoid-T25-S1"]) == ["sinusoid-T25-S1"]
    with pytest.raises(ValueError, match="matches none"):
        choose(names, ["sinusoid-T26*"])


def found() -> Results:
    """Two cases, one won and one lost, with every way of not being timed."""
    won, lost = "omniglot-fc-T512-S1", "sinusoid-T25-S1"

    def row(case: str, name: str, error: float | None = None, **facts) -> Row:
        facts = {
            "status": "timed",
            "reason": "",
            "errors": {"0.bias": error} if error else {},
        } | facts
        return Row(case, name, f"title of {name}", name in ("torch", "functional"), 10**9, **facts)

    rows = [
        row(won, "torch", 2.5e-7, times=[0.001, 0.002, 0.003], peak_bytes=5_000_000),
        row(won, "vmap", 1e-7, times=[0.008] * 3, peak_bytes=100_000_000),
        row(won, "loop", status="skipped", reason="about 300 s a call"),
        row(lost, "torch", 1e-7, times=[0.004]),
        row(lost, "functional", 3.0, status="wrong", reason="the error of 0.bias is 3"),
        row(lost, "jax", 1e-7, times=[0.001]),
        row(lost, "compile", status="failed", reason="RuntimeError: no compiler"),
        row(lost, "parallel-metalearn", status="cannot", reason="it is not installed"),
    ]
    return Results(MACHINE, {won: "autograd loop in float64"}, rows)


def shown(results: Results) -> str:
    stream = StringIO()
    report.show(results, Console(file=stream, width=220))
    return stream.getvalue()


def test_the_report_shows_won_lost_wrong_failed_and_skipped_alike():
    results = found()
    text = shown(results)
    for row in results.rows:
        assert row.title in text
        assert row.reason in text
    for word in (
        "OTHER PROGRAMS WERE RUNNING (load 3.5",
        "wrong",
        "failed",
        "cannot",
        "skipped",
        "2.5e-07 0.bias",
        "3.0e+00 0.bias",
    ):
        assert word in text
    lines = text.splitlines()
    summary = lines[lines.index(next(line for line in lines if "fastest of ours" in line)) :]
    assert any("omniglot-fc-T512-S1" in line and "won" in line and "4x" in line for line in summary)
    assert any("sinusoid-T25-S1" in line and "LOST" in line and "0.25x" in line for line in summary)
    assert any("0.050" in line and "met" in line for line in summary)


def test_results_survive_their_file_and_draw_a_picture(tmp_path):
    results = found()
    results.save(tmp_path / "run.json")
    assert Results.load(tmp_path / "run.json") == results
    plot.save(results, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_has_the_spread_of_its_times():
    row = Row("a", "b", "c", True, flops=6 * 10**9, times=[float(n) for n in range(1, 12)])
    assert row.median == 6.0
    assert row.spread == (3.0, 9.0)
    assert row.gflops == 1.0


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="only Linux tells a process's peak memory")
def test_peak_memory_is_that_of_the_call():
    kept = torch.ones(2**22)  # 16 MiB that were there before
    peak = memory.resident(lambda: torch.ones(2**24).sum())  # 64 MiB that are gone after
    assert kept.sum() == 2**22
    if peak.bytes is None:
        pytest.skip(peak.reason)
    assert 60e6 < peak.bytes < 90e6


def test_a_run_measures_what_it_is_asked_and_writes_it_down(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    from benchmarks.__main__ import main

    arguments = ["--case=sinusoid-T25-S1", "--implementation=loop", "--quick", "--no-memory"]
    assert main([*arguments, "--device=cpu", f"--out={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*.json")
    (row,) = Results.load(file).rows
    assert (row.case, row.implementation, row.status) == ("sinusoid-T25-S1", "loop", "timed")
    assert len(row.times) >= 3
    assert file.with_suffix(".png").exists()
    assert main([f"--show={file}"]) == 0


def test_the_results_in_the_repository_can_be_shown():
    files = sorted(Path(report.__file__).with_name("results").glob("*.json"))
    assert files
    for file in files:
        results = Results.load(file)
        text = shown(results)
        assert all(case in text for case in results.cases)
