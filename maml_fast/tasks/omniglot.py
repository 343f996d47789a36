"""Omniglot (Lake et al. 2015): handwritten characters of 50 alphabets, 20 drawings of each.

The layout of the published archives, zipped or not, is <top>/<alphabet>/character<NN>/<file>.png;
the top folder may be left out. A class is named "<alphabet>/character<NN>".
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from maml_fast.errors import DataError
from maml_fast.tasks.episodes import whole
from maml_fast.tasks.images import ImageSet
from maml_fast.tasks.pixels import Decoder, read_classes
from maml_fast.tasks.trees import File, Tree, open_tree

LAYOUT = "<alphabet>/character<NN>/<drawing>.png"
MAX_PIXELS = 4096 * 4096  # of a drawing; the published ones are 105 x 105
_CHARACTER = re.compile(r"character\d+")


def load_omniglot(sources: Sequence[Path | str] | Path | str, image_size: int = 28) -> ImageSet:
    """The drawings of one or more archives or folders, as one set, classes sorted by name.

    Drawings are black on white, so the set is marked `invert`: ink becomes 1. They are resampled
    to `image_size` by the mean over each new pixel's area: a pixel is the share of ink in it.
    (Finn et al. 2017 ask Pillow for LANCZOS, which it replaces by NEAREST on 1-bit images.)

    Args:
        sources: zip files or folders.
        image_size: pixels, height and width.

    Raises:
        ValueError: `sources` is empty or `image_size` no size.
        DataError: names the file or class: an archive or drawing that is damaged, encrypted, too
            large or laid out otherwise, a path that leaves its archive, no characters, one without
            drawings, or the same one twice.
    """
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not paths:
        raise ValueError("sources is empty; wanted are zip archives or folders")
    decoder = Decoder(
        size=whole("image_size", image_size, least=1, most=1024),
        channels=1,
        formats=("PNG",),
        max_pixels=MAX_PIXELS,
        crop=False,
    )
    classes: dict[str, list[File]] = {}
    origins: dict[str, str] = {}
    with ExitStack() as stack:
        for path in map(Path, paths):
            tree = stack.enter_context(open_tree(path))
            for folder, drawings in _characters(path, tree).items():
                name, origin = "/".join(folder[-2:]), f"{path}: {'/'.join(folder)}"
                if name in classes:
                    raise DataError(
                        f"class {name!r} is there twice, in {origins[name]} and in {origin}"
                    )
                classes[name], origins[name] = drawings, origin
        return read_classes(classes, decoder, invert=True)


def _characters(path: Path, tree: Tree) -> dict[tuple[str, ...], list[File]]:
    """The drawings of a tree by the folder that they lie in, which is checked to be a character's.

    Files above the characters, as a README beside the alphabets, are let be.
    """
    found: dict[tuple[str, ...], list[File]] = {
        folder: [] for folder in tree.folders if _is_character(folder)
    }
    for file in tree.files:
        folder, name = file.parts[:-1], file.parts[-1]
        drawing = name.lower().endswith(".png")
        if folder in found and not drawing:
            raise DataError(f"{file.where} is no drawing; wanted are PNG files")
        if folder in found:
            found[folder].append(file)
        elif drawing:
            raise DataError(f"{file.where} lies in no character; wanted is {LAYOUT}")
    if not found:
        raise DataError(f"{path} has no characters; wanted is {LAYOUT}, or that below one folder")
    for folder, drawings in found.items():
        if not drawings:
            raise DataError(f"{path}: {'/'.join(folder)} has no drawings; wanted are PNG files")
    return found


def _is_character(folder: tuple[str, ...]) -> bool:
    return len(folder) in (2, 3) and _CHARACTER.fullmatch(folder[-1]) is not None
