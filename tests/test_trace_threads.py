"""While one thread makes a plan, others call their modules as ever."""

import threading

import pytest
import torch
from torch import fx, nn

from maml_fast.trace import trace


class Held(nn.Module):
    """Tells when it is being traced, and goes on when it may, or after a while."""

    def __init__(self, patience):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.patience = patience
        self.reached, self.may_go_on = threading.Event(), threading.Event()

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            self.reached.set()
            self.may_go_on.wait(self.patience)
        return self.layer(x)


def start(work):
    worker = threading.Thread(target=work)
    worker.start()
    return worker


def test_another_thread_is_not_traced():
    model, other, found = Held(20), nn.Linear(2, 3), []
    worker = start(lambda: found.append(trace(model)))
    assert model.reached.wait(20)
    try:
        y = other(torch.ones(1, 2))  # of no model that is traced
        z = nn.Sequential(model.layer)(torch.ones(1, 2))
        weight = model.layer.weight
    finally:
        model.may_go_on.set()
        worker.join()
    assert type(y) is torch.Tensor
    assert type(z) is torch.Tensor
    assert type(weight) is nn.Parameter
    assert [link.name for link in found[0].links] == ["layer"]
    assert found[0].refusals == []


@pytest.mark.parametrize("attribute", ["__call__", "__getattr__"])
def test_two_traces_at_once_leave_modules_as_they_were(attribute):
    before = getattr(nn.Module, attribute)
    first, second = Held(0.2), Held(20)
    chains = []
    workers = [start(lambda: chains.append(trace(first)))]
    assert first.reached.wait(20)
    workers.append(start(lambda: chains.append(trace(second))))
    second.reached.wait(0.1)  # it is let in later
    first.may_go_on.set()
    workers[0].join()
    second.may_go_on.set()
    workers[1].join()
    try:
        assert getattr(nn.Module, attribute) is before
    finally:
        setattr(nn.Module, attribute, before)
    assert [link.name for chain in chains for link in chain.links] == ["layer", "layer"]
