"""Networks and data by which the C++ backend is held to what the MAML family asks for."""

import torch
from torch import nn

from maml_fast import MAML
from maml_fast.problem import TaskBatch
from tests.image_networks import assert_near

FORMS = ["factored", "dense"]
TASKS, ROWS, QUERIES, CLASSES = 9, 4, 5, 3


def linear_net():
    return [
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, CLASSES),
    ]  # fmt: skip


def normed_net():
    return [
        nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, CLASSES),
    ]  # fmt: skip


def batch_normed_net():
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return [nn.Linear(6, 8, bias=False), norm, nn.SiLU(), nn.Linear(8, CLASSES)]


def position_net():
    return [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(4, CLASSES)]


def conv_net():
    return [
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.SiLU(),
        nn.Flatten(), nn.Linear(20, CLASSES),
    ]  # fmt: skip


def plain_conv_net():
    return [
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8, CLASSES),
    ]  # fmt: skip


def layer_norm_conv_net():
    return [
        nn.LayerNorm([2, 5, 4]), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(18, CLASSES),
    ]  # fmt: skip


FLAT = {
    "linear": (linear_net, (6,)),
    "layer norms": (normed_net, (6,)),
    "batch norm": (batch_normed_net, (6,)),
    "positions": (position_net, (2, 3)),
}
IMAGES = {
    "batch and group norm": (conv_net, (2, 5, 4)),
    "no norm": (plain_conv_net, (2, 5, 4)),
    "layer norm first": (layer_norm_conv_net, (2, 5, 4)),
}
LOSSES = ["mse", "cross_entropy", "bce_with_logits", "huber"]


def build(nets, name, draw, loss="mse", tasks=TASKS):
    layers, shape = nets[name]
    model = draw.initialise(nn.Sequential(*layers()).double())
    for module in model:
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.data.add_(1)
    x, q = draw.normal(tasks, ROWS, *shape), draw.normal(tasks, QUERIES, *shape)
    y = draw.target(loss, tasks, ROWS, features=CLASSES)
    yq = draw.target(loss, tasks, QUERIES, features=CLASSES)
    return model, TaskBatch(x, y, q, yq)


def everything(maml, batch):
    """Losses, outputs and gradients: of parameters and rates, and of data that want one."""
    maml.zero_grad()
    xs = {"support_x": batch.support_x, "query_x": batch.query_x}
    for x in xs.values():
        x.grad = None
    out = maml(*batch)
    out.loss.backward()
    found = {"losses": out.task_losses, "support": out.support_losses, "out": out.query_outputs}
    found |= {name: p.grad.clone() for name, p in maml.named_parameters() if p.grad is not None}
    return found | {name: x.grad.clone() for name, x in xs.items() if x.grad is not None}


def assert_same(model, batch, loss="mse", rate=0.1, steps=2, fast_weights="auto", **options):
    """Backend "cpu" gives what backend "reference" does."""
    wanted = everything(MAML(model, loss, rate, steps, backend="reference", **options), batch)
    options |= dict(backend="cpu", fast_weights=fast_weights)
    maml = MAML(model, loss, rate, steps, **options)
    assert_near(everything(maml, batch), {n: t.detach() for n, t in wanted.items()}, 1e-9)
    return maml


def weighted(batch, draw, gaps=True):
    """With weights of either set of rows; without gaps no weight is 0."""
    weights = [draw.normal(*x.shape[:2]).abs() + 0.1 for x in (batch.support_x, batch.query_x)]
    if gaps:
        weights[0][:, 1], weights[1][::2, 3] = 0, 0
        batch.query_y[0, 3] = -7 if batch.query_y.dtype == torch.int64 else torch.nan
        batch.support_x[:, 1] = torch.inf
    return batch._replace(support_weight=weights[0], query_weight=weights[1])


def wants_gradients(batch):
    batch.support_x.requires_grad_()
    batch.query_x.requires_grad_()
    return batch
