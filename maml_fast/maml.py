"""`MAML`: the meta-step as a module, its result, and the adapted models.

T tasks, N support rows, M query rows, S inner steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast import custom_op, meta_step
from maml_fast.autograd import Found, MetaStep, reduce
from maml_fast.finite import check_finite, check_losses, warn_of, without_bad_tasks
from maml_fast.inputs import check_batch, check_classes, check_row_weights, check_targets
from maml_fast.layers import Asked
from maml_fast.options import check_count
from maml_fast.outer import Reptile
from maml_fast.plan import Plan
from maml_fast.planner import Planned
from maml_fast.problem import FlatGradients, Outcome, Problem, TaskBatch
from maml_fast.results import AdaptedModels, MetaStepResult, Trajectory
from maml_fast.rows import blank_targets
from maml_fast.settings import Settings, wants_inputs
from maml_fast.signature import signature
from maml_fast.surroundings import plain, recordable, using
from maml_fast.trajectory import trajectory

PLAIN_TENSORS = (Tensor, nn.Parameter)


class MAML(Settings):
    """Model-agnostic meta-learning: many tasks' inner loops and the exact meta-gradient.

    model: any `nn.Module` that maps rows [N, ...] to predictions [N, ...]. Parameters that
        require grad get a meta-gradient, and adapt in the inner loop unless inner_params says less.
    loss: "mse", "cross_entropy", "bce_with_logits", "huber" (delta 1), or a callable(prediction,
        target) -> scalar for one task, which runs on backends reference and functional. Named
        losses are the mean over a task's rows.
    inner_lr: a float, a scalar or [inner_steps] tensor, or a mapping from the name of every
        parameter that adapts to any of these, or to a tensor of the parameter's own shape, or
        [inner_steps, *shape] (Meta-SGD, Li et al. 2017). An `nn.Parameter` gets its gradient; a
        `PositiveRate` too, and stays above 0.
    inner_steps: gradient steps on the support rows, from 0 up.
    first_order: leave out the second-order terms (FOMAML).
    reduction: of the loss over tasks, "mean" or "sum".
    backend: "auto", "triton", "cpu", "torch", "functional" or "reference".
    chunk_size: tasks a pass at most, where a backend's memory grows with them (`plan` says how many
        it takes). None: a function of sizes, so that the same data give the same bits on any
        machine; less where a GPU has less memory free.
    inner_params: names, or patterns with *, of the parameters that adapt, each task's own; others
        that require grad get a meta-gradient still (ANIL, BOIL, CAVIA). None: all that require
        grad. A parameter that adapts and does not require grad gets none.
    inner_optimizer: what an inner step does with the gradient, `maml_fast.inner.SGD(...)`,
        `Adam(...)` or a rule of one's own.
    step_weights: [inner_steps + 1] numbers w of sum_k w_k L_query(theta_k), the query losses before
        each inner step and behind the last (Antoniou et al. 2019). None: the last alone.
    meta_gradient: `maml_fast.outer.Reptile()` or `Implicit(...)` (iMAML); None: the exact one, or
        the first-order one.
    step_params: names or patterns of parameters that do not adapt and have values of their own for
        each inner step and for the query, as the norms of MAML++: they are learned as
        `maml.step_params`, [inner_steps + 1, *shape], and begin as the model's.
    fast_weights: "auto" (per layer, by cost), "factored" or "dense"; of planned backends only.
    on_nonfinite: what becomes of tasks whose loss or gradient is NaN or infinite: "raise" a
        NonFiniteError, "skip" them, so that loss and gradient are those of the others, or "warn",
        which skips them with a NonFiniteWarning. Where no task is left both raise. The result's
        `skipped` names them (not under torch.compile).
    cuda_graphs: whether backend "triton" may keep a meta-step as a CUDA graph once it comes again
        with data of the same shapes, and replay it from then on.

    Computes in the dtype of the model, under `torch.autocast` too. Batch norm
    takes the statistics of the rows of one task at a time, support and query each by theirs
    (transductive), as in Finn et al. 2017; running statistics are neither read nor updated. eval()
    changes nothing for a norm without them; one that has them would read them in eval(), and is
    refused with an UnsupportedModelError.
    Raises TypeError or ValueError naming the argument. Source: Finn et al. 2017, algorithm 1.
    """

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> MetaStepResult:
        """The meta-step of a batch of tasks.

        support_x, query_x: [T, N, ...], [T, M, ...], in the model's dtype and on its device.
        support_y, query_y: int64 classes [T, N], [T, M] for cross entropy; else shaped as the
            predictions.
        support_weight, query_weight: [T, N], [T, M], what a row counts in its task's loss, which is
            the weighted mean; bool, or numbers from 0 up. None: all alike. Rows of weight 0 change
            nothing, whatever they hold, and their query_outputs are 0.
        Where support_x or query_x requires grad, `loss.backward()` fills its gradient too.
        Raises ValueError or TypeError for data that do not fit, NonFiniteError where a loss or a
        gradient is NaN or infinite (see on_nonfinite), UnsupportedModelError where the backend
        cannot run the model.
        """
        data = support_x, support_y, query_x, query_y, support_weight, query_weight
        if torch.compiler.is_compiling():
            weighted = support_weight is not None or query_weight is not None
            if weighted or support_x.requires_grad or query_x.requires_grad:
                return self._outside_of_graphs(*data)
            return self._as_operation(support_x, support_y, query_x, query_y)
        return self._meta_step(*data)

    @torch.compiler.disable
    def _outside_of_graphs(self, *data: Tensor | None) -> MetaStepResult:
        """What the operation for torch.compile has not: it breaks the graph there."""
        return self._meta_step(*data)

    def _meta_step(self, *data: Tensor | None) -> MetaStepResult:
        batch = self._batch(*data)
        planned, problem = self._prepare(batch, self.inner_steps, detached=False)
        inputs = [batch.support_x, batch.query_x] if problem.wants_inputs else []
        if not (torch.is_grad_enabled() and (planned.learned or inputs or problem.rates.learning)):
            outcome = self._run(planned.plan, problem, batch, False)
            loss = reduce(outcome.counted_losses, self.reduction)
            rest = outcome.task_losses, outcome.support_losses, outcome.query_outputs
            return MetaStepResult(loss, *rest, skipped=outcome.skipped)

        kept: list[Outcome] = []

        def run() -> Found:
            found = self._run_with_gradients(planned.plan, problem, batch)
            kept.append(found[0])
            return found

        learned = (*self._learned(planned), *self.rates.learning(), *inputs)
        result = MetaStepResult(*MetaStep.apply(run, self.reduction, *learned))
        result.residuals, result.skipped = kept[0].residuals, kept[0].skipped
        return result

    def _batch(self, *data: Tensor | None) -> TaskBatch:
        """The call's tensors; the targets of rows of weight 0 are blank."""
        batch = TaskBatch(*map(recordable, data[:4]))  # type: ignore[arg-type]
        if data[4] is None and data[5] is None:
            return batch
        parameter = next(self.model.parameters(), None)
        check_batch(batch, parameter)
        dtype = batch.support_x.dtype if parameter is None else parameter.dtype
        weights = []
        for name, weight, x in (
            ("support_weight", data[4], batch.support_x),
            ("query_weight", data[5], batch.query_x),
        ):
            if weight is not None:
                weight = check_row_weights(name, recordable(weight), x, dtype)
            weights.append(weight)
        return blank_targets(TaskBatch(*batch[:4], *weights))

    def _as_operation(self, *batch: Tensor) -> MetaStepResult:
        """The meta-step as torch.compile sees it."""
        inputs = self.inputs()
        gradient = torch.is_grad_enabled() and bool(inputs)
        found = custom_op.meta_step(inputs, *batch, self._number, self.inner_steps, gradient)
        return MetaStepResult(*found[:4])

    def _learned(self, planned: Planned) -> list[nn.Parameter]:
        """What gets the gradients of the model's parameters."""
        if not self.step_params:
            return planned.learned
        named, of_steps = planned.named, self._by_step
        return [of_steps.get(name, named[name]) for name in planned.plan.asked.learned]

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
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        check: bool = True,
    ) -> tuple[MetaStepResult, dict[str, Tensor]]:
        """The meta-step and its gradient at once, without a graph: `loss` cannot be differentiated.

        The gradients of the module's own parameters (`maml.parameters()`: the model's that require
        grad, and learnable rates) are returned by the names of `maml.named_parameters()`, and no
        `.grad` is touched. The same numbers as by `forward` and `loss.backward()`, without
        autograd's time for it, which counts where tasks are few. Raises as `forward` does.

        check: False does not look at the result and at the classes, for which the host waits for a
        GPU; so a step can be captured as a CUDA graph. What is not finite then shows in `loss` or
        in the gradients, and `on_nonfinite` counts for nothing.
        """
        with torch.no_grad():
            batch = self._batch(
                support_x, support_y, query_x, query_y, support_weight, query_weight
            )
            planned, problem = self._prepare(batch, self.inner_steps, detached=False, check=check)
            plan = planned.plan
            if planned.learned or problem.rates.learning:
                outcome, found, rates = self._run_with_gradients(plan, problem, batch, check)
            else:
                outcome, found, rates = self._run(plan, problem, batch, False, check), {}, []
            loss = reduce(outcome.counted_losses, self.reduction)
        gradients = dict(zip(planned.own_names, found.values(), strict=True))
        for name in self._by_step:
            gradients[f"step_params.{name.replace('.', '/')}"] = gradients.pop(f"model.{name}")
        if rates:
            owned = {id(p): name for name, p in self.named_parameters()}
            for rate, gradient in zip(self.rates.learning(), rates, strict=True):
                if label := owned.get(id(rate)):
                    gradients[label] = gradient
        rest = outcome.task_losses, outcome.support_losses, outcome.query_outputs
        return MetaStepResult(loss, *rest, outcome.residuals, outcome.skipped), gradients

    def _run(
        self, plan: Plan, problem: Problem, batch: TaskBatch, gradient: bool, check: bool = True
    ) -> Outcome:
        if check and batch.support_x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a meta-step looks at its result, which a CUDA graph cannot capture; call "
                "value_and_grad(..., check=False), or leave capturing to MAML and its cuda_graphs"
            )
        quick = plan.reads_memory and not torch.is_inference_mode_enabled()
        if quick:
            outcome = meta_step.run(plan, problem, batch, gradient)
            if outcome.finite:
                return outcome
        with using(self.model, plan), plain(batch.support_x.device):
            if not quick:
                outcome = meta_step.run(plan, problem, batch, gradient)
            if not check:
                return outcome
            if plan.reads_memory and problem.loss == "cross_entropy" and not outcome.finite:
                check_classes(batch, plan.output[-1])  # one that there is not makes the loss NaN
            if self.on_nonfinite == "raise":
                check_finite(plan, problem, batch, outcome)
                return outcome
            outcome = without_bad_tasks(plan, problem, batch, outcome)
            if self.on_nonfinite == "warn" and outcome.skipped is not None:
                warn_of(outcome.skipped, batch.tasks)
        return outcome

    def _run_with_gradients(
        self, plan: Plan, problem: Problem, batch: TaskBatch, check: bool = True
    ) -> Found:
        """The gradients of parameters by name, then of `rates.learning()` and of the data where
        they require it, reduced over tasks."""
        outcome = self._run(plan, problem, batch, True, check)
        found, by_rate = outcome.gradients, outcome.rate_gradients
        assert found is not None and by_rate is not None
        rest = self.rates.gather(by_rate) if self.rates.learning() else []
        rest += [by_x.contiguous() for by_x in outcome.input_gradients or ()]
        if self.reduction == "mean":
            whole = [found.flat] if isinstance(found, FlatGradients) else list(found.values())
            if whole or rest:
                torch._foreach_div_(whole + rest, outcome.counted)
        return outcome, found, rest

    @torch.compiler.disable
    @torch.no_grad()
    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        inner_steps: int | None = None,
        support_weight: Tensor | None = None,
    ) -> AdaptedModels:
        """The inner loop alone, without gradients.

        support_x: [T, N, ...]; support_y: [T, N, ...]; inner_steps: None for the module's own;
        support_weight: [T, N], as of `forward`.
        Returns models to call with query_x [T, M, ...]. Raises as `forward` does.
        """
        steps = self.inner_steps if inner_steps is None else inner_steps
        check_count("inner_steps", steps, least=0)
        batch = self._batch(
            support_x, support_y, support_x, support_y, support_weight, support_weight
        )
        x = batch.support_x
        planned, problem = self._prepare(batch, steps)
        plan = planned.plan
        with using(self.model, plan), plain(x.device):
            # Copies: what was adapted stays, whatever becomes of the model and of the data.
            own = {name: p.clone() for name, p in problem.parameters.items()}
            by_step = {name: values.clone() for name, values in problem.by_step.items()}
            problem = dataclasses.replace(problem, parameters=own, by_step=by_step)
            adapted = meta_step.adapt(plan, problem, batch._replace(support_x=x.clone()))
        check_losses(adapted.support_losses)
        return AdaptedModels(x, adapted, self.model, plan)

    @torch.compiler.disable
    @torch.no_grad()
    def trajectory(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> Trajectory:
        """Losses and accuracies of support and query step by step, and the adapted parameters; no
        gradients. The inner loop runs anew for each step. Data and errors are those of `forward`,
        but that losses which are not finite are shown as they are.
        """
        data = support_x, support_y, query_x, query_y, support_weight, query_weight
        batch = self._batch(*data)
        planned, problem = self._prepare(batch, self.inner_steps)
        plan = planned.plan
        with using(self.model, plan), plain(batch.support_x.device):
            return trajectory(plan, problem, batch)

    def plan(self, support_x: Tensor, query_x: Tensor) -> Plan:
        """What would run for data of these shapes, [T, N, ...] and [T, M, ...]; printable."""
        self._check_options()
        x, q = recordable(support_x), recordable(query_x)
        batch = TaskBatch(x, x.detach(), q, q.detach())
        check_batch(batch, next(self.model.parameters(), None))
        wants = wants_inputs(batch)
        with using(self.model), plain(x.device):
            asked = self._asked(self.inner_steps, batch, signature(self.model), wants)
            planned = self._planner.plan_for(self.model, self.loss, asked, batch)
            if not planned.sure:  # without targets: the squared distance from zeros stands in
                zeros = [
                    torch.zeros_like(out).expand(len(x), *out.shape) for out in planned.outputs
                ]
                stand_in = TaskBatch(x, zeros[0], q, zeros[1])
                problem = self._problem(self.inner_steps, planned, stand_in)
                problem = dataclasses.replace(problem, loss="mse")
                sure = planned.try_out(problem, stand_in)
                planned.sure = sure and isinstance(self.loss, str)
        return planned.plan

    def _prepare(
        self, batch: TaskBatch, inner_steps: int, detached: bool = True, check: bool = True
    ) -> tuple[Planned, Problem]:
        """The checked call's plan, and its problem. Not `detached`: where the backend reads no more
        than the parameters' memory, they are handed over as they are. check: the classes too, which
        waits for the device, of a call that was right before."""
        self._check_options()
        wants, enabled = wants_inputs(batch), torch.is_grad_enabled()
        if wants and isinstance(self.meta_gradient, Reptile):
            raise ValueError(
                "support_x or query_x requires grad, and meta_gradient Reptile gives no gradient "
                "by the data; detach them"
            )
        model = signature(self.model)
        if self._knows(model):
            asked = self._asked(inner_steps, batch, model, wants)
            planned = self._planner.recall(self._call(batch, asked, model, enabled))
            if planned is not None:
                detached = detached or not planned.plan.reads_memory
                # Where it is not detached `_run` hears of a wrong class by the loss.
                if check and self.loss == "cross_entropy" and detached:
                    check_classes(batch, planned.outputs[1].shape[-1])
                return planned, self._problem(inner_steps, planned, batch, detached)
        check_batch(batch, next(self.model.parameters(), None))
        with using(self.model), plain(batch.support_x.device):
            model = signature(self.model)
            asked = self._asked(inner_steps, batch, model, wants)
            planned = self._planner.plan_for(self.model, self.loss, asked, batch)
            check_targets("support_y", batch.support_y, planned.outputs[0], self.loss)
            check_targets("query_y", batch.query_y, planned.outputs[1], self.loss)
            if self.loss == "cross_entropy":
                check_classes(batch, planned.outputs[1].shape[-1])
            problem = self._problem(inner_steps, planned, batch)
            if not planned.sure:
                planned.sure = planned.try_out(problem, batch)
            if planned.sure:
                self._planner.remember(self._call(batch, asked, model, enabled), planned)
        return planned, problem

    def _call(
        self, batch: TaskBatch, asked: Asked, model: Any, enabled: bool
    ) -> tuple[Any, ...] | None:
        """All that `check_batch`, `check_targets` and a plan depend on: a call that was right once
        is not looked at again."""
        if not all(type(t) in PLAIN_TENSORS and not t.is_nested for t in batch.tensors):
            return None
        return (
            *((t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in batch.tensors),
            enabled,
            asked,
            model,
        )
