"""Splits of a data set's classes: held-out classes for validation, the others for training."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

from maml_fast.errors import DataError
from maml_fast.tasks.episodes import whole
from maml_fast.tasks.images import ImageSet


def group_of(name: str) -> str:
    """The group of a class, its name up to the last slash: "Greek" of "Greek/character01"."""
    return name.rpartition("/")[0]


def split_classes(
    data: ImageSet,
    validation: float | int | Sequence[str],
    seed: int = 0,
    by: Literal["random", "group"] = "random",
) -> tuple[ImageSet, ImageSet]:
    """Two sets without a class in common: (train, validation), classes in the order of `data`.

    Split the first again for a third set.

    Args:
        validation: which classes are held out: a share of them between 0 and 1 (at least one is
            held out and one is left), a number of them, or names. A name is that of a class, or
            of a group, an alphabet for instance: all classes below it.
        seed: of the choice, where `validation` is a share or a number. The choice depends on
            the seed and the names alone, not on the order of the classes.
        by: what a share or a number counts: classes, or whole groups ("Greek" of
            "Greek/character01"). Names are taken as they are.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is wanted.
        DataError: a name that is not in the data, or too few classes or groups to split.
    """
    if by not in ("random", "group"):
        raise ValueError(f"by is {by!r}; wanted is 'random' or 'group'")
    whole("seed", seed, least=0)
    if isinstance(validation, (int, float)):
        held_out = _choose(data, validation, seed, by)
    else:
        held_out = classes_named(data, validation)
    rest = [c for c in range(len(data.names)) if c not in held_out]
    if not rest:
        raise DataError(f"validation takes all {len(data.names)} classes; none is left to train on")
    return data.subset(rest), data.subset(sorted(held_out))


def classes_named(data: ImageSet, names: Sequence[str]) -> set[int]:
    """The classes that have one of the names, or lie in a group that has.

    Raises:
        DataError: a name that is neither a class nor a group.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise TypeError(f"names of classes or groups are {names!r}; wanted is a list of them")
    found = set()
    for name in names:
        here = {c for c, own in enumerate(data.names) if f"{own}/".startswith(f"{name}/")}
        if not here:
            groups = sorted({group_of(own) for own in data.names} - {""})
            known = ", ".join((groups or list(data.names))[:50])
            raise DataError(f"no class or group is named {name!r}; there are {known}")
        found |= here
    return found


def _choose(data: ImageSet, validation: float, seed: int, by: str) -> set[int]:
    """A share or a number of the classes or groups, the first in the order of a seeded hash."""
    keys = [group_of(name) if by == "group" else name for name in data.names]
    units = sorted(set(keys), key=lambda key: sha256(f"{seed}/{key}".encode()).digest())
    what = "groups" if by == "group" else "classes"
    if len(units) < 2:
        raise DataError(f"the data has {len(units)} of {what}; to split it, wanted are 2 at least")
    if isinstance(validation, int):
        count = whole("validation", validation, least=1)
        if count >= len(units):
            raise DataError(
                f"validation is {count} of {len(units)} {what}; wanted is at most {len(units) - 1}"
            )
    elif 0 < validation < 1:
        count = min(max(round(validation * len(units)), 1), len(units) - 1)
    else:
        raise ValueError(f"validation is {validation}; wanted is a share between 0 and 1")
    chosen = set(units[:count])
    return {c for c, key in enumerate(keys) if key in chosen}
