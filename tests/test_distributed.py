"""Two processes under DistributedDataParallel take the step that one takes with all tasks."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from maml_fast import MAML
from tests.networks import IN_DOUBLE, Draw, assert_close, gradients
from tests.processes import spawn

SIZES, TASKS, WORLD = (3, 5, 2), 6, 2


def build(backend):
    draw = Draw(0)
    model, batch = draw.mlp(SIZES), draw.batch("mse", TASKS, 4, 4, SIZES)
    rate = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    return MAML(model, inner_lr=rate, inner_steps=2, backend=backend), batch


def worker(rank, folder, backend):
    maml, batch = build(backend)
    share = TASKS // WORLD
    parallel = DistributedDataParallel(maml)
    loss = parallel(*(t[rank * share :][:share] for t in batch[:4])).loss
    loss.backward()
    del parallel, loss  # what holds the group goes before the group does
    torch.save({name: p.grad for name, p in maml.named_parameters()}, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("backend", IN_DOUBLE)
def test_gradients_are_averaged(backend, tmp_path):
    spawn(worker, WORLD, tmp_path, backend)
    maml, batch = build(backend)
    gradients(maml, batch)
    wanted = {name: p.grad for name, p in maml.named_parameters()}
    assert "rates.lr" in wanted
    for rank in range(WORLD):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted, 1e-12)
