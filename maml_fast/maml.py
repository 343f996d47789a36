"""`MAML`: the meta-step as a module, its result, and the adapted models.

T tasks, N support rows, M query rows, S inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast import custom_op, meta_step
from maml_fast.finite import check_finite, check_losses
from maml_fast.inputs import check_batch, check_classes, check_query, check_targets
from maml_fast.layers import Asked
from maml_fast.losses import LOSSES
from maml_fast.plan import BACKENDS, FAST_WEIGHTS, Plan
from maml_fast.planner import Planned, Planner
from maml_fast.problem import AdaptedTasks, FlatGradients, Loss, Outcome, Problem, TaskBatch
from maml_fast.rates import InnerRates, Rate
from maml_fast.refusals import check_statistics
from maml_fast.signature import signature
from maml_fast.surroundings import plain, recordable, using

PLAIN_TENSORS = (Tensor, nn.Parameter)


@dataclass
class MetaStepResult:
    """What a meta-step yields.

    loss: scalar; `loss.backward()` fills the gradients of the model's parameters and of rates.
    task_losses: [T], detached: the query loss of each task.
    support_losses: [T, S], detached: the support loss before each inner step.
    query_outputs: [T, M, ...], detached: predictions of the adapted models.
    """

    loss: Tensor
    task_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor


class AdaptedModels:
    """The adapted models of all tasks of one batch; see `MAML.adapt`.

    support_losses: [T, S], the support loss before each inner step.
    """

    def __init__(
        self,
        support_x: Tensor,
        adapted: AdaptedTasks,
        model: nn.Module,
        plan: Plan,
    ) -> None:
        self._row = support_x[:, :1].clone()  # [T, 1, ...]: what a query is compared with
        self._adapted, self._model, self._plan = adapted, model, plan
        self.support_losses = adapted.support_losses

    def __call__(self, query_x: Tensor) -> Tensor:
        """Predictions [T, M, ...] of each task's model for its rows query_x [T, M, ...].

        Raises ValueError or TypeError if query_x has other tasks or features than support_x, and
        UnsupportedModelError where the model has since come to norms by running statistics.
        """
        check_query(query_x, self._row)
        check_statistics(self._model)
        with using(self._model, self._plan), plain(query_x.device):
            return self._adapted.predict(recordable(query_x))

    def parameters(self) -> dict[str, Tensor]:
        """Adapted parameters, {name: [T, *shape]}, by the names of `model.named_parameters()`."""
        with plain(self._row.device):
            return self._adapted.parameters()


class MAML(nn.Module):
    """Model-agnostic meta-learning: many tasks' inner loops and the exact meta-gradient.

    model: any `nn.Module` that maps rows [N, ...] to predictions [N, ...]. Parameters that
        require grad adapt in the inner loop and get a meta-gradient.
    loss: "mse", "cross_entropy", "bce_with_logits", "huber" (delta 1), or a callable(prediction,
        target) -> scalar for one task, which runs on backends reference and functional. Named
        losses are the mean over a task's rows.
    inner_lr: a float, a scalar or [inner_steps] tensor, or a mapping from the name of every
        parameter that requires grad to any of these. An `nn.Parameter` gets its gradient.
    inner_steps: gradient steps on the support rows, from 0 up.
    first_order: leave out the second-order terms (FOMAML).
    reduction: of the loss over tasks, "mean" or "sum".
    backend: "auto", "triton", "cpu", "torch", "functional" or "reference".
    chunk_size: tasks a pass; None: chosen to fit memory.
    fast_weights: "auto" (per layer, by cost), "factored" or "dense"; of planned backends only.
    cuda_graphs: whether backend "triton" may keep a meta-step as a CUDA graph once it comes again
        with data of the same shapes, and replay it from then on.

    Computes in the dtype of the model, under `torch.autocast` too. Batch norm
    takes the statistics of the rows of one task at a time, support and query each by theirs
    (transductive), as in Finn et al. 2017; running statistics are neither read nor updated. eval()
    changes nothing for a norm without them; one that has them would read them in eval(), and is
    refused with an UnsupportedModelError.
    Raises TypeError or ValueError naming the argument. Source: Finn et al. 2017, algorithm 1.
    """

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
        self._check_options()
        self._planner = Planner()
        self._number = custom_op.number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"cuda_graphs": True, **state})  # of a state without
        self._number = custom_op.number_of(self)  # a copy is another module

    def _check_options(self) -> None:
        """The options, which a user may also set after the module was built."""
        if not callable(self.loss):
            _check_choice("loss", self.loss, LOSSES, " or a callable(prediction, target)")
        elif isinstance(self.loss, nn.Module) and any(
            p.requires_grad for p in self.loss.parameters()
        ):
            raise ValueError(
                "loss has parameters that require grad, for which no gradient is computed; call "
                "loss.requires_grad_(False), or make them part of the model"
            )
        _check_count("inner_steps", self.inner_steps, least=0)
        if not isinstance(self.first_order, bool):
            raise TypeError(f"first_order is {self.first_order!r}; wanted is True or False")
        if not isinstance(self.cuda_graphs, bool):
            raise TypeError(f"cuda_graphs is {self.cuda_graphs!r}; wanted is True or False")
        _check_choice("reduction", self.reduction, ("mean", "sum"))
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("fast_weights", self.fast_weights, FAST_WEIGHTS)
        if self.chunk_size is not None:
            _check_count("chunk_size", self.chunk_size, least=1)

    @property
    def inner_lr(self) -> Rate | dict[str, Rate]:
        """The inner learning rates in the form they were given."""
        return self.rates.spec()

    def forward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> MetaStepResult:
        """The meta-step of a batch of tasks.

        support_x, query_x: [T, N, ...], [T, M, ...], in the model's dtype and on its device.
        support_y, query_y: int64 classes [T, N], [T, M] for cross entropy; else shaped as the
            predictions.
        Raises ValueError or TypeError for data that do not fit, NonFiniteError where a loss or a
        gradient is NaN or infinite, UnsupportedModelError where the backend cannot run the model.
        """
        if torch.compiler.is_compiling():
            return self._as_operation(support_x, support_y, query_x, query_y)
        batch = TaskBatch(*map(recordable, (support_x, support_y, query_x, query_y)))
        planned, problem = self._prepare(batch, self.inner_steps, detached=False)
        if not (torch.is_grad_enabled() and planned.adapting):
            outcome = self._run(planned.plan, problem, batch, False)
            loss = _reduce(outcome.task_losses, self.reduction)
            rest = outcome.task_losses, outcome.support_losses, outcome.query_outputs
            return MetaStepResult(loss, *rest)

        def run() -> tuple[Outcome, Mapping[str, Tensor], list[Tensor]]:
            return self._run_with_gradients(planned.plan, problem, batch)

        inputs = (*planned.adapting, *self.rates.learning())
        return MetaStepResult(*_MetaStep.apply(run, self.reduction, *inputs))

    def _as_operation(self, *batch: Tensor) -> MetaStepResult:
        """The meta-step as torch.compile sees it."""
        inputs = self.inputs()
        gradient = torch.is_grad_enabled() and bool(inputs)
        found = custom_op.meta_step(inputs, *batch, self._number, self.inner_steps, gradient)
        return MetaStepResult(*found[:4])

    def inputs(self) -> list[Tensor]:
        """The parameters and the rates that get a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad] + self.rates.learning()

    def run_whole(self, *batch: Tensor, gradient: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Loss, task losses, support losses and query outputs; and, if asked for, the gradients of
        `inputs`. For torch.compile, by way of `custom_op`; `value_and_grad` is for people."""
        with torch.set_grad_enabled(gradient):
            result = self(*batch)
        gradients = torch.autograd.grad(result.loss, self.inputs()) if gradient else ()
        rest = result.task_losses, result.support_losses, result.query_outputs
        return [result.loss.detach(), *rest], list(gradients)

    @torch.compiler.disable
    def value_and_grad(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[MetaStepResult, dict[str, Tensor]]:
        """The meta-step and its gradient at once, without a graph: `loss` cannot be differentiated.

        The gradients of the module's own parameters (`maml.parameters()`: the model's that require
        grad, and learnable rates) are returned by the names of `maml.named_parameters()`, and no
        `.grad` is touched. The same numbers as by `forward` and `loss.backward()`, without
        autograd's time for it, which counts where tasks are few. Raises as `forward` does.
        """
        with torch.no_grad():
            batch = TaskBatch(*map(recordable, (support_x, support_y, query_x, query_y)))
            planned, problem = self._prepare(batch, self.inner_steps, detached=False)
            if planned.adapting:
                outcome, found, rates = self._run_with_gradients(planned.plan, problem, batch)
            else:
                outcome, found, rates = self._run(planned.plan, problem, batch, False), {}, []
            loss = _reduce(outcome.task_losses, self.reduction)
        gradients = dict(zip(planned.own_names, found.values(), strict=True))
        if rates:
            owned = {id(p): name for name, p in self.named_parameters()}
            for rate, gradient in zip(self.rates.learning(), rates, strict=True):
                if name := owned.get(id(rate)):
                    gradients[name] = gradient
        rest = outcome.task_losses, outcome.support_losses, outcome.query_outputs
        return MetaStepResult(loss, *rest), gradients

    def _run(self, plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool) -> Outcome:
        quick = plan.reads_memory and not torch.is_inference_mode_enabled()
        if quick:
            outcome = meta_step.run(plan, problem, batch, gradient)
            if outcome.finite:
                return outcome
        with using(self.model, plan), plain(batch.support_x.device):
            if not quick:
                outcome = meta_step.run(plan, problem, batch, gradient)
            if plan.reads_memory and problem.loss == "cross_entropy" and not outcome.finite:
                check_classes(batch, plan.output[-1])  # one that there is not makes the loss NaN
            check_finite(plan, problem, batch, outcome)
        return outcome

    def _run_with_gradients(
        self, plan: Plan, problem: Problem, batch: TaskBatch
    ) -> tuple[Outcome, Mapping[str, Tensor], list[Tensor]]:
        """The gradients of parameters by name, and of `rates.learning()`, reduced over tasks."""
        outcome = self._run(plan, problem, batch, gradient=True)
        found, by_rate = outcome.gradients, outcome.rate_gradients
        assert found is not None and by_rate is not None
        rates = self.rates.gather(by_rate) if self.rates.learning() else []
        if self.reduction == "mean":
            whole = [found.flat] if isinstance(found, FlatGradients) else list(found.values())
            if whole or rates:
                torch._foreach_div_(whole + rates, batch.tasks)
        return outcome, found, rates

    @torch.compiler.disable
    @torch.no_grad()
    def adapt(
        self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None
    ) -> AdaptedModels:
        """The inner loop alone, without gradients.

        support_x: [T, N, ...]; support_y: [T, N, ...]; inner_steps: None for the module's own.
        Returns models to call with query_x [T, M, ...]. Raises as `forward` does.
        """
        steps = self.inner_steps if inner_steps is None else inner_steps
        _check_count("inner_steps", steps, least=0)
        x, y = recordable(support_x), recordable(support_y)
        batch = TaskBatch(x, y, x, y)
        planned, problem = self._prepare(batch, steps)
        plan = planned.plan
        with using(self.model, plan), plain(x.device):
            # Copies: what was adapted stays, whatever becomes of the model and of the data.
            own = {name: p.clone() for name, p in problem.parameters.items()}
            problem = dataclasses.replace(problem, parameters=own)
            adapted = meta_step.adapt(plan, problem, x.clone(), y)
        check_losses(adapted.support_losses)
        return AdaptedModels(x, adapted, self.model, plan)

    def plan(self, support_x: Tensor, query_x: Tensor) -> Plan:
        """What would run for data of these shapes, [T, N, ...] and [T, M, ...]; printable."""
        self._check_options()
        x, q = recordable(support_x), recordable(query_x)
        batch = TaskBatch(x, x, q, q)
        check_batch(batch, next(self.model.parameters(), None))
        with using(self.model), plain(x.device):
            planned = self._planner.plan_for(
                self.model, self.loss, self._asked(self.inner_steps), batch
            )
            if not planned.sure:  # without targets: the squared distance from zeros stands in
                zeros = [
                    torch.zeros_like(out).expand(len(x), *out.shape) for out in planned.outputs
                ]
                stand_in = TaskBatch(x, zeros[0], q, zeros[1])
                problem = self._problem(self.inner_steps, planned)
                problem = dataclasses.replace(problem, loss="mse")
                sure = planned.try_out(problem, stand_in)
                planned.sure = sure and isinstance(self.loss, str)
        return planned.plan

    def _prepare(
        self, batch: TaskBatch, inner_steps: int, detached: bool = True
    ) -> tuple[Planned, Problem]:
        """The checked call's plan, and its problem. Not `detached`: where the backend reads no more
        than the parameters' memory, they are handed over as they are."""
        self._check_options()
        call = self._call(batch, inner_steps)
        planned = self._planner.recall(call)
        if planned is not None:
            detached = detached or not planned.plan.reads_memory
            if self.loss == "cross_entropy" and detached:  # else `_run` hears of it from the loss
                check_classes(batch, planned.outputs[1].shape[-1])
            return planned, self._problem(inner_steps, planned, detached)
        check_batch(batch, next(self.model.parameters(), None))
        with using(self.model), plain(batch.support_x.device):
            asked = self._asked(inner_steps)
            planned = self._planner.plan_for(self.model, self.loss, asked, batch)
            check_targets("support_y", batch.support_y, planned.outputs[0], self.loss)
            check_targets("query_y", batch.query_y, planned.outputs[1], self.loss)
            if self.loss == "cross_entropy":
                check_classes(batch, planned.outputs[1].shape[-1])
            problem = self._problem(inner_steps, planned)
            if not planned.sure:
                planned.sure = planned.try_out(problem, batch)
            if planned.sure:
                self._planner.remember(call, planned)
        return planned, problem

    def _call(self, batch: TaskBatch, inner_steps: int) -> tuple[Any, ...] | None:
        """All that `check_batch`, `check_targets` and a plan depend on: a call that was right once
        is not looked at again."""
        if not all(type(t) in PLAIN_TENSORS and not t.is_nested for t in batch):
            return None
        return (
            *((t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in batch),
            torch.is_grad_enabled(),
            self._asked(inner_steps),
            signature(self.model),
        )

    def _asked(self, inner_steps: int) -> Asked:
        return Asked(
            self.loss if isinstance(self.loss, str) else id(self.loss),
            inner_steps,
            self.first_order,
            self.backend,
            self.fast_weights,
            self.chunk_size,
            torch.get_float32_matmul_precision(),
            self.cuda_graphs,
        )

    def _problem(self, inner_steps: int, planned: Planned, detached: bool = True) -> Problem:
        named = planned.named
        dtype = next((p.dtype for p in named.values()), torch.float64)
        return Problem(
            model=self.model,
            parameters={name: p.detach() for name, p in named.items()} if detached else named,
            loss=self.loss,
            inner_steps=inner_steps,
            first_order=self.first_order,
            rates=self.rates.table(planned.adapting_names, inner_steps, dtype),
        )


class _MetaStep(torch.autograd.Function):
    """The loss as a function of parameters and rates; its gradient is known when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[], tuple[Outcome, Mapping[str, Tensor], list[Tensor]]],
        reduction: str,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        outcome, found, rates = run()
        if isinstance(found, FlatGradients):
            ctx.like = found.like
            ctx.save_for_backward(found.flat, *rates)
        else:
            ctx.like = None
            ctx.save_for_backward(*found.values(), *rates)
        rest = (outcome.task_losses, outcome.support_losses, outcome.query_outputs)
        ctx.mark_non_differentiable(*rest)
        return _reduce(outcome.task_losses, reduction), *rest

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be lost in silence
            raise RuntimeError("the meta-gradient of MAML cannot be differentiated once more")
        scaled = [gradient * d_loss for gradient in ctx.saved_tensors]
        if ctx.like is not None:
            scaled[:1] = torch._C._nn.unflatten_dense_tensors(scaled[0], ctx.like)
        return None, None, *scaled


def _reduce(task_losses: Tensor, reduction: str) -> Tensor:
    return task_losses.mean() if reduction == "mean" else task_losses.sum()


def _check_choice(name: str, value: object, known: Any, more: str = "") -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; wanted is one of {list(known)}{more}")
    if value not in known:
        raise ValueError(f"{name} is {value!r}; wanted is one of {list(known)}{more}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; wanted is an integer, {least} or more")
    if value < least:
        raise ValueError(f"{name} is {value}; wanted is {least} or more")
