"""What a `MAML` is asked for: its options, held and checked, and what a plan depends on of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_fast import custom_op
from maml_fast.inner import SGD, InnerRule
from maml_fast.layers import Asked
from maml_fast.options import (
    check_choice,
    check_count,
    check_flag,
    check_loss,
    check_meta_gradient,
    check_rule,
    check_step_weights,
    matching,
)
from maml_fast.outer import MetaGradient
from maml_fast.plan import BACKENDS, FAST_WEIGHTS
from maml_fast.planner import Planned, Planner
from maml_fast.problem import Loss, Problem, TaskBatch
from maml_fast.rates import InnerRates, Rate


class Names(NamedTuple):
    """The parameters that adapt, and the names of those that get a meta-gradient."""

    adapting: dict[str, nn.Parameter]
    learned: tuple[str, ...]


class Settings(nn.Module):
    """The options of `maml_fast.MAML`, whose documentation has them."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "mse",
        inner_lr: Rate | Mapping[str, Rate] = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        chunk_size: int | None = None,
        fast_weights: str = "auto",
        cuda_graphs: bool = True,
        inner_params: Sequence[str] | None = None,
        inner_optimizer: InnerRule | None = None,
        step_weights: Sequence[float] | None = None,
        meta_gradient: MetaGradient | None = None,
        step_params: Sequence[str] = (),
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; wanted is an nn.Module")
        self.model = model
        self.loss = loss
        self.rates = InnerRates(inner_lr)
        self.rates.check_names(name for name, _ in model.named_parameters())
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.reduction = reduction
        self.backend = backend
        self.chunk_size = chunk_size
        self.fast_weights = fast_weights
        self.cuda_graphs = cuda_graphs
        # A generator would be used up, and what is no list is refused below.
        names: Any = inner_params
        kept = isinstance(names, str) or not isinstance(names, Iterable)
        self.inner_params = names if kept else list(names)
        self.inner_optimizer = SGD() if inner_optimizer is None else inner_optimizer
        self.step_weights = step_weights
        self.meta_gradient = meta_gradient
        self.on_nonfinite = on_nonfinite
        self.step_params = _of_steps(model, step_params, inner_steps)
        self._check_options()
        matching("inner_params", self.inner_params, dict(model.named_parameters()))
        self._planner = Planner()
        self._named: tuple[Any, Names] | None = None  # of `_names`
        self._number = custom_op.number_of(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_named": None}  # it knows objects by their ids

    def __setstate__(self, state: dict[str, Any]) -> None:
        of_old = {
            "cuda_graphs": True,
            "inner_params": None,
            "step_weights": None,
            "meta_gradient": None,
            "on_nonfinite": "raise",
        }
        super().__setstate__({"inner_optimizer": SGD(), **of_old, **state})  # of a state without
        if "step_params" not in self._modules:
            self.step_params = nn.ParameterDict()
        self._number = custom_op.number_of(self)  # a copy is another module
        self._named = None

    def _check_options(self) -> None:
        """The options, which a user may also set after the module was built."""
        check_loss(self.loss)
        check_count("inner_steps", self.inner_steps, least=0)
        check_flag("first_order", self.first_order)
        check_flag("cuda_graphs", self.cuda_graphs)
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_choice("backend", self.backend, BACKENDS)
        check_choice("fast_weights", self.fast_weights, FAST_WEIGHTS)
        check_choice("on_nonfinite", self.on_nonfinite, ("raise", "skip", "warn"))
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size, least=1)
        check_rule(self.inner_optimizer)
        check_step_weights(self.step_weights, self.inner_steps)
        if self.meta_gradient is not None:
            learns = bool(self.rates.learning())
            check_meta_gradient(
                self.meta_gradient,
                self.inner_optimizer,
                self._step_weights(self.inner_steps),
                learns,
                self.first_order,
            )

    @property
    def inner_lr(self) -> Rate | dict[str, Rate]:
        """The inner learning rates in the form they were given."""
        return self.rates.spec()

    def inputs(self) -> list[Tensor]:
        """The parameters and the rates that get a gradient."""
        named, of_steps = self.model.named_parameters(), self._by_step
        return [of_steps.get(n, p) for n, p in named if p.requires_grad] + self.rates.learning()

    @property
    def _by_step(self) -> dict[str, nn.Parameter]:
        """`step_params` by the names of the model's."""
        if not self._modules["step_params"]:  # asked at each call
            return {}
        return {key.replace("/", "."): values for key, values in self.step_params.items()}

    def _knows(self, model: Any) -> bool:
        """Whether the names of a model of this signature were found before. Else whoever asks must
        hold the model (`surroundings.using`): another thread may have put other tensors into it."""
        return self._named is not None and self._named[0] == (model, self._chosen())

    def _chosen(self) -> tuple[str, ...] | None:
        return None if self.inner_params is None else tuple(self.inner_params)

    def _names(self, model: Any) -> Names:
        """Of a model with this signature."""
        if self._named is None or not self._knows(model):
            named = dict(self.model.named_parameters())
            learned = tuple(name for name, p in named.items() if p.requires_grad)
            found = matching("inner_params", self.inner_params, named)
            of_steps = self._by_step
            if found is None:
                found = [name for name in learned if name not in of_steps]
            if both := sorted(set(found) & set(of_steps)):
                raise ValueError(
                    f"step_params and inner_params both have {both}; what has values for each step "
                    "does not adapt: leave it out of one of them"
                )
            if frozen := [name for name in of_steps if name not in learned]:
                raise ValueError(
                    f"step_params has {frozen}, which do not require grad in the model; what has "
                    "values for each step is learned"
                )
            names = Names({name: named[name] for name in found}, learned)
            self._named = (model, self._chosen()), names
        return self._named[1]

    def _asked(self, inner_steps: int, batch: TaskBatch, model: Any, wants_inputs: bool) -> Asked:
        """`model`: its signature, see `_knows`."""
        names = self._names(model)
        by_number: frozenset[str] = frozenset()
        if self.rates.may_be_by_number:
            by_number = self.rates.by_number(names.adapting, inner_steps)
        return Asked(
            self.loss if isinstance(self.loss, str) else id(self.loss),
            inner_steps,
            self.first_order,
            self.backend,
            self.fast_weights,
            self.chunk_size,
            torch.get_float32_matmul_precision(),
            self.cuda_graphs,
            tuple(names.adapting),
            names.learned,
            by_number,
            bool(self.rates.learning()),
            self.inner_optimizer,
            self._step_weights(inner_steps),
            batch.support_weight is not None or batch.query_weight is not None,
            wants_inputs,
            self.meta_gradient,
            tuple(self._by_step),
        )

    def _step_weights(self, inner_steps: int) -> tuple[float, ...]:
        """Of the module's own number of steps; with others, as in `adapt`, no query loss counts."""
        if inner_steps != self.inner_steps:
            return ()
        return check_step_weights(self.step_weights, inner_steps)

    def _problem(
        self, inner_steps: int, planned: Planned, batch: TaskBatch, detached: bool = True
    ) -> Problem:
        named, asked = planned.named, planned.plan.asked
        return Problem(
            model=self.model,
            parameters={name: p.detach() for name, p in named.items()} if detached else named,
            loss=self.loss,
            inner_steps=inner_steps,
            first_order=self.first_order,
            rates=self.rates.table(planned.adapting, inner_steps),
            meta=asked.learned,
            rule=self.inner_optimizer,
            step_weights=asked.step_weights,
            wants_inputs=asked.wants_inputs,
            weighted_rows=asked.weighted_rows,
            outer=self.meta_gradient,
            by_step={name: values.detach() for name, values in self._by_step.items()},
        )


def _of_steps(model: nn.Module, patterns: object, inner_steps: int) -> nn.ParameterDict:
    """Values for each step of the parameters that match."""
    named = dict(model.named_parameters())
    found = matching("step_params", patterns, named) if patterns != () else []
    kept = nn.ParameterDict()
    for name in found or ():
        p = named[name].detach()
        kept[name.replace(".", "/")] = nn.Parameter(p.repeat(inner_steps + 1, *(1,) * p.dim()))
    return kept


def wants_inputs(batch: TaskBatch) -> bool:
    """Whether gradients by the rows are asked for."""
    return torch.is_grad_enabled() and (
        getattr(batch.support_x, "requires_grad", False)
        or getattr(batch.query_x, "requires_grad", False)
    )
