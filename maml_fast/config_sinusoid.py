"""The configuration of a sinusoid run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from maml_fast.config import ConfigError, TrainConfig, check_one_of, check_whole, shown
from maml_fast.models import CONTEXT

Activation = Literal["relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "softplus"]
Method = Literal["maml", "cavia"]

PAPER_CONTEXT = 5

# What the planner has no layer for, these run.
CAVIA_BACKENDS = ("auto", "functional", "reference")


@dataclass(frozen=True, kw_only=True)
class SinusoidConfig(TrainConfig):
    """One sinusoid run; the defaults are the paper's (Finn et al. 2017, section 5.1 and A.2).

    Those of method cavia are of `recipe`, which the command line fills in.

    Attributes:
        method: maml adapts all parameters; cavia (Zintgraf et al. 2019) a context alone, which
            starts at 0 and goes into the first layer along with the input. The defaults of cavia:
            50000 iterations, inner rate 1.0, meta-gradients clipped at 10.
        context_size: Numbers of cavia's context, 5 if left out; maml has none.
        hidden: Sizes of the hidden layers.
        activation: Activation of the hidden layers.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    kind: ClassVar[str] = "sinusoid"
    recipe_for: ClassVar[tuple[str, ...]] = ("method",)

    iterations: int = 70_000
    tasks: int = 25
    shots: int = 10
    query_shots: int = 10
    inner_lr: float = 0.01
    inner_steps: int = 1
    method: Method = "maml"
    context_size: int | None = None
    hidden: tuple[int, ...] = (40, 40)
    activation: Activation = "relu"
    output: Path = Path("runs/sinusoid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.hidden, tuple) or not self.hidden:
            raise ConfigError(f"hidden is {shown(self.hidden)}; wanted are sizes, as in (40, 40)")
        for size in self.hidden:
            check_whole("hidden", size, least=1)
        check_one_of("activation", self.activation, get_args(Activation))
        check_one_of("method", self.method, get_args(Method))
        if self.method == "cavia":
            if self.context_size is None:
                object.__setattr__(self, "context_size", PAPER_CONTEXT)
            check_whole("context_size", self.context_size, least=1)
            if self.backend not in CAVIA_BACKENDS:
                raise ConfigError(
                    f"backend is {self.backend!r}, which has no layer for the context of method "
                    f"cavia; wanted is one of {list(CAVIA_BACKENDS)}"
                )
        elif self.context_size is not None:
            raise ConfigError(
                f"context_size is {self.context_size!r}, but method {self.method} has no context; "
                f"leave context_size out, or take method cavia"
            )

    @classmethod
    def recipe(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the method's paper, as its code has them (github.com/lmzintgraf/cavia,
        regression/arguments.py). That code clips each task's gradient; here it is their mean."""
        if chosen["method"] != "cavia":
            return {}
        return {
            "method": "cavia",
            "iterations": 50_000,
            "inner_lr": 1.0,
            "clip_gradient": 10.0,
        }

    @property
    def inner_params(self) -> tuple[str, ...] | None:
        return CONTEXT if self.method == "cavia" else None
