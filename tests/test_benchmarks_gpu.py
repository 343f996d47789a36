"""The benchmarks where there is a GPU, as far as a pretended one shows it: budget, floors, rows."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from benchmarks import check, gpu, problem, registry
from benchmarks.budget import RESERVE_S, Budget, OutOfTime, in_order_of_need
from benchmarks.cases import CASES
from benchmarks.ours import AtPrecision, OurBackend, threads
from benchmarks.peers import CompiledVmapGrad, VmapGrad
from benchmarks.results import Results, Row
from tests.test_benchmarks import CPU, MACHINE, shown, tiny

__all__ = ["tiny"]  # a fixture

H100 = "NVIDIA H100 80GB HBM3"
ON_GPU = SimpleNamespace(
    episodes=SimpleNamespace(support_x=SimpleNamespace(device=torch.device("cuda")))
)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def pretended(monkeypatch):
    """A GPU whose work the CPU does."""
    answers = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1_000,
        "max_memory_allocated": 6_000,
        "get_device_name": H100,
        "get_device_properties": SimpleNamespace(
            total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(check, "load", lambda case, _: problem.load(case, CPU))
    monkeypatch.setattr(gpu, "state", lambda: {"driver": "580.1", "sm_clock_mhz": "1980"})
    check.problem_and_reference.cache_clear()
    with threads(1):
        yield
    check.problem_and_reference.cache_clear()


class Fails(VmapGrad):
    name = "fails"

    def prepare(self, problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\nadvice")


def run_on(device, folder, *arguments):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    from benchmarks.__main__ import main

    code = main([*arguments, f"--device={device}", f"--out={folder}"])
    (file,) = folder.glob("*.json")
    return code, file


def test_a_run_on_a_gpu(tmp_path, pretended, monkeypatch):
    planned = SimpleNamespace(cpu=None, flops=669_000, bytes=6_700_000)  # 10 ns, and 2 us
    ceiling = OurBackend.ceiling
    monkeypatch.setattr(OurBackend, "_plan", lambda *_: planned)
    monkeypatch.setattr(OurBackend, "ceiling", lambda self, _: ceiling(self, ON_GPU))
    measured = (OurBackend("torch"), VmapGrad(), Fails())
    monkeypatch.setattr(registry, "implementations", lambda: measured)
    code, file = run_on("cuda", tmp_path, "--case=sinusoid-T25-S1", "--quick", "--minutes=2")
    assert code == 0
    assert file.name.startswith("nvidia-h100-80gb-hbm3-")
    content = json.loads(file.read_text())
    assert content["machine"]["minutes"] == 2
    assert content["machine"]["gpu"]["before"] == content["machine"]["gpu"]["after"]
    ours, vmap, failed = content["rows"]
    assert ours["status"] == vmap["status"] == "timed"
    assert 3 < len(ours["times"]) <= 500
    assert ours["peak_bytes"] == 5_000
    assert ours["floor_seconds"] == pytest.approx(2e-6)
    for row in (ours, vmap):  # one by its own plan, one by the case's
        assert row["share_of_floor"] == pytest.approx(2e-6 / row["seconds"]["p50"])
    assert ours["gbytes_per_second"] == pytest.approx(6.7e-3 / ours["seconds"]["p50"])
    assert failed["status"] == "failed"
    assert failed["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 90 GiB"
    text = shown(Results.load(file))
    for words in (
        "sm_clock_mhz 1980",
        "floor: 2 us",
        "TF/s done",
        "66.9 TF/s",
        "The run had 2 min",
    ):
        assert words in text


def test_a_gpu_that_an_implementation_breaks_and_a_precision_that_the_reference_has_not(
    tmp_path, pretended, monkeypatch
):
    precisions = []

    def load(case, device):
        precisions.append(torch.get_float32_matmul_precision())
        return problem.load(case, CPU)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nadvice")

    class Breaks(VmapGrad):
        name = "breaks"

        def prepare(self, drawn):
            monkeypatch.setattr(torch.cuda, "synchronize", broken)
            return super().prepare(drawn)

    class Seen(AtPrecision):
        def prepare(self, drawn):
            precisions.append(torch.get_float32_matmul_precision())
            return super().prepare(drawn)

    measured = (Seen("torch", "medium"), Breaks(), VmapGrad())
    monkeypatch.setattr(check, "load", load)
    monkeypatch.setattr(registry, "implementations", lambda: measured)
    _, file = run_on("cuda", tmp_path, "--case=sinusoid-T25-S1", "--quick")
    assert precisions == ["highest", "medium"]
    ours, breaks, after = Results.load(file).rows
    assert (ours.status, ours.precision) == ("timed", "medium")
    assert breaks.status == "failed"
    assert after.status == "skipped"
    for row in (breaks, after):
        assert "CUDA error: an illegal memory access" in row.reason


def test_a_run_without_time_says_so_for_each_row(tmp_path):
    arguments = ("--case=sinusoid-T25-*", "--implementation=vmap", "--minutes=0.2")
    code, file = run_on("cpu", tmp_path, *arguments)
    results = Results.load(file)
    assert code == 0
    assert len(results.rows) == 2
    assert all(row.status == "skipped" and "0.2 minutes" in row.reason for row in results.rows)
    assert "2 of 2 rows were skipped" in shown(results)


def test_the_budget_leaves_out_what_would_end_too_late():
    now = [100.0]
    budget = Budget(1 + RESERVE_S / 60, clock=lambda: now[0])  # a minute
    compiled, vmap = CompiledVmapGrad(), VmapGrad()
    guess = compiled.seconds_a_pass
    assert budget.needs(compiled, inner_steps=1) == 2 * guess
    budget.note(compiled, inner_steps=1, seconds=20.0)
    budget.note(compiled, inner_steps=3, seconds=4.0)  # the slowest counts
    assert budget.needs(compiled, inner_steps=4) == 50.0
    assert budget.refusal(compiled, 4, rounds_s=10.0) is None
    assert "may take 61 s" in budget.refusal(compiled, 4, rounds_s=11.0)
    now[0] += 55.0
    assert "5 s are left" in budget.refusal(compiled, 0, rounds_s=0.0)
    assert budget.refusal(vmap, 4, rounds_s=0.5) is None
    now[0] += 55.0
    assert " 0 s are left" in budget.refusal(vmap, 0, rounds_s=0.5)
    assert Budget(None).refusal(compiled, 1000, 1e6) is None


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_what_takes_too_long_is_stopped_and_the_next_is_not():
    before = signal.getsignal(signal.SIGALRM)
    budget = Budget((RESERVE_S + 0.05) / 60)

    def compile_for_ever():
        with budget.enforced():
            while True:
                try:
                    sum(range(1000))
                except Exception:
                    continue  # as compilers do

    with pytest.raises(OutOfTime, match="for time"):
        compile_for_ever()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with Budget(None).enforced():
        assert signal.getsignal(signal.SIGALRM) is before


def test_where_time_is_short_what_matters_comes_first():
    late, early = "policy-T40-S1", "sinusoid-T1000-S5"
    names = ["functional", "compile", "triton", "triton-high", "vmap"]
    pairs = [(case, name) for case in (late, early) for name in names]
    order = in_order_of_need(pairs)
    assert sorted(order) == sorted(pairs)
    assert [name for _, name in order[:5]] == [
        "triton",
        "vmap",
        "compile",
        "functional",
        "triton-high",
    ]
    assert {case for case, _ in order[:5]} == {early}


def test_the_cases_that_a_gpu_must_do_well_are_there():
    early = {case.name for case in CASES if case.early}
    assert early == {
        "sinusoid-T25-S1",
        "sinusoid-T1000-S5",
        "sinusoid-T100000-S5",
        "omniglot-fc-T1024-S5",
        "omniglot-fc-T4096-S1",
        "wide-T64-S3",
        "conv4-T32-S5",
        "conv4-T1024-S5",
    }


def test_each_device_has_its_variants():
    assert {"triton", "cpu", "cpu-one-thread"} <= set(registry.names("cpu"))
    assert not {"triton-high", "triton-value-and-grad"} & set(registry.names("cpu"))
    variants = {"triton-value-and-grad", "triton-high", "triton-medium"}
    assert {"triton", "cpu", *variants} <= set(registry.names("cuda"))
    assert "cpu-one-thread" not in registry.names("cuda")


@pytest.mark.parametrize(("precision", "bound"), [("high", 0.1), ("medium", 0.3)])
def test_a_lower_precision_holds_while_it_is_measured_and_has_a_bound_of_its_own(
    precision, bound, tiny
):
    before = torch.get_float32_matmul_precision()
    seen = []

    def fail():
        with AtPrecision("triton", precision).around():
            seen.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == before
    bounds = tiny[1].bounds(strict=True, precision=precision)
    assert bounds.keys() == tiny[1].bounds(strict=True).keys()
    assert set(bounds.values()) == {bound}


def test_the_floor_is_what_takes_longer_at_the_peak_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)
    plan = SimpleNamespace(cpu=None, flops=int(66.9e9), bytes=int(3.35e9))  # 1 ms each

    def floor(one, **change):
        monkeypatch.setattr(one, "_plan", lambda _: SimpleNamespace(**vars(plan) | change))
        found = one.ceiling(ON_GPU)
        row = Row("a", "b", "c", True, flops=10**12, status="timed", times=[4e-3])
        row.ceiling_flops, row.ceiling_flops_per_second = found[:2]
        row.ceiling_bytes, row.ceiling_bytes_per_second = found[2:]
        return row

    exact = OurBackend("triton")
    assert floor(exact, flops=2 * plan.flops).floor == pytest.approx(2e-3)
    assert floor(exact, bytes=3 * plan.bytes).floor == pytest.approx(3e-3)
    lower = floor(AtPrecision("triton", "high"), bytes=0)
    assert lower.floor == pytest.approx(1e-3 * 66.9 / 494.7)
    row = floor(exact)
    assert row.gflops_done == pytest.approx(66.9 / 4 * 1e3)
    assert row.gbytes == pytest.approx(3.35e3 / 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    unknown = floor(exact)
    assert unknown.floor is None
    assert unknown.gflops_done == pytest.approx(66.9 / 4 * 1e3)


def test_a_lower_precision_is_not_compared_with_peers():
    def row(name, seconds, precision="highest"):
        ours = name.startswith("triton")
        return Row(
            "a", name, name, ours, 1, "timed", times=[seconds] * 3, precision=precision,
            ceiling_flops=10 if ours else None, ceiling_flops_per_second=1e4,
        )  # fmt: skip

    rows = [row("triton", 2e-3), row("triton-high", 1e-3, "high"), row("vmap", 4e-3)]
    results = Results(MACHINE, {}, rows)
    assert results.best("a", ours=True).implementation == "triton"
    assert results.lowest_floor("a").implementation == "triton"
    assert [results.share_of_floor(r) for r in rows] == pytest.approx([0.5, 1.0, 0.25])


def answers(folder, monkeypatch, text, code=0):
    """A program of that name that says so."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return gpu.ask("GPU-1", lambda: None)


@pytest.mark.skipif(os.name == "nt", reason="writes a shell script")
def test_the_state_of_a_gpu_is_what_nvidia_smi_tells(tmp_path, monkeypatch):
    line = "580.65, 1980, 2619, 1980, 2619, 700.00, [N/A], 41"
    found = answers(tmp_path, monkeypatch, line)
    assert found["driver"] == "580.65"
    assert (found["sm_clock_mhz"], found["power_limit_w"]) == ("1980", "700.00")
    assert found["power_w"] == "unknown"
    assert found["temperature_c"] == "41"
    assert set(answers(tmp_path, monkeypatch, line, code=6).values()) == {"unknown"}
    assert set(answers(tmp_path, monkeypatch, "No devices").values()) == {"unknown"}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert set(gpu.ask("GPU-1", lambda: None).values()) == {"unknown"}
