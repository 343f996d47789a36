"""What the tests of whole meta-steps on backend "triton" share. Without a GPU or the interpreter,
modules that import this are skipped."""

import copy

import pytest
import torch

from maml_fast.problem import TaskBatch
from tests.networks import by_graph

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {"fused": "auto", "layers": "factored"}


def on_device(batch):
    return TaskBatch(
        *(t.to(DEVICE, torch.float32 if t.is_floating_point() else t.dtype) for t in batch[:4])
    )


def in_float32(model):
    return copy.deepcopy(model).to(DEVICE, torch.float32)


def errors(found, wanted):
    """||found - wanted|| / ||wanted|| of each tensor, by name."""
    assert set(found) == set(wanted)
    return {
        name: ((found[name].cpu().double() - tensor).norm() / tensor.norm()).item()
        for name, tensor in wanted.items()
    }


def assert_exact(maml, model, batch, rate, steps, first_order=False):
    """At most twice the error of autograd in float32, or 1e-6, of loss and every gradient."""
    loss, wanted = by_graph(model, batch, maml.loss, rate, steps, first_order)
    single = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch[:4]))
    plain = by_graph(copy.deepcopy(model).float(), single, maml.loss, rate, steps, first_order)
    bounds = errors(plain[1], wanted)
    maml.zero_grad()
    out = maml(*on_device(batch))
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    out.loss.backward()
    found = {n: p.grad for n, p in maml.model.named_parameters() if p.requires_grad}
    for name, error in errors(found, wanted).items():
        assert error <= max(1e-6, 2 * bounds[name]), (name, error, bounds[name])


@pytest.fixture(params=FORMS)
def kernels(request):
    return request.param
