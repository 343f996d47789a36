"""The meta-step in one launch of the fused kernel, and one that adds up its programs' sums."""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from maml_fast import triton_plan
from maml_fast.backends import tuning
from maml_fast.backends.addresses import address, without_gaps
from maml_fast.backends.planned import frozen_stage, through
from maml_fast.backends.triton_step import PreparedStep, Results, no_numbers, places
from maml_fast.layers import Variant
from maml_fast.plan import Plan
from maml_fast.problem import Problem, TaskBatch
from maml_fast.surroundings import plain


class FusedStep(PreparedStep):
    """For all tasks of a pass. Holds the network's table, addresses and rates on the device."""

    def __init__(self, plan: Plan, variant: Variant, problem: Problem) -> None:
        super().__init__(plan, variant)
        self.kernels: Any = importlib.import_module("maml_fast.kernels.fused_program")
        used = {name for op in self.ops for name in (op.weight, op.bias)}
        self.sizes = {name: problem.parameters[name].numel() for name in variant.adapting}
        # The kernel knows no parameters that the chain does not use.
        self.used = [name for name in variant.adapting if name in used]
        ends = [0, *accumulate(self.sizes[name] for name in self.used)]
        starts = dict(zip(self.used, ends, strict=False))
        self.network = triton_plan.network_of(plan.layers, variant, starts, ends[-1])
        self.device = plan.shapes.device
        self.table = self.network.table().to(self.device)
        self.tiles = self.triton.tiles
        self._addresses: tuple[object, Tensor, list[Tensor]] = (None, self.table, [])
        self._rates: tuple[object, Tensor] = (None, self.table)

    def get_ready(self, problem: Problem) -> None:
        self._place(problem)
        self._set_rates(problem)

    def key(self, problem: Problem) -> object | None:
        if self._addresses[2]:  # copies, which a replay would not make again
            return None
        return places(problem.parameters), self.tiles

    def alive(self) -> object:
        return self.table, self._addresses, self._rates

    def _place(self, problem: Problem) -> None:
        """The parameters' addresses, on the device."""
        alive: list[Tensor] = []
        parameters = problem.parameters
        found = tuple(
            tuple(address(parameters[name] if name else None, alive) for name in (o.weight, o.bias))
            for o in self.ops
        )
        if found != self._addresses[0] or alive:
            table = torch.tensor(found, dtype=torch.int64).to(self.device)
            self._addresses = found, table, alive

    def _set_rates(self, problem: Problem) -> None:
        """The rates [S + 1, L, 2], on the device; those of a captured meta-step change in place."""
        values, still = problem.rates.values, (0.0,) * self.variant.inner_steps
        found = tuple(
            (values.get(op.weight or "", still), values.get(op.bias or "", still))
            for op in self.ops
        )
        before, table = self._rates
        if found != before:
            new = torch.tensor(found, dtype=torch.float32).permute(2, 0, 1)
            new = torch.cat([new, new.new_full((1, len(self.ops), 2), -1.0)])  # the query's
            table = new.to(self.device) if before is None else table.copy_(new)
            self._rates = found, table

    def launch(self, problem: Problem, batch: TaskBatch) -> Results:
        return self._launch(self._rows(problem, batch), self.tiles)

    def _rows(self, problem: Problem, batch: TaskBatch) -> TaskBatch:
        """The data [T, rows, features] without gaps, past the layers before any that adapts."""
        prelude = [frozen_stage(layer, problem) for layer in self.plan.layers if layer.prelude]
        rows = batch
        if prelude:
            with plain(batch.support_x.device):
                support_x, query_x = (through(prelude, x) for x in (batch.support_x, batch.query_x))
            rows = TaskBatch(support_x, batch.support_y, query_x, batch.query_y)
        return rows.map(lambda tensor: without_gaps(tensor, []))

    def _launch(self, batch: TaskBatch, tiles: Any) -> Results:
        variant, network, triton = self.variant, self.network, self.triton
        tasks, steps, x = batch.tasks, variant.inner_steps, batch.support_x
        gradients = sum(self.sizes.values()) if variant.gradient else 0
        rates = 2 * steps * len(self.ops) if network.learns_rates else 0
        numbers = x.new_empty(tasks * (1 + steps) + gradients + rates)
        outputs = x.new_empty(tasks, *self.plan.output)
        losses, support_losses, found, rate_sums = numbers.split(
            [tasks, tasks * steps, gradients, rates]
        )
        by_task = x.new_empty(tasks, rates) if rates else no_numbers(x)
        missing = variant.gradient and len(self.used) < len(self.sizes)
        summed = x.new_empty(network.gradient_numbers) if missing else found
        out = self.kernels.Buffers(losses, support_losses, outputs, summed, by_task)
        programs = triton_plan.programs_for(tiles, 4 * network.program_size, tasks, triton.device)
        self.kernels.run(
            network, tiles, triton.precision, programs, self.table, self._addresses[1],
            self._rates[1], batch, out,
        )  # fmt: skip
        if missing:
            sizes = [self.sizes[name] for name in self.used]
            by_name = dict(zip(self.used, summed.split(sizes), strict=True))
            for name, place in zip(self.sizes, found.split([*self.sizes.values()]), strict=True):
                place.copy_(by_name[name]) if name in by_name else place.zero_()
        if rates:  # what is added up here cancels
            rate_sums.copy_(by_task.sum(0, dtype=torch.float64))
        return Results(numbers, outputs, numbers.sum())

    def tune(self, problem: Problem, batch: TaskBatch) -> bool:
        """The quickest of the tiles that give the same result as those of the plan."""
        triton, network = self.triton, self.network
        rows = self._rows(problem, batch)
        shape = [(layer.in_features, layer.out_features) for layer in network.layers]
        key = repr(
            (
                triton.device.name, self.kernels.constants(network, self.tiles, triton.precision),
                shape, network.inner_steps, network.rows, network.query_rows,
                batch.tasks.bit_length(),
            )
        )  # fmt: skip
        candidates = [self.tiles, *triton_plan.candidates(network)]
        sizes = [batch.tasks, batch.tasks * network.inner_steps]
        sizes += self.sizes.values() if self.variant.gradient else ()

        def run(tiles: Any) -> list[Tensor]:
            numbers = self._launch(rows, tiles).numbers
            return list(numbers.split([*sizes, len(numbers) - sum(sizes)]))

        found = tuning.quickest(key, list(dict.fromkeys(candidates)), run)
        self.tiles = found or self.tiles
        return found is not None
