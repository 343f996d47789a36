"""Inner learning rates: a number, a tensor, or a mapping from parameter names to either."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast.problem import RateTable

Rate = float | Tensor


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
        if isinstance(rate, Tensor):
            if not rate.is_floating_point():
                raise TypeError(f"{label} is a tensor of {rate.dtype}; a floating type is wanted")
            if rate.dim() > 1:
                raise ValueError(
                    f"{label} has shape {list(rate.shape)}; wanted is a scalar or [inner_steps]"
                )
            _check_finite(label, rate.detach().reshape(-1).tolist())
            if isinstance(rate, nn.Parameter):
                self.register_parameter(_key(name), rate)
            else:
                self.register_buffer(_key(name), rate)
        elif isinstance(rate, (int, float)) and not isinstance(rate, bool):
            _check_finite(label, [float(rate)])
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

    def table(
        self, adapting: Iterable[str], inner_steps: int, dtype: torch.dtype = torch.float64
    ) -> RateTable:
        """Rates of the given parameters, spelled out for each inner step; finite in `dtype`."""
        if len(self._numbers) < len(self._names):
            return self._spelled(adapting, inner_steps, dtype)
        key = (tuple(adapting), inner_steps, dtype)  # numbers stay what they are
        if key not in self._tables:
            self._tables = {key: self._spelled(key[0], inner_steps, dtype)}
        return self._tables[key]

    def _spelled(self, adapting: Iterable[str], inner_steps: int, dtype: torch.dtype) -> RateTable:
        largest = torch.finfo(dtype).max
        spelled = {name: self._spell(name, inner_steps, largest) for name in self._names}
        learning = {name for name in self._names if _learns(self._entry(name))}
        if not self.is_mapping:
            names = list(adapting)
            return RateTable(
                dict.fromkeys(names, spelled[""]), frozenset(names if learning else ())
            )
        missing = [name for name in adapting if name not in spelled]
        if missing:
            raise ValueError(
                f"inner_lr has no rate for {missing}; a mapping must name every parameter that "
                "requires grad (0.0 for one that should not move)"
            )
        values = {name: spelled[name] for name in adapting}
        return RateTable(values, frozenset(learning & set(values)))

    def _spell(self, name: str, inner_steps: int, largest: float) -> tuple[float, ...]:
        rate = self._entry(name)
        if isinstance(rate, float):
            _check_finite(self._label(name), [rate], largest)
            return (rate,) * inner_steps
        label = self._label(name)
        if rate.dim() == 1 and len(rate) != inner_steps:
            raise ValueError(
                f"{label} has {len(rate)} rates, one per inner step, but inner_steps is "
                f"{inner_steps}"
            )
        values = rate.detach().reshape(-1).tolist()
        _check_finite(label, values, largest)
        return tuple(values) if rate.dim() == 1 else (values[0],) * inner_steps

    def learning(self) -> list[Tensor]:
        """The tensors that want a gradient, each once."""
        if len(self._numbers) == len(self._names):
            return []
        tensors = [self._entry(name) for name in self._names]
        found = {id(t): t for t in tensors if isinstance(t, Tensor) and t.requires_grad}
        return list(found.values())

    def gather(self, rate_gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Gradients of `learning()` from those of the table: {name: [S]}."""
        totals = {id(tensor): torch.zeros_like(tensor) for tensor in self.learning()}
        for name, gradient in rate_gradients.items():
            rate = self._entry(name if self.is_mapping else "")
            if isinstance(rate, Tensor):
                total = gradient.sum() if rate.dim() == 0 else gradient
                totals[id(rate)] += total.to(rate)
        return list(totals.values())


def _learns(rate: Rate) -> bool:
    return isinstance(rate, Tensor) and rate.requires_grad


def _key(name: str) -> str:
    return name.replace(".", "/") + "/lr" if name else "lr"


def _check_finite(label: str, values: list[float], largest: float = math.inf) -> None:
    if not all(math.isfinite(value) and abs(value) <= largest for value in values):
        raise ValueError(
            f"{label} is {values}; learning rates must be finite numbers in the model's dtype"
        )
