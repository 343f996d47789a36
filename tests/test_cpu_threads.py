"""The C++ backend on several threads, from several threads, and after a fork."""

import multiprocessing
import threading

import pytest
import torch
from torch import nn

from maml_fast import MAML, check, cpu_features
from maml_fast.problem import TaskBatch
from tests.networks import Draw, gradients

pytestmark = pytest.mark.usefixtures("extension")


class TestSameBits:
    """Sums over tasks have one order, whatever the threads."""

    @pytest.mark.parametrize("tasks", [1, 25, 300])
    @pytest.mark.parametrize("own_threads", [False, True])
    def test_any_number_of_threads(self, engine, tasks, own_threads, threads):
        draw = Draw(5)
        sizes = (4, 24, 9, 3)
        model, batch = draw.mlp(sizes, nn.ReLU).float(), draw.batch("mse", tasks, 5, 6, sizes)
        batch = TaskBatch(*(tensor.float() for tensor in batch[:4]))
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
        batch = TaskBatch(*(t.float() for t in draw.batch("mse", 150, 3, 3, sizes)[:4]))
        maml = MAML(model, "mse", 0.05, backend="cpu")
        found = []
        for count in (1, 2, 4):
            threads(count)
            found.append({name: g.clone() for name, g in gradients(maml, batch).items()})
        report = check(maml, *batch)
        assert report.passed, str(report)
        for other in found[1:]:
            assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


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
