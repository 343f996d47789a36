"""What `MAML` gives: the result of a meta-step, and adapted models.

T tasks, N support rows, M query rows, S inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from maml_fast.inputs import check_query
from maml_fast.plan import Plan
from maml_fast.problem import AdaptedTasks
from maml_fast.refusals import check_statistics
from maml_fast.surroundings import plain, recordable, using


@dataclass
class MetaStepResult:
    """What a meta-step yields.

    loss: scalar; `loss.backward()` fills the gradients of the model's parameters and of rates.
    task_losses: [T], detached: the query loss of each task.
    support_losses: [T, S], detached: the support loss before each inner step.
    query_outputs: [T, M, ...], detached: predictions of the adapted models.
    residuals: [T] of the implicit meta-gradient: |b - A x| / |b| of each task's equations; else
        None.
    skipped: int64 [K], in order, the tasks that `on_nonfinite` left out of loss and gradient, whose
        losses and outputs are shown as they are; None where all count.
    """

    loss: Tensor
    task_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor
    residuals: Tensor | None = None
    skipped: Tensor | None = None


@dataclass
class Trajectory:
    """How the models of all tasks fare as they adapt: before each inner step and behind the last.

    support_losses, query_losses: [T, S + 1].
    support_accuracies, query_accuracies: [T, S + 1], the share of rows whose class is right, rows
        counting by their weights; None where the loss is not of classes.
    adapted: {name: [T, *shape]}, the parameters behind the last step.
    """

    support_losses: Tensor
    query_losses: Tensor
    support_accuracies: Tensor | None
    query_accuracies: Tensor | None
    adapted: dict[str, Tensor]


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
