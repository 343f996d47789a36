"""What a plan depends on of a model, cheap to compare from call to call."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
INTERNAL = frozenset(vars(nn.Module()))  # what every module has; `training` is asked for by name


def signature(model: nn.Module) -> tuple[Any, ...]:
    """What a plan for `model` depends on, cheap to compare: change it and the plan is made anew.

    Modules, their classes, modes, hooks, parameters and plain attributes; not globals, class
    attributes or the values of buffers, which a forward may read too.
    """
    found: list[Any] = []
    add = found.append
    for name, module in model.named_modules():
        kind = type(module)
        add((name, id(module), kind, kind.forward, module.training))
        for key, value in vars(module).items():
            if key not in INTERNAL:
                add(value if type(value) in PLAIN else _plain(value))
            elif value and key in HOOKS:
                add((key, len(value)))
        for key, p in module._parameters.items():
            if p is not None:
                add((key, id(p), p.requires_grad, p.shape, p.dtype, p.device))
    return tuple(found)


PLAIN = frozenset((type(None), bool, int, float, complex, str))


class _Same:
    """Equal to itself alone; holds its object, so that no other takes over the id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _plain(value: Any) -> Any:
    """A hashable stand-in for an attribute's value."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((key, _plain(v)) for key, v in value.items())
    return _Same(value)
