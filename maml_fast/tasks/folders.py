"""Any folder of class sub-folders of images."""

from __future__ import annotations

import os
from pathlib import Path

from maml_fast.errors import DataError
from maml_fast.tasks.episodes import whole
from maml_fast.tasks.images import ImageSet
from maml_fast.tasks.pixels import Decoder, read_classes
from maml_fast.tasks.trees import File, open_tree

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
MAX_PIXELS = 2**26  # of an image: 8192 x 8192, 200 MB once decoded


def load_folder(path: Path | str, image_size: int, channels: int = 3) -> ImageSet:
    """All images below a folder, each of the class that the folder it lies in is.

    So `path`/dogs/beagle/1.jpg is of the class "dogs/beagle" (of the group "dogs"). Classes may
    differ in their numbers of images. Files with other endings than an image's are let be.
    An image is cut to the square in its middle and resampled: see `Decoder`. Symbolic links are
    followed, to files and folders elsewhere too.

    Args:
        path: the folder, or a zip archive of one.
        image_size: pixels, height and width.
        channels: 3 for colours, 1 for grey.

    Raises:
        ValueError: `image_size` is no size, or `channels` neither 1 nor 3.
        DataError: names the file or folder: no images, an image that is damaged, too large or in
            no class, a folder without images, a symbolic link that leads back to where it is.
    """
    path = Path(path)
    if whole("channels", channels, least=1) not in (1, 3):
        raise ValueError(f"channels is {channels}; wanted is 1 or 3")
    decoder = Decoder(
        size=whole("image_size", image_size, least=1, most=1024),
        channels=channels,
        formats=FORMATS,
        max_pixels=MAX_PIXELS,
        crop=True,
    )
    classes: dict[str, list[File]] = {}
    with open_tree(path) as tree:
        for file in tree.files:
            if file.parts[-1].lower().endswith(SUFFIXES):
                if len(file.parts) == 1:
                    raise DataError(f"{file.where} is in no class; wanted is {path}{os.sep}<class>")
                classes.setdefault("/".join(file.parts[:-1]), []).append(file)
        for folder in tree.folders:
            name = "/".join(folder)
            if not any(own == name or own.startswith(f"{name}/") for own in classes):
                endings = " ".join(SUFFIXES)
                raise DataError(f"{path}: folder {name!r} has no images; wanted are {endings}")
        if not classes:
            raise DataError(f"{path} has no class sub-folders of images")
        return read_classes(classes, decoder, invert=False)
