"""The configurations of runs that learn to classify images from few examples.

The rate's convention. Here the loss is the mean over a task's rows. The code of Finn et al. 2017
divides each row's cross entropy by the shots and adds up, which is `ways` times the mean: its
inner rate 0.4 with 5 ways is 2.0 here, 0.1 with 20 ways is 2.0, 0.01 with 5 ways is 0.05.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from maml_fast.config import ConfigError, TrainConfig, check_one_of, check_whole, shown

ImageModel = Literal["conv4", "conv4-pool", "fc"]

# The original code clips to 10 the gradient of a query loss that it divides by the shots and adds
# up over rows: `_clip` is that limit for the gradient of the mean.
CLIPPED_AT = 10.0


def _clip(ways: int, shots: int, query_shots: int) -> float:
    return CLIPPED_AT * shots / (ways * query_shots)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TrainConfig):
    """What the runs on images have in common.

    Attributes:
        shots: Support images per class.
        query_shots: Query images per class.
        inner_lr: Inner learning rate, of a loss that is the mean over a task's rows; the original
            code's rates are of a loss `ways` times that. Where it is learned, its first value.
        inner_steps: Inner gradient steps in training.
        seed: Seed of the initial weights, the tasks, and the choice of held-out classes.
        ways: Classes per task.
        model: conv4 (four 3x3 convolutions of stride 2, mean over positions), conv4-pool (stride 1
            and 2x2 max pools) or fc (256-128-64-64), each layer with batch norm.
        filters: Channels of the convolutions; fc has none.
        evaluation_steps: The most inner gradient steps in evaluation. Validation takes so many, or
            as many as in training, whichever does better.
        rotations: In training, count each class four times, rotated by 0, 90, 180, 270 degrees.
        validation_classes: Number of classes held out, chosen at random; a quarter of all if left
            out. 0 holds none out, and then nothing is validated.
        validate_every: Iterations between validations on the held-out classes; the best checkpoint
            is kept in best.safetensors.
        validation_tasks: Tasks of a validation, the same each time, with up to 15 query images per
            class.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    counts: ClassVar[tuple[str, ...]] = (
        *TrainConfig.counts,
        *("ways", "filters", "evaluation_steps", "validate_every"),
    )
    # What the data are, a resumed run compares itself: see image_data.
    changeable: ClassVar[tuple[str, ...]] = (*TrainConfig.changeable, "data")
    flags: ClassVar[tuple[str, ...]] = (*TrainConfig.flags, "rotations")
    recipe_for: ClassVar[tuple[str, ...]] = ("ways", "shots")

    iterations: int = 60_000
    shots: int = 1
    checkpoint_every: int = 1_000
    ways: int = 5
    model: ImageModel
    filters: int
    evaluation_steps: int
    rotations: bool = False
    validation_classes: int | None = None
    validate_every: int = 500
    validation_tasks: int = 200
    data: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("model", self.model, get_args(ImageModel))
        unset = type(self).__dataclass_fields__["filters"].default
        if self.model == "fc" and self.filters != unset:
            raise ConfigError(
                f"filters is {self.filters}, but the model fc has none; leave filters out, or take "
                f"conv4 or conv4-pool"
            )
        check_whole("validation_tasks", self.validation_tasks, least=2)  # for an interval
        if self.validation_classes is not None:
            check_whole("validation_classes", self.validation_classes, least=0)
            if self.held_out_names():
                raise ConfigError(
                    f"validation_classes is {self.validation_classes}, but the held-out classes "
                    f"are named too ({', '.join(self.held_out_names())}); wanted is one of the two"
                )
        if not isinstance(self.data, tuple) or not all(isinstance(p, Path) for p in self.data):
            raise ConfigError(f"data is {shown(self.data)}; wanted are paths")

    def held_out_names(self) -> tuple[str, ...]:
        """The classes, or groups of them, that are held out by name."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OmniglotConfig(ImageConfig):
    """One run on Omniglot; the defaults are the paper's for 5 ways and 1 shot (Finn et al. 2017,
    section 5.2 and A.1). Its code judges by as many drawings as it adapts with, and rotates.

    Attributes:
        data: Zip archives as published, or folders of alphabets. If left out, the archives are
            downloaded.
        download: Folder for downloaded archives, used again if they are there.
        alphabets_for_validation: Alphabets whose characters are held out.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    kind: ClassVar[str] = "omniglot"
    changeable: ClassVar[tuple[str, ...]] = (*ImageConfig.changeable, "download")

    tasks: int = 32
    query_shots: int = 1
    inner_lr: float = 2.0
    inner_steps: int = 1
    evaluation_steps: int = 3
    rotations: bool = True
    model: ImageModel = "conv4"
    filters: int = 64
    download: Path = Path("data/omniglot")
    alphabets_for_validation: tuple[str, ...] = ()
    output: Path = Path("runs/omniglot")

    def __post_init__(self) -> None:
        check_names("alphabets_for_validation", self.alphabets_for_validation)
        super().__post_init__()
        if not isinstance(self.download, Path):
            raise ConfigError(f"download is {shown(self.download)}; wanted is a path")

    @classmethod
    def recipe(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The paper's settings for so many ways and shots: those for 20 ways from there on."""
        many = chosen["ways"] >= 20
        return {
            "tasks": 16 if many else 32,
            "query_shots": chosen["shots"],
            "inner_steps": 5 if many else 1,
            "evaluation_steps": 5 if many else 3,
        }

    def held_out_names(self) -> tuple[str, ...]:
        """The alphabets for validation."""
        return self.alphabets_for_validation


@dataclass(frozen=True, kw_only=True)
class FolderConfig(ImageConfig):
    """One run on a folder of class sub-folders of images; the defaults are those of the paper for
    miniImageNet with 5 ways and 1 shot (Finn et al. 2017, section 5.2 and A.1).

    Attributes:
        data: Folder, or zip archive of one, whose sub-folders, nested or not, are the classes.
        image_size: Images are cropped to squares and resized to this many pixels a side.
        channels: 3 for colour, 1 for grey.
        folders_for_validation: Classes that are held out; a folder stands for all below it.

    Raises:
        ConfigError: naming the field, what was found and what is wanted.
    """

    kind: ClassVar[str] = "images"
    counts: ClassVar[tuple[str, ...]] = (*ImageConfig.counts, "image_size")
    recipe_for: ClassVar[tuple[str, ...]] = (*ImageConfig.recipe_for, "query_shots")

    tasks: int = 4
    query_shots: int = 15
    inner_lr: float = 0.05
    inner_steps: int = 5
    clip_gradient: float = _clip(ways=5, shots=1, query_shots=15)
    evaluation_steps: int = 10
    image_size: int = 84
    channels: int = 3
    model: ImageModel = "conv4-pool"
    filters: int = 32
    folders_for_validation: tuple[str, ...] = ()
    output: Path = Path("runs/images")

    def __post_init__(self) -> None:
        check_names("folders_for_validation", self.folders_for_validation)
        super().__post_init__()
        if check_whole("channels", self.channels, least=1) not in (1, 3):
            raise ConfigError(f"channels is {shown(self.channels)}; wanted is 1 or 3")

    @classmethod
    def recipe(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The paper's settings for so many ways, shots and query shots: those for 5 shots from
        there on."""
        return {
            "tasks": 2 if chosen["shots"] >= 5 else 4,
            "inner_lr": 0.01 * chosen["ways"],
            "clip_gradient": _clip(chosen["ways"], chosen["shots"], chosen["query_shots"]),
        }

    def held_out_names(self) -> tuple[str, ...]:
        """The folders for validation."""
        return self.folders_for_validation


def check_names(name: str, value: object) -> None:
    """A tuple of names."""
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{name} is {shown(value)}; wanted are names")
