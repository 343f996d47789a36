"""The options of `MAML`, checked: each error names the argument, what was found, what is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from maml_fast.inner import InnerRule
from maml_fast.losses import LOSSES
from maml_fast.outer import MetaGradient


def check_choice(name: str, value: object, known: Any, more: str = "") -> None:
    """A name among those known."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; wanted is one of {list(known)}{more}")
    if value not in known:
        raise ValueError(f"{name} is {value!r}; wanted is one of {list(known)}{more}")


def check_count(name: str, value: object, least: int) -> None:
    """An integer, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; wanted is an integer, {least} or more")
    if value < least:
        raise ValueError(f"{name} is {value}; wanted is {least} or more")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; wanted is True or False")


def check_loss(loss: object) -> None:
    """A loss by name, or a callable without parameters to learn."""
    if not callable(loss):
        check_choice("loss", loss, LOSSES, " or a callable(prediction, target)")
    elif isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            "loss has parameters that require grad, for which no gradient is computed; call "
            "loss.requires_grad_(False), or make them part of the model"
        )


def check_rule(rule: object) -> None:
    """An inner rule: an object, not its class."""
    if not isinstance(rule, InnerRule):
        found = rule.__name__ if isinstance(rule, type) else type(rule).__name__
        raise TypeError(
            f"inner_optimizer is {found}; wanted is a maml_fast.inner.SGD(...), Adam(...), or an "
            "object of another class that derives from maml_fast.inner.InnerRule"
        )
    try:
        hash(rule)
    except TypeError as error:
        raise TypeError(
            f"inner_optimizer {type(rule).__name__} cannot be hashed, as a rule must: make it a "
            "dataclass with frozen=True, or no dataclass"
        ) from error


def check_meta_gradient(
    outer: object, rule: InnerRule, step_weights: object, learns_rates: bool, first_order: bool
) -> None:
    """A meta-gradient that the other options go with."""
    if not isinstance(outer, MetaGradient):
        found = outer.__name__ if isinstance(outer, type) else type(outer).__name__
        raise TypeError(
            f"meta_gradient is {found}; wanted is maml_fast.outer.Reptile() or Implicit(...), or "
            "None for the exact one"
        )
    if first_order:
        raise ValueError(f"first_order is True beside meta_gradient {outer}; choose one of them")
    if refusals := outer.refusals(rule, step_weights, learns_rates):
        raise ValueError(f"meta_gradient {outer} cannot be combined with {'; '.join(refusals)}")


def check_step_weights(weights: object, inner_steps: int) -> tuple[float, ...]:
    """As many numbers as there are query losses, none below 0 and not all 0; () of None."""
    if weights is None:
        return ()
    if isinstance(weights, Tensor):
        weights = weights.detach().tolist()
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(
            f"step_weights is {type(weights).__name__}; wanted are {inner_steps + 1} numbers, one "
            "for the query loss before each inner step and behind the last"
        )
    if len(weights) != inner_steps + 1:
        raise ValueError(
            f"step_weights has {len(weights)} numbers; wanted are {inner_steps + 1}, one for the "
            f"query loss before each of the {inner_steps} inner steps and behind the last"
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"step_weights holds {weight!r}; wanted are numbers")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"step_weights is {list(weights)}; wanted are finite numbers from 0 up"
            )
    if not any(weights):
        raise ValueError("step_weights are all 0, and so would the loss be; give one above 0")
    found = tuple(float(weight) for weight in weights)
    return () if found == (0.0,) * inner_steps + (1.0,) else found


def matching(argument: str, patterns: object, known: Iterable[str]) -> list[str] | None:
    """The names that patterns stand for, in the model's order; None of None."""
    if patterns is None:
        return None
    names = list(known)
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"{argument} is {patterns!r}; wanted is a list of parameters' names or patterns, as in "
            "['head.*']"
        )
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} holds {pattern!r}; wanted are names or patterns")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument} has {pattern!r}, which no parameter's name matches; the model has "
                f"{names}"
            )
    if not patterns:
        raise ValueError(f"{argument} is empty; leave it out for its default")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
