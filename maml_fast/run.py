"""The state of a training run, whatever its tasks: stepped, saved and restored exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from maml_fast import MAML
from maml_fast.captured import CapturedStep
from maml_fast.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from maml_fast.config import ConfigError, TrainConfig
from maml_fast.errors import NonFiniteError
from maml_fast.ranks import ALONE, EXTRA, Ranks
from maml_fast.tasks import Episodes

# Added to a run's seed for its tasks: a stream other than the initial weights' and than those of
# evaluations, whose seeds are below. (A CPU generator keeps the lowest 32 bits of its seed.)
TASK_SEEDS = 2**31

C = TypeVar("C", bound=TrainConfig)


class DivergedError(FloatingPointError):
    """The parameters are no longer finite; the last checkpoint is from before that."""


class Tasks(Protocol):
    """A seeded stream of tasks that a checkpoint can hold."""

    generator: torch.Generator  # what it draws from

    def sample(self, tasks: int, shots: int, query_shots: int, own: slice) -> Episodes:
        """New tasks; of them those of the slice alone, while the stream moves on by all."""

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; ValueError where the state is of another kind."""


class Run:
    """The state of a run: model, rate, optimiser, tasks, iteration, and the losses to be logged.

    A kind of run makes the model and the tasks, and may validate. Of several ranks each has the
    whole state and does each step; they share the tasks, and the first alone writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        loss: str,
        tasks: Tasks,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.model = model
        self.tasks = tasks
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.rates: dict[str, nn.Parameter] = {}
        if config.learn_inner_lr:
            rate = torch.tensor(config.inner_lr, device=trained[0].device)
            self.rates["inner_lr"] = nn.Parameter(rate)
        extra = EXTRA if ranks.count > 1 else 0
        self.parameters = FlatParameters([*trained, *self.rates.values()], extra)
        self.maml = MAML(
            self.model,
            loss=loss,
            inner_lr=self.rates.get("inner_lr", config.inner_lr),
            inner_steps=config.inner_steps,
            first_order=config.first_order,
            backend=config.backend,
            inner_params=config.inner_params,
            on_nonfinite=config.on_nonfinite,
        )
        on_gpu = trained[0].is_cuda
        self.optimizer = torch.optim.Adam(
            [self.parameters.flat], lr=config.meta_lr, fused=True, capturable=on_gpu
        )
        names = {id(parameter): name for name, parameter in self.maml.named_parameters()}
        self._names = [names[id(p)] for p in (*trained, *self.rates.values())]
        self.iteration = 0
        # The losses since the last line of the history, summed on the device: reading each would
        # make every iteration wait for a GPU.
        self._loss_sum = torch.zeros((), device=trained[0].device)
        self._losses = 0
        self._last_mean: float | None = None
        # Tasks left out, since the last line of the history and in the whole run
        self._skipped, self.skipped = 0, 0
        # A rate that is learned is read by the host, other ranks are waited for, and so is whether
        # a task is to be left out.
        raises = config.on_nonfinite == "raise"
        capturable = on_gpu and ranks.count == 1 and not self.rates and raises
        self._step = CapturedStep(self._work, [tasks.generator], capturable)

    def step(self) -> None:
        """One meta-step on new tasks, of which each rank takes its share."""
        self._step()
        self._losses += 1
        self.iteration += 1

    def _work(self, check: bool) -> None:
        """What a step does on the device; `check` looks for what is not finite, and waits."""
        loss, counted = self.descend(self.sample(), check)
        self.update()
        self.count(loss, counted)

    def sample(self) -> Episodes:
        """This rank's share of new tasks."""
        config = self.config
        own = self.ranks.share(config.tasks)
        return self.tasks.sample(config.tasks, config.shots, config.query_shots, own)

    def descend(self, episodes: Episodes, check: bool = True) -> tuple[Tensor, int]:
        """Fill the gradients; returns the mean loss of all ranks' tasks, and how many counted."""
        if not check:  # a graph knows addresses, and keeps nothing alive
            self._plan = self.maml.plan(episodes.support_x, episodes.query_x)
        count, loss = len(episodes.support_x), None
        if count:  # there may be fewer tasks than ranks
            try:
                result, found = self.maml.value_and_grad(*episodes, check=check)
            except NonFiniteError as error:
                if self.config.on_nonfinite == "raise" or self.ranks.count == 1:
                    raise self.ranks.explained(error, self.config.tasks) from None
                count = 0  # other ranks may have better tasks
            else:
                loss = result.loss
                self.parameters.take_gradients([found[name] for name in self._names])
                if result.skipped is not None:
                    count -= len(result.skipped)
        if not count:
            self.parameters.zero_grad()
        return self.ranks.combine(self.parameters.gradient, loss, count)

    def update(self) -> None:
        """The optimiser's step, with clipped gradients."""
        if self.config.clip_gradient:
            self.parameters.clip(self.config.clip_gradient)
        if self.config.clip_norm:
            self.parameters.clip_norm(self.config.clip_norm)
        self.optimizer.step()

    def count(self, loss: Tensor, counted: int) -> None:
        """Remember the loss, and how many tasks it is not of, for the history."""
        self._loss_sum += loss
        self._skipped += self.config.tasks - counted
        self.skipped += self.config.tasks - counted

    def validate(self) -> dict[str, float] | None:
        """Figures on held-out tasks for the history; None where they are not due."""
        return None

    def is_best(self) -> bool:
        """Whether the state is the best of all that were validated."""
        return False

    def best(self) -> tuple[int, float] | None:
        """Iteration and accuracy of the best validation; None if there was none."""
        return None

    def describe(self) -> str:
        """What the run trains on, in a line; empty where there is nothing to say."""
        return ""

    def loss(self) -> float | None:
        """Mean loss since the last line of the history; right after one, that line's."""
        return self._loss_sum.item() / self._losses if self._losses else self._last_mean

    def close_window(self) -> dict[str, float]:
        """The mean loss for a line of the history, and the number of tasks left out where some may
        be; the next line's begin after it.

        Raises:
            NonFiniteError: it is not finite, which a captured step does not notice earlier.
        """
        self._last_mean = mean = self._loss_sum.item() / self._losses
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"a loss of the iterations up to {self.iteration} is not finite; the last "
                "checkpoint is from before that",
                [],
            )
        figures: dict[str, float] = {"loss": mean}
        if self.config.on_nonfinite != "raise":
            figures["skipped_tasks"] = self._skipped
        self._loss_sum.zero_()
        self._losses = self._skipped = 0
        return figures

    def learned_rates(self) -> dict[str, float]:
        """The rates that are learned, by name."""
        return {name: rate.item() for name, rate in self.rates.items()}

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write a checkpoint, unless its parameters would not be finite; the one that was at `path`
        is kept as `previous`, if that is given. All ranks call it."""
        if not bool(self.parameters.flat.isfinite().all()):
            raise DivergedError(f"parameters are not finite at iteration {self.iteration}")
        if self.ranks.count > 1:
            content = self.parameters.flat.detach().cpu().numpy().tobytes()
            self.ranks.check_same(f"parameters at iteration {self.iteration}", content)
        if not self.ranks.first:
            return
        checkpoint = Checkpoint(
            self.config.to_dict(), self.iteration, self._groups(), self._identity()
        )
        save_checkpoint(path, checkpoint, previous)

    def restore(self, path: Path) -> None:
        """Continue the run whose checkpoint is at `path`."""
        checkpoint = load_checkpoint(path)
        self.config.check_continues(read_config(type(self.config), checkpoint, path))
        if checkpoint.iteration > self.config.iterations:
            raise ConfigError(
                f"iterations is {self.config.iterations}, but the run to resume is already at "
                f"{checkpoint.iteration}"
            )
        own = self._groups()
        own.pop("skipped", None)
        if "skipped" in checkpoint.groups:  # not in one of a run that raises, nor in old ones
            own["skipped"] = self._skipped_group()
        if checkpoint.iteration > 0:
            own["optimizer"] = _adam_state(self.parameters.flat)
        try:
            self._check_identity(checkpoint.data)
            found = {name: checkpoint.group(name, wanted) for name, wanted in own.items()}
            self.tasks.load_state_dict(found["tasks"])
        except ConfigError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self._load(found)
        self.iteration = checkpoint.iteration

    def _load(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the groups of a checkpoint, which fit."""
        self.model.load_state_dict(found["model"])
        with torch.no_grad():
            for name, rate in self.rates.items():
                rate.copy_(found["rates"][name])
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict(state | {"state": {0: dict(found["optimizer"])}})
        self._loss_sum.copy_(found["window"]["loss_sum"])
        self._losses = int(found["window"]["losses"])
        if "skipped" in found:
            self._skipped = int(found["skipped"]["window"])
            self.skipped = int(found["skipped"]["run"])

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        groups = {
            "model": self.model.state_dict(),
            "rates": {name: rate.detach() for name, rate in self.rates.items()},
            "optimizer": dict(self.optimizer.state[self.parameters.flat]),
            "tasks": self.tasks.state_dict(),
            "window": {"loss_sum": self._loss_sum, "losses": torch.tensor(self._losses)},
        }
        if self.skipped or self.config.on_nonfinite != "raise":
            groups["skipped"] = self._skipped_group()
        return groups

    def _skipped_group(self) -> dict[str, Tensor]:
        return {"window": torch.tensor(self._skipped), "run": torch.tensor(self.skipped)}

    def described(self) -> bytes:
        """What ranks must have in common: configuration, data, and where the run stands."""
        config = self.config.to_dict()
        return json.dumps([config, self._identity(), self.iteration], sort_keys=True).encode()

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint says of the run's data."""
        return {}

    def _check_identity(self, data: Mapping[str, Any]) -> None:
        """Raise a ConfigError where a checkpoint's run had other data."""


class FlatParameters:
    """Makes parameters and their gradients views of one flat tensor each.

    Adam then updates one tensor instead of six: 28 us an iteration on a CPU instead of 89. The
    update is elementwise, so it is the same update.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], extra: int = 0) -> None:
        self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
        # [P + extra]: behind the gradient there is room for what is to be summed along with it.
        self.gradient = self.flat.data.new_zeros(self.flat.numel() + extra)
        self._gradient = self.gradient[: self.flat.numel()]
        self.flat.grad = self._gradient
        sizes = [p.numel() for p in parameters]
        values, gradients = self.flat.data.split(sizes), self._gradient.split(sizes)
        self._gradients: list[Tensor] = []
        for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
            parameter.data = value.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)
            self._gradients.append(parameter.grad)

    def zero_grad(self) -> None:
        """Zero the gradients in place: set to None they would leave the flat tensor."""
        self._gradient.zero_()

    def take_gradients(self, gradients: list[Tensor]) -> None:
        """Copy the parameters' gradients, in their order, into the flat tensor."""
        torch._foreach_copy_(self._gradients, gradients)

    def clip(self, limit: float) -> None:
        """Limit each component of the gradients to [-limit, limit]; NaN stays."""
        self._gradient.clamp_(-limit, limit)

    def clip_norm(self, limit: float) -> None:
        """Scale the gradients to a norm of at most `limit`, all together; NaN stays. The same as
        torch.nn.utils.clip_grad_norm_, its 1e-6 included; no wait for a GPU."""
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((limit / (norm + 1e-6)).clamp_(max=1.0))


def read_config(kind: type[C], checkpoint: Checkpoint, path: Path) -> C:
    """The configuration in a checkpoint of a run of this kind, or a CheckpointError."""
    try:
        return kind.from_run(checkpoint.config, source=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _adam_state(flat: nn.Parameter) -> dict[str, Tensor]:
    """The names, shapes and dtypes of Adam's state, which it makes at its first step only."""
    moment = torch.empty_like(flat.data)
    return {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": moment}
