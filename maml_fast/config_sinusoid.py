"""The configuration of a sinusoid run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from maml_fast.config import ConfigError, TrainConfig, check_one_of, check_whole

Activation = Literal["relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "softplus"]


@dataclass(frozen=True, kw_only=True)
class SinusoidConfig(TrainConfig):
    """One sinusoid run; the defaults are the paper's (Finn et al. 2017, section 5.1 and A.2).

    Attributes:
        hidden: Sizes of the hidden layers.
        activation: Activation of the hidden layers.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    kind: ClassVar[str] = "sinusoid"

    iterations: int = 70_000
    tasks: int = 25
    shots: int = 10
    query_shots: int = 10
    inner_lr: float = 0.01
    inner_steps: int = 1
    hidden: tuple[int, ...] = (40, 40)
    activation: Activation = "relu"
    output: Path = Path("runs/sinusoid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.hidden, tuple) or not self.hidden:
            raise ConfigError(f"hidden is {self.hidden!r}; wanted are sizes, as in (40, 40)")
        for size in self.hidden:
            check_whole("hidden", size, least=1)
        check_one_of("activation", self.activation, get_args(Activation))
