"""The images of a run: loaded, split into classes to train on and held-out ones, recognised."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maml_fast.config import ConfigError
from maml_fast.config_images import FolderConfig, ImageConfig, OmniglotConfig
from maml_fast.errors import DataError
from maml_fast.tasks import (
    DownloadError,
    ImageSet,
    download_omniglot,
    load_folder,
    load_omniglot,
    split_classes,
)

QUERY_SHOTS = 15  # of validations and evaluations, where each class has so many images left
OMNIGLOT_SIZE = 28
HELD_OUT = 0.25  # the share of classes that a run holds out unless told otherwise


def load_images(config: ImageConfig, data: Sequence[Path] = ()) -> ImageSet:
    """All images of a run's data, or those at `data` instead, as the run would see them.

    Raises:
        ConfigError: the data are not given.
        DataError, OSError: they cannot be used.
    """
    paths = tuple(data) or config.data
    size, channels = image_shape(config)
    if isinstance(config, OmniglotConfig):
        return load_omniglot(paths or _downloaded(config.download), size)
    if len(paths) != 1:
        raise ConfigError(f"data is {[str(path) for path in paths]}; wanted is one folder")
    return load_folder(paths[0], size, channels)


def fetch_images(config: ImageConfig) -> None:
    """Have a run's data on this machine, where they are to be downloaded."""
    if isinstance(config, OmniglotConfig) and not config.data:
        _downloaded(config.download)


def image_shape(config: ImageConfig) -> tuple[int, int]:
    """Pixels a side, and channels, of a run's images."""
    if isinstance(config, FolderConfig):
        return config.image_size, config.channels
    return OMNIGLOT_SIZE, 1


def _downloaded(folder: Path) -> list[Path]:
    try:
        return download_omniglot(folder)
    except DownloadError as error:
        raise DownloadError(f"{error} (--data takes archives or folders that are there)") from None


def split_images(config: ImageConfig, images: ImageSet) -> tuple[ImageSet, ImageSet | None]:
    """The classes to train on, and those held out, or None where the run holds none out.

    Raises:
        ConfigError, DataError: a class has too few images for a task, or there are too few.
    """
    names, count = config.held_out_names(), config.validation_classes
    if names:
        training, held_out = split_classes(images, names)
    elif count == 0:
        training, held_out = images, None
    else:
        few = max(round(HELD_OUT * len(images.names)), config.ways)
        wanted = few if count is None else count
        if wanted >= len(images.names):
            raise ConfigError(
                f"validation_classes is {wanted} of {len(images.names)} classes in the data; "
                f"wanted are at least {config.ways} left to train on, or 0 to hold out none"
            )
        training, held_out = split_classes(images, wanted, config.seed)
    each = 4 if config.rotations else 1
    _check_ways("to train on", len(training.names) * each, config.ways)
    check_shots(training, config.shots, config.query_shots)
    if held_out is not None:
        _check_ways("held out", len(held_out.names), config.ways)
        check_shots(held_out, config.shots, 1)
    return training, held_out


def _check_ways(what: str, classes: int, ways: int) -> None:
    if classes < ways:
        raise ConfigError(f"ways is {ways}, but there are {classes} classes {what}")


def check_shots(images: ImageSet, shots: int, query_shots: int) -> None:
    """Raise a DataError naming a class that has too few images for a task."""
    fewest = int(images.counts.min())
    if fewest < shots + query_shots:
        name = images.names[int(images.counts.argmin())]
        raise DataError(
            f"class {name!r} has {fewest} images; wanted are shots + query_shots = {shots} + "
            f"{query_shots}"
        )


def evaluation_images(
    config: ImageConfig, trained_on: Mapping[str, Any], data: Sequence[Path], which: str
) -> ImageSet:
    """The classes to evaluate on, of a run's own data or of those at `data`.

    Args:
        trained_on: what the run's checkpoint says of its data.
        which: "train", the classes trained on; "held-out", the others; "all".

    Raises:
        ConfigError: there are none.
        DataError, OSError: the data cannot be used.
    """
    images = load_images(config, data)
    training = {name for name, _ in DataIdentity.from_dict(trained_on).training}
    kept = [
        place
        for place, name in enumerate(images.names)
        if which == "all" or (name in training) == (which == "train")
    ]
    if len(kept) < config.ways:
        hint = "; give others with --data" if which == "held-out" else ""
        raise ConfigError(
            f"classes is {which!r}, of which the data has {len(kept)}; wanted are {config.ways}, "
            f"the model's ways{hint}"
        )
    return images.subset(kept)


def chose_checkpoint(trained_on: Mapping[str, Any], images: ImageSet) -> bool:
    """Whether a run validated on some of these classes, so that they chose its best checkpoint."""
    held_out = {name for name, _ in DataIdentity.from_dict(trained_on).held_out}
    return not held_out.isdisjoint(images.names)


def query_shots_for(images: ImageSet, shots: int) -> int:
    """As many query images a class as there are, up to `QUERY_SHOTS`."""
    return max(1, min(QUERY_SHOTS, int(images.counts.min()) - shots))


@dataclasses.dataclass(frozen=True)
class DataIdentity:
    """What a resumed run must find: the classes, each with its number of images, and the pixels."""

    training: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]
    sha256: str | None = None  # of all pixels as the run sees them; older checkpoints have none

    @classmethod
    def of(cls, training: ImageSet, held_out: ImageSet | None) -> DataIdentity:
        """Of the two parts of a split, whose pixels are read: once a run is enough."""
        parts = [training] if held_out is None else [training, held_out]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.images.cpu().contiguous().numpy().data)
        return cls(
            _classes(training), () if held_out is None else _classes(held_out), digest.hexdigest()
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataIdentity:
        """From what `to_dict` made; ValueError where that is something else."""
        try:
            parts = [values[name] for name in ("training", "held_out")]
            training, held_out = (
                tuple((str(name), _count(count)) for name, count in part) for part in parts
            )
            sha256 = values.get("sha256")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError("data: its classes cannot be read") from None
        if not isinstance(sha256, str | None):
            raise ValueError(f"data: its sha256 is {sha256!r}; wanted are hexadecimal digits")
        return cls(training, held_out, sha256)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"training": self.training, "held_out": self.held_out}
        values: dict[str, Any] = {name: list(map(list, part)) for name, part in parts.items()}
        return values if self.sha256 is None else values | {"sha256": self.sha256}

    def check_same(self, earlier: DataIdentity) -> None:
        """Raise a ConfigError naming the first class that is not what it was."""
        ours = dict(self.training + self.held_out)
        theirs = dict(earlier.training + earlier.held_out)
        for name in [*theirs, *ours]:
            if ours.get(name) != theirs.get(name):
                found, wanted = (
                    f"has {n} images" if n else "is missing"
                    for n in (ours.get(name), theirs.get(name))
                )
                raise ConfigError(
                    f"data: class {name!r} {found}, but in the run to resume it {wanted}; {_AGAIN}"
                )
        if (self.training, self.held_out) != (earlier.training, earlier.held_out):
            raise ConfigError(
                "data: the classes are in another order than in the run to resume, or split "
                "otherwise"
            )
        if earlier.sha256 not in (None, self.sha256):
            raise ConfigError(
                f"data: the classes are those of the run to resume, but images in them are others "
                f"(sha256 of the pixels {self._short()}, but there it is {earlier._short()}); "
                f"{_AGAIN}"
            )

    def _short(self) -> str:
        return "unknown" if self.sha256 is None else f"{self.sha256[:12]}..."


_AGAIN = "resume with the data of that run, or begin a new run in another output folder"


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ValueError
    return value


def _classes(images: ImageSet) -> tuple[tuple[str, int], ...]:
    return tuple(zip(images.names, images.counts.tolist(), strict=True))
