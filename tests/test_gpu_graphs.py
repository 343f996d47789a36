"""Where there is a GPU: CUDA graphs, streams, measured tiles, the sanitizer, a second GPU."""

import copy
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError
from maml_fast.backends import tuning
from maml_fast.backends.cuda_graphs import GRAPHS_KEPT
from tests import gpu_cases
from tests.gpu_cases import BOUND, KINDS, Twins, error_of
from tests.networks import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Choices are not remembered in the user's folder. Few are made: these tests ask for
    deterministic algorithms, where nothing is measured."""
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip("triton")
    return request.param


class TestGraphs:
    """A meta-step replayed gives what one that is launched gives."""

    def test_new_data_each_time(self, kind):
        twins = Twins(kind)
        for call in range(4):
            twins.check()
            assert twins.graphs() == min(call, 1)

    def test_classes(self, kind):
        twins = Twins(kind, loss="cross_entropy")
        for _ in range(3):
            twins.check()
        batch = twins.batch()
        batch.query_y[1, 1] = 2
        with pytest.raises(ValueError, match="query_y.*wanted is 0 to 1"):
            twins.graphed(*batch)
        twins.check()

    def test_without_a_gradient(self, kind):
        twins = Twins(kind)
        for _ in range(3):
            batch = twins.batch()
            with torch.no_grad():
                found, wanted = twins.graphed(*batch), twins.plain(*batch)
            assert all(error_of(a, vars(wanted)[n]) <= BOUND for n, a in vars(found).items())
        assert twins.graphs() == 1

    def test_parameters_that_an_optimizer_moves(self, kind):
        twins = Twins(kind)
        optimizer = torch.optim.Adam(twins.model.parameters(), 0.1)
        before = [p.detach().clone() for p in twins.model.parameters()]
        for _ in range(4):
            optimizer.zero_grad()
            twins.graphed(*twins.batch()).loss.backward()
            optimizer.step()
            twins.check()
        assert twins.graphs() == 1
        for p, old in zip(twins.model.parameters(), before, strict=True):
            assert error_of(p, old) > 0.1

    @pytest.mark.parametrize("way", ["new parameters", "their memory"])
    def test_sets_of_parameters_that_take_turns(self, kind, way):
        twins = Twins(kind)
        sets = [dict(twins.model.named_parameters()), twins.new_parameters()]
        if way == "their memory":
            sets = [{name: p.data for name, p in parameters.items()} for parameters in sets]
        for turn in (0, 0, 0, 1, 1, 1, 0, 1, 0):
            if way == "new parameters":
                twins.put(sets[turn])
            else:
                for name, p in twins.model.named_parameters():
                    p.data = sets[turn][name]
            zeros = [torch.zeros(n, device=gpu_cases.DEVICE) for n in range(1, 200)]
            twins.check()  # not with what a graph had read, were its memory free
            del zeros
        assert twins.graphs() == 2

    def test_more_sets_than_are_kept(self, kind):
        twins = Twins(kind)
        for _ in range(GRAPHS_KEPT + 2):
            for p, new in zip(
                twins.model.parameters(), twins.new_parameters().values(), strict=True
            ):
                p.data = new.data
            for _ in range(3):
                twins.check()
        assert twins.graphs() == GRAPHS_KEPT

    def test_rates_that_learn(self, kind):
        rate = nn.Parameter(torch.full((2,), 0.1, device=gpu_cases.DEVICE))
        twins = Twins(kind, rate)
        for _ in range(4):
            _, found = twins.check()
            with torch.no_grad():
                rate *= 1 - 0.1 * found["rates.lr"].sigmoid()  # never what it was before
        assert twins.graphs() == (1 if kind == "fused" else 0)  # else rates are part of the graph

    def test_rates_that_take_turns(self, kind):
        rate = torch.tensor(0.1, device=gpu_cases.DEVICE)
        twins = Twins(kind, rate)
        for value in (0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.1, 0.3):
            rate.fill_(value)
            zeros = [torch.zeros(n, device=gpu_cases.DEVICE) for n in range(1, 200)]
            twins.check()
            del zeros
        assert twins.graphs() == (1 if kind == "fused" else 2)

    def test_streams_that_take_turns(self, kind):
        twins = Twins(kind)
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for call in range(9):
            with torch.cuda.stream(streams[call % 3]):
                twins.check()
        torch.cuda.synchronize()
        assert twins.graphs() == 1

    def test_earlier_results_stay(self, kind):
        twins, kept = Twins(kind), []
        for _ in range(5):
            result, found = twins.check()
            tensors = [*vars(result).values(), *found.values()]
            kept.append((tensors, [t.clone() for t in tensors]))
        for tensors, copies in kept:
            assert all(map(torch.equal, tensors, copies))
        assert len({tensors[0].item() for tensors, _ in kept}) == 5

    def test_gradients_add_up(self, kind):
        twins, totals = Twins(kind), []
        batches = [twins.batch() for _ in range(4)]
        for maml in (twins.graphed, twins.plain):
            maml.zero_grad()
            for batch in batches:
                maml(*batch).loss.backward()
            totals.append({n: p.grad for n, p in twins.model.named_parameters()})
        assert_close(*totals, BOUND)

    def test_shapes_that_take_turns(self, kind):
        twins = Twins(kind)
        for _ in range(3):
            for shape in ((5, 4, 3), (7, 4, 3), (5, 2, 3)):
                twins.check(twins.batch(*shape))
        assert twins.graphs() == 3

    def test_passes(self, kind):
        twins = Twins(kind, chunk_size=3)
        for _ in range(3):
            twins.check(twins.batch(7))

    def test_memory_does_not_grow(self, kind):
        twins, batch = Twins(kind), Twins(kind).batch()
        used = []
        for calls in (5, 50):
            for _ in range(calls):
                twins.graphed.zero_grad()
                twins.graphed(*batch).loss.backward()
            gc.collect()
            used.append(torch.cuda.memory_allocated())
        assert used[1] <= used[0]

    def test_data_that_are_not_finite(self, kind):
        twins = Twins(kind)
        for _ in range(3):
            twins.check()
        batch = twins.batch()
        batch.query_x[1, 0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="query loss is not finite in 1 of 5 tasks: 1"):
            twins.graphed(*batch)
        twins.check()

    def test_not_where_the_caller_captures(self, kind):
        """A meta-step asks whether its numbers are finite, which no graph can wait for."""
        done = run_alone("captured", kind)
        assert done.returncode
        assert "captur" in done.stderr


def run_alone(*arguments, before=(), **environment):
    """`gpu_cases` as a program."""
    return subprocess.run(
        [*before, sys.executable, "-m", "tests.gpu_cases", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_tiles_are_measured_once(monkeypatch):
    pytest.importorskip("triton")
    measured, on_gpu = [], tuning._on_gpu

    def counted(call):
        measured.append(on_gpu(call))
        return measured[-1]

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(tuning, "_on_gpu", counted)
    counts = []
    for _ in range(2):
        monkeypatch.setattr(tuning, "_remembered", {})  # as a new process
        twins = Twins("fused")
        twins.check()
        counts.append(len(measured))
    assert counts[0] == counts[1] >= 2  # of several, most give the right result
    assert all(0 < seconds < 0.1 for seconds in measured)
    known = json.loads(tuning.path().read_text())
    assert known
    assert all(name.startswith("Tiles(") for name in known.values())


SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.skipif(not os.path.exists(SANITIZER), reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("fused", "meta_step"),
        ("layers", "attend_kernel"),
        ("images", "conv_kernel"),
        ("images", "outer_kernel"),
        ("images", "sum_kernel"),
        ("images", "apply_kernel"),
    ],
)
def test_sanitizer(case, kernel, tool):
    """Scratch lies in global memory, whose races no tool sees; `debug_barrier` is for them."""
    pytest.importorskip("triton")
    gpu_cases.main(case)  # so that all is compiled
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--kernel-name", f"kns={kernel}"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch asks things that may fail
    # Each tensor its own allocation: beyond its end is out of bounds
    done = run_alone(case, before=command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUMMARY: 0 (errors|hazards)", done.stdout + done.stderr)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(kind, monkeypatch):
    monkeypatch.setattr(gpu_cases, "DEVICE", "cuda:1")
    twins = Twins(kind)
    for _ in range(3):
        result, _ = twins.check()
        assert result.task_losses.device.index == 1
    assert torch.cuda.current_device() == 0
    batch = twins.batch()
    found = twins.graphed.adapt(*batch[:2])(batch.query_x)
    wanted = MAML(copy.deepcopy(twins.model), "mse", gpu_cases.RATE, inner_steps=2, backend="torch")
    assert error_of(found, wanted.adapt(*batch[:2])(batch.query_x)) <= BOUND
