"""The meta-step in C++: a plan and its tensors become one call of `maml_fast._cpu`.

Everything of a tile of tasks, inner steps, query and Hessian-vector products, runs inside that call
(csrc/tile.h). Here are only sizes, addresses, and the tensors that the results go to. With few
tasks that takes longer than the arithmetic, so what can be known before a call is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maml_fast.backends.addresses import address, in_memory
from maml_fast.cpu_plan import engine_layers, prepare
from maml_fast.layers import Layers, Variant
from maml_fast.ops import Weighted
from maml_fast.plan import Plan
from maml_fast.problem import FlatGradients, Outcome, Problem, TaskBatch
from maml_fast.recorder import Recorder

Rates = Mapping[str, tuple[float, ...] | Tensor]

PROGRAMS_KEPT = 8  # of a plan, and one for each step's loss: each keeps memory for its tiles


def meta_step(problem: Problem, batch: TaskBatch, plan: Plan, gradient: bool) -> Outcome:
    """The whole meta-step of all tasks, in one call."""
    program = _program(plan, problem, batch, gradient)
    return program.run(problem, batch, recorder=plan.recorder)


class AdaptedByCpu:
    """Adapted models of all tasks. The inner steps are run again for each query: no task's weights
    are kept."""

    def __init__(self, plan: Plan, problem: Problem, batch: TaskBatch) -> None:
        self._plan, self._problem = plan, problem
        weight = batch.support_weight
        self._support = TaskBatch(
            batch.support_x,
            batch.support_y.clone(),
            batch.support_x,
            None,  # type: ignore[arg-type]
            None if weight is None else weight.clone(),
        )
        self.support_losses = self._run(batch.support_x[:, :1]).support_losses

    def predict(self, query_x: Tensor) -> Tensor:
        """[T, M, ...] -> [T, M, ...]"""
        return self._run(query_x).query_outputs

    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, *shape]}"""
        query_x, tasks = self._support.support_x[:, :1], self._support.tasks
        found = {
            name: tensor.expand(tasks, *tensor.shape)
            for name, tensor in self._problem.parameters.items()
        }
        adapted = {
            name: query_x.new_empty(tasks, *self._problem.parameters[name].shape)
            for layer in self._plan.layers
            if isinstance(layer.link.op, Weighted) and layer.form != "shared"
            for name in layer.link.op.parameters
        }
        self._run(query_x, adapted)
        return found | adapted

    def _run(self, query_x: Tensor, adapted: dict[str, Tensor] | None = None) -> Outcome:
        batch = self._support._replace(query_x=query_x)
        program = _program(self._plan, self._problem, batch, False, adapted is not None)
        return program.run(self._problem, batch, adapted or {})


def _program(
    plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool, exports: bool = False
) -> Program:
    """The plan's program for these sizes, made or kept from an earlier call."""
    variant = Variant.of(problem, batch, gradient, exports)
    program = plan.programs.pop(variant, None) or Program(plan, variant, problem)
    plan.programs[variant] = program  # the latest last
    if len(plan.programs) > PROGRAMS_KEPT + len(plan.asked.step_weights):
        plan.programs.pop(next(iter(plan.programs)), None)
    return program


class Program:
    """A `_cpu.Prepared`, and how a call's tensors are handed to it."""

    def __init__(self, plan: Plan, variant: Variant, problem: Problem) -> None:
        self.variant = variant
        self.output, self.dtype = plan.output[1:], plan.shapes.dtype
        ops = [layer.link.op for layer in plan.layers if isinstance(layer.link.op, Weighted)]
        assert plan.cpu is not None
        self.prepared = prepare(Layers([], plan.layers), plan.cpu, variant, plan.shapes)
        self.engine_layers = engine_layers(plan.layers, plan.cpu)
        used = {name for op in ops for name in op.parameters}
        self.unused = [name for name in variant.adapting if name not in used]
        self.like = [problem.like(name).detach() for name in variant.adapting]
        sizes = [parameter.numel() for parameter in self.like]
        itemsize = plan.shapes.dtype.itemsize
        starts = {name: itemsize * sum(sizes[:i]) for i, name in enumerate(variant.adapting)}
        # Each layer, and where the gradients of its weight and bias begin, in bytes; -1: nowhere
        self.layers = [
            (
                op.weight or "",
                op.bias or "",
                starts.get(op.weight or "", -1),
                starts.get(op.bias or "", -1),
            )
            for op in ops
        ]
        self.numbers = sum(sizes)

    def run(
        self,
        problem: Problem,
        batch: TaskBatch,
        adapted: dict[str, Tensor] | None = None,
        recorder: Recorder | None = None,
    ) -> Outcome:
        """Fill an `Outcome`; with `adapted`, also its tensors [T, *shape], by name."""
        variant, x = self.variant, batch.query_x
        tasks, rows = x.shape[:2]
        assert x.dtype == self.dtype  # the engine reads memory, not types
        losses = x.new_empty(tasks)
        support_losses = x.new_empty(tasks, variant.inner_steps)
        outputs = x.new_empty(tasks, rows, *self.output)
        flat = x.new_empty(self.numbers) if variant.gradient else None
        alive: list[Tensor] = []  # what addresses point to, until the call is over
        rate_gradients: list[Tensor | None] = []
        by_number: dict[str, Tensor] = {}  # gradients of rates
        flat_start = 0 if flat is None else flat.data_ptr()
        addresses = [number for tensor in batch for number in _rows(tensor, alive)]
        by_input: tuple[Tensor, Tensor] | None = None
        if variant.inputs:
            by_input = x.new_empty(batch.support_x.shape), x.new_empty(x.shape)
        addresses += (losses.data_ptr(), support_losses.data_ptr(), outputs.data_ptr())
        addresses += (0, 0) if by_input is None else (rows.data_ptr() for rows in by_input)
        rates = []
        parameters, values = problem.parameters, problem.rates.values
        if problem.by_step:
            parameters = {**parameters, **problem.by_step}
        for weight, bias, weight_start, bias_start in self.layers:
            by_step = None
            if variant.learning and not variant.learning.isdisjoint((weight, bias)):
                by_step = torch.empty(2, variant.inner_steps, dtype=torch.float64)
            rate_gradients.append(by_step)
            addresses += (
                address(parameters[weight], alive) if weight else 0,
                address(parameters[bias], alive) if bias else 0,
                flat_start + weight_start if flat_start and weight_start >= 0 else 0,
                flat_start + bias_start if flat_start and bias_start >= 0 else 0,
                address(by_step, alive),
                address(adapted.get(weight), alive) if adapted else 0,
                address(adapted.get(bias), alive) if adapted else 0,
            )
            if variant.by_number:
                addresses += self._numbers_of_rates(values, (weight, bias), by_number, alive)
                rates.append((self._of_steps(values, weight), self._of_steps(values, bias)))
            else:
                addresses += (0, 0, 0, 0)
                rates.append((values.get(weight, ()), values.get(bias, ())))
        call = tasks, addresses, rates, torch.get_num_threads()
        finite = self.prepared.run(*call) if recorder is None else self._measured(call, recorder)
        outcome = Outcome(losses, support_losses, outputs, finite=finite)
        if flat is not None:
            outcome.gradients = FlatGradients(variant.adapting, flat, self.like)
            for name in self.unused:
                outcome.gradients[name].zero_()
            outcome.rate_gradients = self._by_name(rate_gradients, x) | by_number
            outcome.input_gradients = by_input
        return outcome

    def _measured(self, call: tuple[Any, ...], recorder: Recorder) -> bool:
        finite, found = self.prepared.measure(*call)
        recorder.add_engine(self.prepared, call[0], self.engine_layers, found)
        return bool(finite)

    def _of_steps(self, values: Rates, name: str) -> tuple[float, ...] | Tensor:
        """A rate for each step; zeros for the engine where each number has its own."""
        if name in self.variant.by_number:
            return (0.0,) * self.variant.inner_steps
        return values.get(name, ())

    def _numbers_of_rates(
        self,
        values: Rates,
        names: tuple[str, str],
        gradients: dict[str, Tensor],
        alive: list[Tensor],
    ) -> list[int]:
        """Addresses of rates by number, [S, *shape], and of their gradients, which are made."""
        places = [0, 0, 0, 0]
        for i, name in enumerate(names):
            if name in self.variant.by_number:
                rates = values[name]
                assert isinstance(rates, Tensor)
                assert rates.dtype == self.dtype  # of the parameter, see rates.py
                places[i] = address(rates.detach(), alive)
                if name in self.variant.learning:
                    gradients[name] = torch.empty(rates.shape, dtype=self.dtype)
                    places[i + 2] = address(gradients[name], alive)
        return places

    def _by_name(self, rate_gradients: Sequence[Tensor | None], like: Tensor) -> dict[str, Tensor]:
        learning = self.variant.learning
        if not learning:
            return {}
        learning = learning - self.variant.by_number
        found = {name: like.new_zeros(self.variant.inner_steps) for name in learning}
        for (weight, bias, *_), by_step in zip(self.layers, rate_gradients, strict=True):
            if by_step is not None:
                for name, gradient in zip((weight, bias), by_step, strict=True):
                    if name in learning:
                        found[name] = gradient.to(like.dtype)
        return found


def _rows(tensor: Tensor | None, alive: list[Tensor]) -> tuple[int, int, int]:
    """The address of rows [T, N, ...], and the numbers from task to task and from row to row."""
    if tensor is None:
        return 0, 0, 0
    tensor = in_memory(tensor, alive)
    if not tensor.is_contiguous() and not tensor[0, 0].is_contiguous():
        tensor = tensor.contiguous()
        alive.append(tensor)
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
