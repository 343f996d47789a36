"""The configuration of a training run: its fields, their defaults and their limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Activation = Literal["relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "softplus"]
Backend = Literal["auto", "triton", "cpu", "torch", "functional", "reference"]


class ConfigError(ValueError):
    """A field of the configuration is unknown or out of its limits; the message names it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One sinusoid run; the defaults are the paper's (Finn et al. 2017, section 5.1 and A.2).

    Attributes:
        iterations: Meta-steps of the whole run.
        tasks: Tasks per meta-step.
        shots: Support points per task.
        query_shots: Query points per task.
        inner_lr: Inner learning rate; where it is learned, its first value.
        inner_steps: Inner gradient steps.
        first_order: Leave the second-order terms out.
        learn_inner_lr: Learn the inner rate along with the model.
        meta_lr: Learning rate of Adam.
        hidden: Sizes of the hidden layers.
        activation: Activation of the hidden layers.
        seed: Seed of the initial weights and of the tasks.
        backend: What computes the meta-step.
        device: Torch device to train on.
        threads: CPU threads; torch's own choice if left out.
        checkpoint_every: Iterations between checkpoints.
        log_every: Iterations that one line of the loss history covers.
        output: Folder of the run's files.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    iterations: int = 70_000
    tasks: int = 25
    shots: int = 10
    query_shots: int = 10
    inner_lr: float = 0.01
    inner_steps: int = 1
    first_order: bool = False
    learn_inner_lr: bool = False
    meta_lr: float = 1e-3
    hidden: tuple[int, ...] = (40, 40)
    activation: Activation = "relu"
    seed: int = 0
    backend: Backend = "auto"
    device: str = "cpu"
    threads: int | None = None
    checkpoint_every: int = 5_000
    log_every: int = 100
    output: Path = Path("runs/sinusoid")

    def __post_init__(self) -> None:
        _whole("iterations", self.iterations, least=0)
        for name in COUNTS:
            _whole(name, getattr(self, name), least=1)
        # Above 2^31 lie the seeds of the training tasks: see train.TASK_SEEDS.
        if _whole("seed", self.seed, least=0) >= 2**31:
            raise ConfigError(f"seed is {self.seed}; wanted is a whole number below 2^31")
        if self.threads is not None:
            _whole("threads", self.threads, least=1)
        for name in ("first_order", "learn_inner_lr"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; wanted is true or false")
        _rate("inner_lr", self.inner_lr, positive=False)  # 0 is the paper's pretraining baseline
        _rate("meta_lr", self.meta_lr, positive=True)
        if not isinstance(self.hidden, tuple) or not self.hidden:
            raise ConfigError(f"hidden is {self.hidden!r}; wanted are sizes, as in (40, 40)")
        for size in self.hidden:
            _whole("hidden", size, least=1)
        _one_of("activation", self.activation, get_args(Activation))
        _one_of("backend", self.backend, get_args(Backend))
        if not isinstance(self.output, Path):
            raise ConfigError(f"output is {self.output!r}; wanted is a path")
        if not isinstance(self.device, str):
            raise ConfigError(f"device is {self.device!r}; wanted is a name, as in 'cpu'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> TrainConfig:
        """The configuration that a TOML or JSON document spells out; left-out fields have defaults.

        Types are strict ("7" and 7.5 are no whole numbers). Errors begin with `source`.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"{source}: unknown key {unknown[0]!r}; the keys are {known}")
        typed = dict(values)
        if isinstance(typed.get("hidden"), list):
            typed["hidden"] = tuple(typed["hidden"])
        if isinstance(typed.get("output"), str):
            typed["output"] = Path(typed["output"])
        try:
            return cls(**typed)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return values | {"hidden": list(self.hidden), "output": str(self.output)}

    def check_continues(self, earlier: TrainConfig) -> None:
        """Raise a ConfigError naming the first field that no resumed run may change."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(earlier, field.name)
            if field.name not in CHANGEABLE and ours != theirs:
                raise ConfigError(
                    f"{field.name} is {ours!r}, but the run to resume has {theirs!r}; resume with "
                    f"that, or begin a new run in another output folder"
                )


COUNTS = ("tasks", "shots", "query_shots", "inner_steps", "checkpoint_every", "log_every")
CHANGEABLE = ("iterations", "threads", "checkpoint_every", "log_every", "output")


def check_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it; else a ConfigError."""
    try:
        found = torch.device(device)
        torch.Generator(found)  # what is drawn on the device needs one of its own
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device is {device!r}, which cannot be used here: {reason}") from None
    return found


def _whole(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; wanted is a whole number of at least {least}")
    return value


def _rate(name: str, value: object, positive: bool) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        wanted = "above 0" if positive else "of at least 0"
        raise ConfigError(f"{name} is {value!r}; wanted is a finite number {wanted}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; wanted is one of {list(choices)}")
