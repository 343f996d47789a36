"""A loop of one's own around DistributedDataParallel: batches of any number, accumulated gradients,
learned rates and several steps of an optimiser are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from maml_fast import MAML
from tests.networks import Draw, assert_close
from tests.processes import spawn

SIZES, RANKS = (3, 5, 2), 2
# Tasks of each rank's batches
EVEN, UNEVEN_SIZES, UNEVEN_COUNTS = ([3, 3], [3, 3]), ([2, 3], [3, 2]), ([2, 2, 2], [2, 2])


def build(reduction="mean"):
    """A rate for each parameter and step learns along."""
    draw = Draw(0)
    model = draw.mlp(SIZES)
    rates = {
        name: torch.nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64))
        for name, _ in model.named_parameters()
    }
    maml = MAML(model, inner_lr=rates, inner_steps=2, reduction=reduction)
    return maml, torch.optim.Adam(maml.parameters(), lr=0.05)


def batches(rank, sizes):
    """Of one rank; other ranks have others."""
    draw = Draw(1 + rank)
    return [draw.batch("mse", tasks, 4, 4, SIZES)[:4] for tasks in sizes]


def state(maml):
    return {name: p.detach().clone() for name, p in maml.named_parameters()}


def several_steps(rank):
    maml, optimizer = build()
    parallel = DistributedDataParallel(maml)
    for batch in batches(rank, EVEN[rank]):
        optimizer.zero_grad()
        parallel(*batch).loss.backward()
        optimizer.step()
    return state(maml)


def accumulated(rank):
    """The gradients of all batches are summed up, and exchanged once."""
    maml, optimizer = build()
    parallel = DistributedDataParallel(maml)
    first, second = batches(rank, EVEN[rank])
    with parallel.no_sync():
        parallel(*first).loss.backward()
    parallel(*second).loss.backward()
    optimizer.step()
    return state(maml)


def other_sizes(rank):
    """The mean over all tasks, from sums: the ranks' means would count alike."""
    maml, optimizer = build("sum")
    parallel = DistributedDataParallel(maml)
    for batch in batches(rank, UNEVEN_SIZES[rank]):
        tasks = torch.tensor(len(batch[0]))
        dist.all_reduce(tasks)
        optimizer.zero_grad()
        (parallel(*batch).loss * RANKS / tasks).backward()
        optimizer.step()
    return state(maml)


def other_counts(rank):
    """One rank has a batch more."""
    maml, optimizer = build()
    parallel = DistributedDataParallel(maml)
    with Join([parallel]):
        for batch in batches(rank, UNEVEN_COUNTS[rank]):
            optimizer.zero_grad()
            parallel(*batch).loss.backward()
            optimizer.step()
    return state(maml)


LOOPS = {loop.__name__: loop for loop in (several_steps, accumulated, other_sizes, other_counts)}


def member(rank, folder):
    for name, loop in LOOPS.items():
        torch.save(loop(rank), folder / f"{name}{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    spawn(member, RANKS, folder)
    return folder


def together(reduction, steps, weight):
    """One process with all ranks' batches; `steps` lists the batches of each optimiser's step."""
    maml, optimizer = build(reduction)
    for step in steps:
        optimizer.zero_grad()
        for batch in step:
            (maml(*batch).loss * weight).backward()
        optimizer.step()
    return state(maml)


def by_step(sizes):
    """The batches of all ranks, step by step."""
    ranks = [batches(rank, own) for rank, own in enumerate(sizes)]
    return [[own[i] for own in ranks if i < len(own)] for i in range(len(ranks[0]))]


def wanted(name):
    if name == "several_steps":
        return together("mean", by_step(EVEN), 1 / RANKS)
    if name == "accumulated":
        return together("mean", [[batch for step in by_step(EVEN) for batch in step]], 1 / RANKS)
    if name == "other_sizes":
        return together("sum", by_step(UNEVEN_SIZES), 1 / 5)
    return together("mean", by_step(UNEVEN_COUNTS), 1 / RANKS)


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_that_of_one_process(name, folder):
    expected, before = wanted(name), state(build()[0])
    assert len(expected) == 8  # four parameters, and their rates
    for rank in range(RANKS):  # a rank that was out of batches gets what the last one has
        assert_close(torch.load(folder / f"{name}{rank}.pt"), expected, 1e-12)
    assert all((expected[key] - before[key]).abs().max() > 1e-3 for key in expected)
