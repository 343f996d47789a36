"""How many tasks a pass takes: the same bits whatever is asked for, and what happens when memory
runs out."""

import dataclasses

import pytest
import torch

from maml_fast import MAML, MemoryWarning, memory, meta_step, plan
from tests.networks import Draw, assert_close, by_graph, gradients

SIZES, TASKS = (3, 6, 2), 12


def build(backend, dtype=torch.float64, **options):
    draw = Draw(5, dtype)
    model, batch = draw.mlp(SIZES), draw.batch("mse", TASKS, 4, 5, SIZES)
    return MAML(model, inner_lr=0.1, inner_steps=2, backend=backend, **options), batch


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_whatever_the_chunk(backend, dtype):
    maml, batch = build(backend, dtype)
    wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
    losses = maml(*batch).task_losses
    for chunk_size in (1, 3, 5, 8, 11, 12, 100):
        maml.chunk_size = chunk_size
        found = gradients(maml, batch)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), chunk_size
        assert torch.equal(maml(*batch).task_losses, losses)


@pytest.mark.parametrize("backend", ["torch", "functional"])
def test_the_same_bits_from_the_default_chunk_up(backend, monkeypatch):
    """There the passes are a function of sizes, and what is asked for is a limit."""
    monkeypatch.setitem(plan.CPU_PASS_BYTES, backend, 12_000)
    maml, batch = build(backend)
    own = maml.plan(batch.support_x, batch.query_x).chunk_size
    assert 1 < own < TASKS
    wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
    for chunk_size in (own, own + 1, TASKS, 100):
        maml.chunk_size = chunk_size
        assert maml.plan(batch.support_x, batch.query_x).chunk_size == own
        found = gradients(maml, batch)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), chunk_size
    maml.chunk_size = 1
    assert maml.plan(batch.support_x, batch.query_x).chunk_size == 1
    assert_close(gradients(maml, batch), wanted, 1e-13)


class Short:
    """`meta_step._run_chunk` that runs out of memory above so many tasks."""

    def __init__(self, monkeypatch, most, error):
        self.run, self.most, self.error, self.taken = meta_step._run_chunk, most, error, []
        monkeypatch.setattr(meta_step, "_run_chunk", self)

    def __call__(self, plan, problem, batch, gradient):
        self.taken.append(batch.tasks)
        if batch.tasks > self.most:
            raise self.error
        return self.run(plan, problem, batch, gradient)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 800 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu", "python"])
@pytest.mark.parametrize("backend", ["torch", "functional"])
def test_out_of_memory_halves_the_pass_once(backend, error, monkeypatch):
    maml, batch = build(backend)
    with torch.no_grad():
        maml(*batch)  # the plan is tried out
    short = Short(monkeypatch, TASKS // 2, error)
    with pytest.warns(MemoryWarning, match=r"out of memory with 12 tasks a pass.*now on 6") as told:
        found = {name: g.clone() for name, g in gradients(maml, batch).items()}
    assert len(told) == 1
    assert short.taken == [12, 6, 6]
    assert_close(found, by_graph(maml.model, batch, "mse", 0.1, 2)[1], 1e-12)
    short.taken.clear()
    again = gradients(maml, batch)  # and stays halved, without a further word
    assert short.taken == [6, 6]
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_out_of_memory_a_second_time_is_an_error(monkeypatch):
    maml, batch = build("torch")
    with torch.no_grad():
        maml(*batch)
    short = Short(monkeypatch, 5, ERRORS[0])
    with pytest.warns(MemoryWarning), pytest.raises(torch.OutOfMemoryError):
        maml(*batch)
    assert short.taken == [12, 6]
    short.taken.clear()
    with pytest.raises(torch.OutOfMemoryError):
        maml(*batch)
    assert short.taken == [6]


def test_out_of_memory_where_fewer_tasks_would_not_help(monkeypatch):
    """A backend whose memory does not grow with them, and a single task."""
    maml, batch = build("cpu")
    with torch.no_grad():
        maml(*batch)
    short = Short(monkeypatch, 0, ERRORS[0])
    with pytest.raises(torch.OutOfMemoryError):
        maml(*batch)
    assert short.taken == [12]
    maml, batch = build("torch", chunk_size=1)
    with pytest.raises(torch.OutOfMemoryError):
        maml(*batch)


def test_other_errors_are_passed_on(monkeypatch):
    maml, batch = build("torch")
    with torch.no_grad():
        maml(*batch)
    short = Short(monkeypatch, 6, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        maml(*batch)
    assert short.taken == [12]


def test_a_gpu_takes_less_where_less_memory_is_at_hand(monkeypatch):
    maml, batch = build("torch")
    found = maml.plan(batch.support_x, batch.query_x)
    shapes = dataclasses.replace(found.shapes, tasks=10**9, device=torch.device("cuda"))

    def tasks(free):
        monkeypatch.setattr(memory, "at_hand", lambda device: free)
        return plan._chunk_size(maml.model, "torch", found.layers, shapes, 2)

    plenty = tasks(80 << 30)
    assert plenty == tasks(4 << 30) == plan.GPU_PASS_BYTES // (plan.GPU_PASS_BYTES // plenty)
    assert tasks((4 << 30) - 1) == plenty // 2
    assert tasks(1 << 30) == plenty // 4
    assert tasks(1) == 1
