"""A run that learns to classify images from few examples, validated on held-out classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_fast.config_images import ImageConfig
from maml_fast.evaluate_images import accuracies
from maml_fast.image_data import (
    DataIdentity,
    fetch_images,
    image_shape,
    load_images,
    query_shots_for,
    split_images,
)
from maml_fast.models import omniglot_conv4, omniglot_mlp
from maml_fast.ranks import ALONE, Ranks
from maml_fast.run import TASK_SEEDS, Run
from maml_fast.tasks import ImageTasks

VALIDATION_SEED = 1  # of the tasks of every validation of every run


class ImageRun(Run):
    """The state of a run on images, with the best validation so far."""

    config: ImageConfig

    def __init__(self, config: ImageConfig, ranks: Ranks = ALONE) -> None:
        device = ranks.device(config.device)
        if ranks.local == 0:
            fetch_images(config)
        ranks.wait()  # the others of a machine find them there
        training, held_out = split_images(config, load_images(config))
        self._data = DataIdentity.of(training, held_out)
        self.held_out = None if held_out is None else held_out.to(device)
        tasks = ImageTasks(
            training,
            config.ways,
            rotations=config.rotations,
            seed=config.seed + TASK_SEEDS,
            device=device,
        )
        super().__init__(config, image_model(config, device), "cross_entropy", tasks, ranks)
        self.training = tasks.data  # on the device, where one copy is enough
        self._device = device
        self._best_accuracy, self._best_iteration = 0.0, -1

    def validate(self) -> dict[str, float] | None:
        """Accuracy on tasks of held-out classes, the same tasks each time; None if not due.

        Of the training's and the evaluation's numbers of steps, the one that does better counts:
        what one step is trained for, more steps may undo while the training is young.
        """
        config, held_out = self.config, self.held_out
        if held_out is None or self.iteration % config.validate_every:
            return None
        found = self.ranks.of_first(
            lambda: accuracies(
                self.maml,
                ImageTasks(held_out, config.ways, seed=VALIDATION_SEED, device=self._device),
                shots=config.shots,
                query_shots=query_shots_for(held_out, config.shots),
                steps=sorted({config.inner_steps, config.evaluation_steps}),
                tasks=config.validation_tasks,
            )
        )
        best = max(found, key=lambda row: row.accuracy)
        if self._best_iteration < 0 or best.accuracy > self._best_accuracy:
            self._best_accuracy, self._best_iteration = best.accuracy, self.iteration
        return {
            "validation_accuracy": best.accuracy,
            "validation_ci95": best.ci95,
            "validation_steps": best.steps,
        }

    def is_best(self) -> bool:
        """Whether the state is the best of all that were validated."""
        return self._best_iteration == self.iteration

    def best(self) -> tuple[int, float] | None:
        """Iteration and accuracy of the best validation; None if there was none."""
        found = self._best_iteration, self._best_accuracy
        return None if self._best_iteration < 0 else found

    def describe(self) -> str:
        """The classes to train on, those held out, and the drawings."""
        count, turned = len(self.training.names), " x 4 rotations" if self.config.rotations else ""
        images = len(self.training.images)
        line = f"training on {count:,} classes{turned}, {images:,} images"
        if self.held_out is None:
            return f"{line}; none is held out for validation"
        groups = self.config.held_out_names()
        named = f" ({', '.join(groups)})" if groups else ""
        return f"{line}; {len(self.held_out.names):,} held out for validation{named}"

    def _load(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        super()._load(found)
        self._best_accuracy = found["validation"]["best_accuracy"].item()
        self._best_iteration = int(found["validation"]["best_iteration"])

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        best = {
            "best_accuracy": torch.tensor(self._best_accuracy, dtype=torch.float64),
            "best_iteration": torch.tensor(self._best_iteration),
        }
        return {**super()._groups(), "validation": best}

    def _identity(self) -> dict[str, Any]:
        return self._data.to_dict()

    def _check_identity(self, data: Mapping[str, Any]) -> None:
        self._data.check_same(DataIdentity.from_dict(data))


def image_model(config: ImageConfig, device: torch.device) -> nn.Module:
    """The model at the beginning of a run, a plain torch module from [rows, C, H, W]."""
    size, channels = image_shape(config)
    shape: dict[str, Any] = {"image_size": size, "channels": channels}
    start: dict[str, Any] = {"seed": config.seed, "device": device}
    if config.model == "fc":
        return omniglot_mlp(config.ways, **shape, **start)
    pooling = config.model == "conv4-pool"
    return omniglot_conv4(config.ways, config.filters, pooling=pooling, **shape, **start)
