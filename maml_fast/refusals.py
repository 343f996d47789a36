"""Modules that a backend cannot run as MAML wants them, by name, and what to change."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from maml_fast.errors import UnsupportedModelError
from maml_fast.ops.norm import RUNNING, runs_on_statistics


def draws(module: nn.Module) -> bool:
    """Whether it is a dropout that draws."""
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def at_random(model: nn.Module, p: float) -> str:
    """The reason against a dropout of `model`, and what to change."""
    advice = "call model.eval() or set p=0"
    if any(map(runs_on_statistics, model.modules())):
        advice = "call eval() of this layer alone or set p=0: norms here keep running statistics, "
        advice += "which model.eval() would turn to"
    return f"draws at random with p={p}; {advice}"


def batching_refusals(model: nn.Module) -> list[str]:
    """Layers that torch.func cannot run for many tasks at once, and what to change."""
    return [
        f"{label(name, module)}: {at_random(model, module.p)}"
        for name, module in model.named_modules()
        if draws(module)
    ]


def check_statistics(model: nn.Module) -> None:
    """Raises UnsupportedModelError naming norms whose mode says running statistics, which no
    backend computes with."""
    refusals = [
        f"{label(name, module)}: {RUNNING}"
        for name, module in model.named_modules()
        if runs_on_statistics(module) and not module.training
    ]
    if refusals:
        raise UnsupportedModelError("; ".join(refusals))


def label(name: str, module: nn.Module) -> str:
    """A module of a model, for people."""
    return f"layer '{name or 'model'}' ({type(module).__name__})"
