"""The kinds of runs, and the trained models that their checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from maml_fast.checkpoint import CheckpointError, load_checkpoint
from maml_fast.config import TrainConfig, check_device, kind_of
from maml_fast.config_images import FolderConfig, ImageConfig, OmniglotConfig
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.image_data import DataIdentity
from maml_fast.ranks import ALONE, Ranks
from maml_fast.run import Run, read_config
from maml_fast.run_images import ImageRun, image_model
from maml_fast.run_sinusoid import SinusoidRun, sinusoid_model


class Kind(NamedTuple):
    """What a kind of run is made of."""

    config: type[TrainConfig]
    run: Callable[[Any, Ranks], Run]
    model: Callable[[Any, torch.device], nn.Module]


KINDS = {
    kind.config.kind: kind
    for kind in (
        Kind(SinusoidConfig, SinusoidRun, sinusoid_model),
        Kind(OmniglotConfig, ImageRun, image_model),
        Kind(FolderConfig, ImageRun, image_model),
    )
}


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint holds for those who only use the model."""

    model: nn.Module
    inner_lr: float  # the learned one where the run learned it
    iteration: int
    config: TrainConfig
    data: dict[str, Any]  # see image_data.DataIdentity; empty for a sinusoid


def make_run(config: TrainConfig, ranks: Ranks = ALONE) -> Run:
    """The beginning of the run that a configuration describes, for a rank to take part in."""
    return KINDS[config.kind].run(config, ranks)


def load_trained(path: Path, device: str = "cpu") -> TrainedModel:
    """The model of a checkpoint, on `device`; CheckpointError where that cannot be used."""
    checkpoint = load_checkpoint(path)
    name, _ = kind_of(checkpoint.config)
    if name not in KINDS:
        raise CheckpointError(f"{path}: a run of kind {name!r}; wanted is one of {list(KINDS)}")
    config = read_config(KINDS[name].config, checkpoint, path)
    rates = {"inner_lr": torch.tensor(float(config.inner_lr))}
    try:
        if isinstance(config, ImageConfig):
            DataIdentity.from_dict(checkpoint.data)
        # Without memory at first: the model that the file tells of may be of any size.
        hollow = KINDS[name].model(config, torch.device("meta"))
        parameters = checkpoint.group("model", hollow.state_dict())
        if config.learn_inner_lr:
            rates = checkpoint.group("rates", rates)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: {reason}") from None
    model = KINDS[name].model(config, torch.device("cpu"))
    model.load_state_dict(parameters)
    inner_lr = rates["inner_lr"].item() if config.learn_inner_lr else config.inner_lr
    model = model.to(check_device(device))
    return TrainedModel(model, inner_lr, checkpoint.iteration, config, checkpoint.data)
