"""A run on sinusoid regression."""

from __future__ import annotations

import torch
from torch import nn

from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.models import cavia_sinusoid, sinusoid_mlp
from maml_fast.ranks import ALONE, Ranks
from maml_fast.run import TASK_SEEDS, Run
from maml_fast.tasks import SinusoidTasks


class SinusoidRun(Run):
    """The state of a run on sinusoids."""

    def __init__(self, config: SinusoidConfig, ranks: Ranks = ALONE) -> None:
        device = ranks.device(config.device)
        tasks = SinusoidTasks(config.seed + TASK_SEEDS, device)
        super().__init__(config, sinusoid_model(config, device), "mse", tasks, ranks)


def sinusoid_model(config: SinusoidConfig, device: torch.device) -> nn.Module:
    """The model at the beginning of a run."""
    if config.context_size is not None:
        return cavia_sinusoid(
            config.context_size, config.hidden, config.activation, seed=config.seed, device=device
        )
    return sinusoid_mlp(config.hidden, config.activation, seed=config.seed, device=device)
