"""What the C++ backend reads: tensors as they come, by their addresses."""

import pytest
import torch
from torch import nn

from maml_fast import MAML, NonFiniteError, cpu_cost, cpu_features
from maml_fast.problem import TaskBatch
from tests.engines import LAYOUTS
from tests.networks import assert_close, by_graph, gradients

pytestmark = pytest.mark.usefixtures("extension")


class TestData:
    """Tensors as they come."""

    @pytest.fixture
    def model(self, draw):
        return draw.mlp((3, 5, 2))

    @pytest.fixture
    def batch(self, draw):
        return draw.batch("mse", 19, 4, 6, (3, 2))

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.repeat_interleave(2, 0)[::2],
            lambda t: t.repeat_interleave(3, 1)[:, ::3],
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            lambda t: t.mT.contiguous().mT,
            lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        ],
        ids=["tasks", "rows", "tasks and rows", "features", "columns"],
    )
    def test_not_contiguous(self, change, model, batch):
        maml = MAML(model, inner_lr=0.1, inner_steps=2, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        other = TaskBatch(*map(change, batch[:4]))
        assert not other.support_x.is_contiguous()
        assert_close(gradients(maml, other), wanted, 1e-15)

    def test_classes_that_are_not_contiguous(self, draw):
        model, batch = draw.mlp((3, 5, 4)), draw.batch("cross_entropy", 5, 4, 6, (3, 4))
        maml = MAML(model, "cross_entropy", 0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        other = TaskBatch(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch[:4]))
        assert_close(gradients(maml, other), wanted, 1e-15)

    def test_parameters_that_are_not_contiguous(self, model, batch):
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        model[0].weight.data = model[0].weight.data.mT.contiguous().mT
        assert not model[0].weight.is_contiguous()
        assert_close(gradients(maml, batch), wanted, 1e-15)

    def test_parameters_whose_memory_moves(self, model, batch):
        """A call that is recalled reads the parameters where they are now."""
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        gradients(maml, batch)
        for parameter in model.parameters():
            parameter.data = parameter.data * 2
        assert_close(gradients(maml, batch), by_graph(model, batch, "mse", 0.1, 1)[1], 1e-10)

    def test_more_than_2_31_numbers(self, draw):
        """Tasks that share their rows: expanded tensors are read as they are, without copies."""
        sizes = (4096, 2)
        model = draw.mlp(sizes).float()
        one = TaskBatch(*(t.float() for t in draw.batch("mse", 1, 16, 1, sizes)[:4]))
        tasks = 2**31 // one.support_x.numel() + 5
        many = TaskBatch(*(t.expand(tasks, *t.shape[1:]) for t in one[:4]))
        assert many.support_x.numel() > 2**31
        maml = MAML(model, inner_lr=1e-3, first_order=True, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, one).items()}
        out = maml(*many)
        assert torch.equal(out.task_losses, out.task_losses[:1].expand(tasks))
        assert torch.equal(out.query_outputs, out.query_outputs[:1].expand(tasks, 1, 2))
        maml.zero_grad()
        out.loss.backward()
        # sums of so many equal numbers in float32
        assert_close({n: p.grad for n, p in model.named_parameters()}, wanted, 1e-3)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nan_stays_with_its_task(self, layout, model, batch, monkeypatch):
        monkeypatch.setattr(cpu_cost, "LAYOUTS", (layout,))
        batch.support_x[3] = torch.nan
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        with pytest.raises(NonFiniteError, match="1 of 19 tasks: 3") as caught:
            maml(*batch)
        assert caught.value.tasks == [3]

    def test_padding_lanes_count_for_nothing(self, engine, model, batch):
        """One task fewer or more than the lanes: each counts once."""
        lanes = cpu_features.engines()[engine[0]] // 8
        for tasks in (1, lanes - 1, lanes, lanes + 1):
            part = TaskBatch(*(t[:tasks] for t in batch[:4]))
            maml = MAML(model, inner_lr=0.1, reduction="sum", backend="cpu")
            wanted = by_graph(model, part, "mse", 0.1, 1)[1]
            wanted = {name: g * tasks for name, g in wanted.items()}
            assert_close(gradients(maml, part), wanted, 1e-10)

    def test_signs_and_zeros_that_torch_has_left_for_later(self, model, batch):
        """Views with the sign to be applied when read, and tensors of zeros without memory."""
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        wanted = {name: g.clone() for name, g in gradients(maml, batch).items()}
        negative = torch.complex(torch.zeros_like(batch.support_x), -batch.support_x).conj().imag
        assert negative.is_neg()
        assert torch.equal(negative, batch.support_x)
        assert_close(gradients(maml, batch._replace(support_x=negative)), wanted, 1e-15)
        zeros = torch._efficientzerotensor(*batch.query_x.shape, dtype=torch.float64)
        at_zero = gradients(maml, batch._replace(query_x=zeros))
        at_zero = {name: g.clone() for name, g in at_zero.items()}
        plain = batch._replace(query_x=torch.zeros_like(batch.query_x))
        assert_close(gradients(maml, plain), at_zero, 1e-15)

    def test_parameters_without_memory(self, model, batch):
        maml = MAML(model, inner_lr=0.1, backend="cpu")
        maml(*batch)
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"shape \[5, 3\].*lost its memory"):
            maml(*batch)

    def test_infinite_data_behind_saturated_units(self, engine, draw):
        """A frozen weight does not meet infinities that autograd would not have it meet."""
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
        draw.initialise(model)
        model[0].weight.requires_grad_(False)
        batch = draw.batch("mse", 3, 5, 4, (3, 2))
        batch.support_x[1, 2, 0] = torch.inf
        wanted = MAML(model, inner_lr=0.1, backend="reference")
        wanted = {name: g.clone() for name, g in gradients(wanted, batch).items()}
        assert all(g.isfinite().all() for g in wanted.values())
        assert_close(gradients(MAML(model, inner_lr=0.1, backend="cpu"), batch), wanted, 1e-10)
