"""The configuration of a training run: what every kind of run has, and how values are checked.

The annotations here and in the kinds' modules are evaluated at once: the command line reads those
of an inherited field where they cannot be looked up by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch

Backend = Literal["auto", "triton", "cpu", "torch", "functional", "reference"]
OnNonfinite = Literal["raise", "skip", "warn"]

FIRST_KIND = "sinusoid"  # of checkpoints that name none: once there was no other


class ConfigError(ValueError):
    """A field of the configuration is unknown or out of its limits; the message names it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every run has. Each kind of run adds its own fields, and its paper's settings.

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
        clip_gradient: Largest absolute value of a component of the meta-gradient, whose loss is
            a mean over rows and tasks; 0 leaves clipping out.
        clip_norm: Largest Euclidean norm of the whole meta-gradient, which is scaled down to it,
            behind clip_gradient; 0 leaves that out.
        on_nonfinite: What becomes of a task whose loss or gradient is NaN or infinite: raise ends
            the run; skip leaves the task out of its meta-step, whose mean is over the others, and
            counts it in the history; warn does that and warns. If all tasks are so, the run ends.
        seed: Seed of the initial weights and of the tasks.
        backend: What computes the meta-step.
        device: Torch device to train on.
        threads: CPU threads; torch's own choice if left out.
        checkpoint_every: Iterations between checkpoints.
        log_every: Iterations that one line of the loss history covers.
        output: Folder of the run's files.
        tensorboard: Write the figures as TensorBoard event files too, in the folder tensorboard of
            the output folder.
        quiet: No progress bar and no announcements; what the command prints at its end stays.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    kind: ClassVar[str]
    # Fields of at least 1, and those that a resumed run may change.
    counts: ClassVar[tuple[str, ...]] = (
        *("tasks", "shots", "query_shots", "inner_steps", "checkpoint_every", "log_every"),
    )
    changeable: ClassVar[tuple[str, ...]] = (
        *("iterations", "threads", "checkpoint_every", "log_every", "output"),
        *("tensorboard", "quiet", "on_nonfinite"),
    )
    flags: ClassVar[tuple[str, ...]] = ("first_order", "learn_inner_lr", "tensorboard", "quiet")
    # The fields that `recipe` looks at
    recipe_for: ClassVar[tuple[str, ...]] = ()

    iterations: int
    tasks: int
    shots: int
    query_shots: int
    inner_lr: float
    inner_steps: int
    first_order: bool = False
    learn_inner_lr: bool = False
    meta_lr: float = 1e-3
    clip_gradient: float = 0.0
    clip_norm: float = 0.0
    on_nonfinite: OnNonfinite = "raise"
    seed: int = 0
    backend: Backend = "auto"
    device: str = "cpu"
    threads: int | None = None
    checkpoint_every: int = 5_000
    log_every: int = 100
    output: Path
    tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations, least=0, most=2**63 - 1)
        for name in self.counts:
            check_whole(name, getattr(self, name), least=1)
        # Above 2^31 lie the seeds of the training tasks: see run.TASK_SEEDS.
        check_whole("seed", self.seed, least=0)
        if self.threads is not None:
            check_whole("threads", self.threads, least=1)
        for name in self.flags:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} is {shown(getattr(self, name))}; wanted is true or false"
                )
        check_rate("inner_lr", self.inner_lr, positive=False)  # 0 is the pretraining baseline
        check_rate("meta_lr", self.meta_lr, positive=True)
        check_rate("clip_gradient", self.clip_gradient, positive=False)
        check_rate("clip_norm", self.clip_norm, positive=False)
        check_one_of("on_nonfinite", self.on_nonfinite, get_args(OnNonfinite))
        check_one_of("backend", self.backend, get_args(Backend))
        if not isinstance(self.output, Path):
            raise ConfigError(f"output is {shown(self.output)}; wanted is a path")
        if not isinstance(self.device, str):
            raise ConfigError(f"device is {shown(self.device)}; wanted is a name, as in 'cpu'")

    @classmethod
    def recipe(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The paper's settings that depend on the fields `recipe_for`, whose values are given."""
        return {}

    @property
    def inner_params(self) -> tuple[str, ...] | None:
        """Patterns of the parameters that adapt; None: all."""
        return None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Self:
        """The configuration that a TOML or JSON document spells out; left-out fields have defaults.

        Types are strict ("7" and 7.5 are no whole numbers). Errors begin with `source`.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"{source}: unknown key {shown(unknown[0])}; the keys are {known}")
        hints = get_type_hints(cls)
        try:
            return cls(**{name: _typed(hints[name], value) for name, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_run(cls, values: Mapping[str, Any], source: str) -> Self:
        """The configuration in a checkpoint, which must be of a run of this kind."""
        kind, rest = kind_of(values)
        if kind != cls.kind:
            raise ConfigError(f"{source}: a run of kind {kind!r}; wanted is {cls.kind!r}")
        return cls.from_dict(rest, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, and the kind of run; `from_run` reads them back."""
        return {"kind": self.kind} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def check_continues(self, earlier: "TrainConfig") -> None:
        """Raise a ConfigError naming the first field that no resumed run may change."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(earlier, field.name)
            if field.name not in self.changeable and ours != theirs:
                raise ConfigError(
                    f"{field.name} is {ours!r}, but the run to resume has {theirs!r}; resume with "
                    f"that, or begin a new run in another output folder"
                )


def kind_of(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of run that a checkpoint's configuration is of, and the fields."""
    rest = dict(values)
    return str(rest.pop("kind", FIRST_KIND)), rest


def check_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it; else a ConfigError."""
    try:
        found = torch.device(device)
        torch.Generator(found)  # what is drawn on the device needs one of its own
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device is {device!r}, which cannot be used here: {reason}") from None
    return found


def check_whole(name: str, value: object, least: int, most: int = 2**31 - 1) -> int:
    """The value, if it is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {shown(value)}; wanted is a whole number of at least {least}")
    if value > most:
        raise ConfigError(f"{name} is {shown(value)}; wanted is a whole number of at most {most}")
    return value


def check_rate(name: str, value: object, positive: bool) -> None:
    """A finite number, above 0 or of at least 0."""
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number too large
            number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        wanted = "above 0" if positive else "of at least 0"
        raise ConfigError(f"{name} is {shown(value)}; wanted is a finite number {wanted}")


def check_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} is {shown(value)}; wanted is one of {list(choices)}")


def shown(value: object) -> str:
    """A value as messages have it: cut off where it is long, as a foreign file's may be."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of so many digits, or nested so deeply
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _typed(hint: Any, value: Any) -> Any:
    """JSON and TOML have lists and strings for tuples and paths."""
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_typed(get_args(hint)[0], item) for item in value)
    return Path(value) if hint is Path and isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
