"""Inner learning rates: a number, a tensor, or a mapping from parameter names to either."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast.problem import RateTable


class PositiveRate(nn.Module):
    """A learning rate that stays positive while it learns: what is learned is its logarithm.

    rate: a positive number, or a tensor of positive numbers in a shape that `inner_lr` takes.
    Raises TypeError or ValueError naming it.
    """

    def __init__(self, rate: float | Tensor) -> None:
        super().__init__()
        if isinstance(rate, bool) or not isinstance(rate, (int, float, Tensor)):
            raise TypeError(f"rate is {type(rate).__name__}; wanted is a number or a tensor")
        value = torch.as_tensor(rate, dtype=None if isinstance(rate, Tensor) else torch.float32)
        if not value.is_floating_point():
            raise TypeError(f"rate is a tensor of {value.dtype}; a floating type is wanted")
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"rate is {rate}; wanted are positive, finite numbers")
        self.log = nn.Parameter(value.detach().log())

    def forward(self) -> Tensor:
        """The rate."""
        return self.log.exp()


Rate = float | Tensor | PositiveRate


class InnerRates(nn.Module):
    """Holds the rates of `MAML(inner_lr=...)`, so that they move and are saved with the module.

    Tensors that are `nn.Parameter`s are registered as parameters, other tensors as buffers; the
    rate of parameter `net.0.weight` is registered as `net/0/weight/lr`, a single one as `lr`.
    """

    def __init__(self, spec: Rate | Mapping[str, Rate]) -> None:
        super().__init__()
        self.is_mapping = isinstance(spec, Mapping)
        entries = dict(spec) if isinstance(spec, Mapping) else {"": spec}
        self._numbers: dict[str, float] = {}
        self._tables: dict[Any, RateTable] = {}
        self._names = list(entries)
        for name, rate in entries.items():
            self._register(str(name), rate)

    def _label(self, name: str) -> str:
        return f"inner_lr[{name!r}]" if self.is_mapping else "inner_lr"

    def _register(self, name: str, rate: object) -> None:
        label = self._label(name)
        if isinstance(rate, PositiveRate):
            self.add_module(_key(name), rate)
            rate = rate.log
            _check_shape(label, rate, self.is_mapping)
        elif isinstance(rate, Tensor):
            if not rate.is_floating_point():
                raise TypeError(f"{label} is a tensor of {rate.dtype}; a floating type is wanted")
            _check_shape(label, rate, self.is_mapping)
            _check_finite(label, rate)
            if isinstance(rate, nn.Parameter):
                self.register_parameter(_key(name), rate)
            else:
                self.register_buffer(_key(name), rate)
        elif isinstance(rate, (int, float)) and not isinstance(rate, bool):
            _check_finite(label, float(rate))
            self._numbers[name] = float(rate)
        else:
            raise TypeError(
                f"{label} is {type(rate).__name__}; wanted is a float or a tensor"
                + ("" if self.is_mapping else ", or a mapping from parameter name to these")
            )

    def spec(self) -> Rate | dict[str, Rate]:
        """The rates in the form they were given."""
        entries = {name: self._entry(name) for name in self._names}
        return entries if self.is_mapping else entries[""]

    def _entry(self, name: str) -> Rate:
        return self._numbers[name] if name in self._numbers else getattr(self, _key(name))

    def check_names(self, known: Iterable[str]) -> None:
        """A mapping may name only parameters that the model has."""
        if self.is_mapping:
            known = list(known)
            unknown = [name for name in self._names if name not in known]
            if unknown:
                raise ValueError(
                    f"inner_lr names {unknown}, which the model does not have; it has {known}"
                )

    @property
    def may_be_by_number(self) -> bool:
        """Whether some rates of a mapping are tensors."""
        return self.is_mapping and len(self._numbers) < len(self._names)

    def by_number(self, adapting: Mapping[str, Tensor], inner_steps: int) -> frozenset[str]:
        """The parameters that have a rate for each of their numbers."""
        found, others_are = set(), self._surely_by_number(adapting)
        for name, parameter in adapting.items():
            rate = _own_tensor(self._entry(name)) if name in self._names else 0.0
            if isinstance(rate, Tensor) and rate.dim():
                label, shape = self._label(name), parameter.shape
                if _spread(label, rate.detach(), shape, inner_steps, True, others_are).dim() > 1:
                    found.add(name)
        return frozenset(found)

    def _surely_by_number(self, adapting: Mapping[str, Tensor]) -> bool:
        """Whether some parameter of two axes or more has a rate of its own shape."""
        if not self.is_mapping:
            return False
        rates = ((p, _own_tensor(self._entry(n))) for n, p in adapting.items() if n in self._names)
        return any(
            isinstance(rate, Tensor) and rate.dim() > 1 and rate.shape[-p.dim() :] == p.shape
            for p, rate in rates
        )

    def table(self, adapting: Mapping[str, Tensor], inner_steps: int) -> RateTable:
        """Rates of the given parameters, spelled out for each inner step; finite in their dtype."""
        if len(self._numbers) < len(self._names):
            return self._spelled(adapting, inner_steps)
        dtype = next((p.dtype for p in adapting.values()), torch.float64)
        key = (tuple(adapting), inner_steps, dtype)  # numbers stay what they are
        if key not in self._tables:
            self._tables = {key: self._spelled(adapting, inner_steps)}
        return self._tables[key]

    def _spelled(self, adapting: Mapping[str, Tensor], inner_steps: int) -> RateTable:
        missing = [name for name in adapting if self.is_mapping and name not in self._names]
        if missing:
            raise ValueError(
                f"inner_lr has no rate for {missing}; a mapping must name every parameter that "
                "adapts (0.0 for one that should not move)"
            )
        entry_of = {name: name if self.is_mapping else "" for name in adapting}
        others_are = self._surely_by_number(adapting)
        values = {
            name: self._spell(entry_of[name], parameter, inner_steps, others_are)
            for name, parameter in adapting.items()
        }
        learning = {name for name in adapting if _learns(self._entry(entry_of[name]))}
        return RateTable(values, frozenset(learning))

    def _spell(
        self, name: str, parameter: Tensor, inner_steps: int, others_are: bool
    ) -> tuple[float, ...] | Tensor:
        """S numbers, or [S, *shape]."""
        rate, label = self._entry(name), self._label(name)
        largest = torch.finfo(parameter.dtype).max
        if isinstance(rate, float):
            _check_finite(label, rate, largest)
            return (rate,) * inner_steps
        value = (rate() if isinstance(rate, PositiveRate) else rate).detach()
        _check_finite(label, value, largest)
        if value.dim() == 0:
            return (value.item(),) * inner_steps
        spread = _spread(label, value, parameter.shape, inner_steps, self.is_mapping, others_are)
        if spread.dim() == 1:
            return tuple(spread.tolist())
        return spread.to(parameter)

    def learning(self) -> list[Tensor]:
        """The tensors that want a gradient, each once."""
        if len(self._numbers) == len(self._names):
            return []
        tensors = [_own_tensor(self._entry(name)) for name in self._names]
        found = {id(t): t for t in tensors if isinstance(t, Tensor) and t.requires_grad}
        return list(found.values())

    def gather(self, rate_gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Gradients of `learning()` from those of the table: {name: [S] or [S, *shape]}."""
        totals = {id(tensor): torch.zeros_like(tensor) for tensor in self.learning()}
        # In an order of its own: theirs may be that of a set, which is another in each process.
        for name, gradient in sorted(rate_gradients.items()):
            rate = self._entry(name if self.is_mapping else "")
            tensor = _own_tensor(rate)
            if not isinstance(tensor, Tensor) or not gradient.numel():  # of no inner step
                continue
            if gradient.dim() == 1:
                gradient = gradient.reshape(-1, *(1,) * (tensor.dim() - 1))
            total = gradient.sum_to_size(tensor.shape).to(tensor)
            if isinstance(rate, PositiveRate):
                total = total * rate().detach()
            totals[id(tensor)] += total
        return list(totals.values())


def _own_tensor(rate: Rate) -> float | Tensor:
    """What is registered of a rate."""
    return rate.log if isinstance(rate, PositiveRate) else rate


def _learns(rate: Rate) -> bool:
    tensor = _own_tensor(rate)
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _key(name: str) -> str:
    return name.replace(".", "/") + "/lr" if name else "lr"


def _spread(
    label: str,
    rate: Tensor,
    shape: torch.Size,
    inner_steps: int,
    may_be_of_numbers: bool,
    others_are: bool,
) -> Tensor:
    """A rate that is no single number as [S], or [S, *shape] where a parameter's numbers have rates
    of their own. `others_are`: other parameters of the mapping have such, which decides where a
    parameter has as many numbers as there are steps."""
    by_step = rate.dim() == 1 and len(rate) == inner_steps
    if rate.shape == shape and may_be_of_numbers and (others_are or not by_step):
        return rate.expand(inner_steps, *shape)
    if by_step:
        return rate
    if may_be_of_numbers and rate.dim() == len(shape) + 1 and len(rate) in (1, inner_steps):
        if rate.numel() == len(rate):  # numbers of steps, with more axes
            return rate.reshape(-1).expand(inner_steps)
        try:
            return rate.expand(inner_steps, *shape)
        except RuntimeError:
            pass
    if rate.dim() == 1 and not may_be_of_numbers:
        raise ValueError(
            f"{label} has {len(rate)} rates, one per inner step, but inner_steps is {inner_steps}"
        )
    raise ValueError(
        f"{label} has shape {list(rate.shape)}; wanted is a scalar, [{inner_steps}] for inner "
        f"steps, {list(shape)} as the parameter has, or [{inner_steps}, *that]"
    )


def _check_shape(label: str, rate: Tensor, is_mapping: bool) -> None:
    if rate.dim() > 1 and not is_mapping:
        raise ValueError(
            f"{label} has shape {list(rate.shape)}; wanted is a scalar or [inner_steps], or a "
            "mapping from parameter name to tensors of the parameter's shape"
        )


def _check_finite(label: str, rate: float | Tensor, largest: float = math.inf) -> None:
    if isinstance(rate, Tensor):
        finite = bool((rate.detach().isfinite() & (rate.detach().abs() <= largest)).all())
        numbers = rate.detach().reshape(-1).tolist()
        shown = str(numbers) if len(numbers) <= 16 else f"of shape {list(rate.shape)}"
    else:
        finite, shown = math.isfinite(rate) and abs(rate) <= largest, f"[{rate}]"
    if not finite:
        raise ValueError(
            f"{label} is {shown}; learning rates must be finite numbers in the model's dtype"
        )
