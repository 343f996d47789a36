"""A meta-step prepared for the GPU: its launches, and their results as a backend's answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from maml_fast.backends import tuning
from maml_fast.backends.cuda_graphs import Graphs
from maml_fast.layers import Variant
from maml_fast.ops import Weighted
from maml_fast.plan import Plan
from maml_fast.problem import FlatGradients, Outcome, Problem, TaskBatch
from maml_fast.recorder import ALL_LAYERS, OUTSIDE, during


class Results(NamedTuple):
    """What a meta-step leaves on the device.

    numbers: [T + T*S + P + 2*S*L], the losses of queries and of supports, the gradients of the
        parameters that adapt, one behind the other, and those of the rates of each layer's weight
        and bias, [S, L, 2]; the last two only where asked for.
    outputs: [T, M, ...]
    total: of numbers; finite only if all of them are.
    """

    numbers: Tensor
    outputs: Tensor
    total: Tensor


class PreparedStep:
    """What is known of a meta-step before its data come; `launch` is a kind of kernel's own."""

    def __init__(self, plan: Plan, variant: Variant) -> None:
        self.plan, self.variant = plan, variant
        assert plan.triton is not None
        self.triton = plan.triton
        self.tuned = False
        self.graphs = Graphs(plan.asked.cuda_graphs)
        self.lock = threading.Lock()  # callers take turns
        self.ops = [
            layer.link.op
            for layer in plan.layers
            if isinstance(layer.link.op, Weighted) and not layer.prelude
        ]

    def get_ready(self, problem: Problem) -> None:
        """Bring to the device what `launch` reads beside parameters and data."""
        raise NotImplementedError

    def tune(self, problem: Problem, batch: TaskBatch) -> bool:
        """Choose by measuring, where there is a choice; False: nothing could be measured."""
        raise NotImplementedError

    def launch(self, problem: Problem, batch: TaskBatch) -> Results:
        """Start the meta-step on the device; nothing waits for it."""
        raise NotImplementedError

    def key(self, problem: Problem) -> object | None:
        """What a captured meta-step depends on beside shapes; None if it must not be captured."""
        raise NotImplementedError

    def alive(self) -> object:
        """What a captured meta-step reads beside parameters and data, and must not be freed."""
        raise NotImplementedError

    def run(self, problem: Problem, batch: TaskBatch) -> Outcome:
        self.get_ready(problem)
        if batch.support_x.is_cuda and torch.cuda.is_current_stream_capturing():
            # What others capture is launched as it is, and its result not looked at.
            return self._outcome(problem, self.launch(problem, batch), batch.tasks, look=False)
        if not self.tuned and self.triton.tunes and tuning.possible(batch.support_x):
            self.tuned = self.tune(problem, batch)
        if self.plan.recorder is None:
            results = self.graphs.run(
                self.key(problem), batch, lambda batch: self.launch(problem, batch), self.alive
            )
        else:  # launched one by one: inside of a graph nothing is told apart
            with during(self.plan.recorder, OUTSIDE, ALL_LAYERS):
                results = self.launch(problem, batch)
        return self._outcome(problem, Results(*results), batch.tasks)

    def _outcome(
        self, problem: Problem, results: Results, tasks: int, look: bool = True
    ) -> Outcome:
        variant, numbers = self.variant, results.numbers
        like = [problem.parameters[name].detach() for name in variant.adapting]
        sizes = [tasks, tasks * variant.inner_steps, len(numbers)]
        sizes[2] -= sum(sizes[:2])
        losses, support_losses, rest = numbers.split(sizes)
        outcome = Outcome(
            losses,
            support_losses.view(tasks, variant.inner_steps),
            results.outputs,
            finite=True if look and results.total.isfinite().item() else None,
        )
        if variant.gradient:
            count = sum(tensor.numel() for tensor in like)
            outcome.gradients = FlatGradients(variant.adapting, rest[:count], like)
            outcome.rate_gradients = self._by_name(rest[count:])
        return outcome

    def _by_name(self, rate_gradients: Tensor) -> dict[str, Tensor]:
        """{name: [S]} from [S * L * 2]"""
        variant = self.variant
        if not variant.learning:
            return {}
        by_layer = rate_gradients.view(variant.inner_steps, len(self.ops), 2)
        found = {name: by_layer.new_zeros(variant.inner_steps) for name in variant.learning}
        for i, op in enumerate(self.ops):
            for j, name in enumerate((op.weight, op.bias)):
                if name in found:
                    found[name] = by_layer[:, i, j]
        return found


def places(parameters: Mapping[str, Tensor]) -> tuple[tuple[int, Sequence[int]], ...]:
    """Where parameters lie: a captured meta-step reads them there."""
    return tuple((p.data_ptr(), p.stride()) for p in parameters.values())


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which is that of the data meanwhile."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def no_numbers(like: Tensor) -> Tensor:
    """A tensor for a kernel's argument that it will not look at."""
    return torch.empty(1, dtype=torch.float32, device=like.device)
