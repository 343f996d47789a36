"""Files of images to uint8 pixels of one size, by Pillow.

Pillow comes with the extra "train" and is imported when an image is to be read.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maml_fast.errors import DataError
from maml_fast.tasks.images import ImageSet
from maml_fast.tasks.trees import File

if TYPE_CHECKING:
    from PIL.Image import Image


PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # the last chunk, with its checksum


@dataclass(frozen=True)
class Decoder:
    """How files become pixels.

    A picture is taken as it is meant to be seen (first frame, turned as its EXIF entry says, over
    white where it is transparent), cut to the square in its middle, and resampled: to the mean
    over each new pixel's area where that makes it smaller, else linearly by Pillow.
    """

    size: int  # pixels, height and width of what comes out
    channels: int  # 1: grey by ITU-R 601; 3: red, green, blue
    formats: tuple[str, ...]  # as Pillow names them
    max_pixels: int  # of a file, looked up in its header before anything is decoded
    crop: bool  # False: what is not square is an error

    def __call__(self, file: File) -> npt.NDArray[np.uint8]:
        """The pixels of a file, [channels, size, size].

        Raises:
            DataError: not an image of these formats, a damaged one, or one of absurd size.
        """
        pillow = _pillow()
        data = file.read()
        with warnings.catch_warnings():
            # Pillow's own limit is for those who have none.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            try:
                image = pillow.open(io.BytesIO(data), formats=self.formats)
                self._check_size(file, *image.size)
                if image.format == "PNG":
                    image.verify()  # its checksums, which decoding does not look at
                    if PNG_END not in data:  # whose checksum nobody looks at
                        raise DataError(f"{file.where} is damaged: its end is missing")
                    image = pillow.open(io.BytesIO(data), formats=self.formats)
                return self._resample(_as_seen(image, self.channels))
            except (DataError, MemoryError):
                raise
            except pillow.UnidentifiedImageError:
                formats = ", ".join(self.formats)
                raise DataError(
                    f"{file.where} is no image, or a damaged one; wanted is one of {formats}"
                ) from None
            except pillow.DecompressionBombError as error:
                limit = f"wanted are at most {self.max_pixels:,} pixels"
                raise DataError(f"{file.where} is too large: {error}; {limit}") from None
            except Exception as error:  # what a foreign file makes of the decoders
                raise DataError(f"{file.where} is damaged: {error}") from None

    def _check_size(self, file: File, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise DataError(
                f"{file.where} is {width} x {height} pixels large; wanted are at most "
                f"{self.max_pixels:,} pixels"
            )
        if not self.crop and width != height:
            raise DataError(f"{file.where} is {width} x {height} pixels large; wanted is a square")

    def _resample(self, image: Image) -> npt.NDArray[np.uint8]:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = (left, top, left + side, top + side)
        if side < self.size:
            new = (self.size, self.size)
            image = image.resize(new, _pillow().Resampling.BILINEAR, box=square)
        elif image.size != (side, side):
            image = image.crop(square)
        pixels = np.asarray(image).reshape(*image.size, self.channels).transpose(2, 0, 1)
        if side <= self.size:
            return pixels
        weights = _area_weights(side, self.size)
        means = weights @ pixels.astype(np.float32) @ weights.T
        return means.round().astype(np.uint8)


@lru_cache(maxsize=16)
def _area_weights(old: int, new: int) -> npt.NDArray[np.float32]:
    """How much each of `old` pixels in a line counts in the mean over each of `new`, [new, old].

    Pillow's BOX would count pixels whole or not at all, by where their centres are.
    """
    edges = np.linspace(0, old, new + 1)
    pixels = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * (new / old)).astype(np.float32)


def read_classes(
    classes: Mapping[str, Sequence[File]], decoder: Decoder, *, invert: bool
) -> ImageSet:
    """All files of all classes, the classes sorted by name.

    Raises:
        DataError: a file is no such image, or all together take more memory than there is.
    """
    names = sorted(classes)
    counts = [len(classes[name]) for name in names]
    images = _allocate(sum(counts), decoder.channels, decoder.size)
    rows = images.numpy()
    files = (file for name in names for file in classes[name])
    for i, file in enumerate(files):
        rows[i] = decoder(file)
    return ImageSet(images, _starts(counts), tuple(names), invert)


def _allocate(count: int, channels: int, size: int) -> Tensor:
    """Room for all images [count, channels, size, size]; a DataError where there is none.

    Memory is given without being there, and then ends the program when images fill it.
    """
    wanted, free = count * channels * size * size, _free_memory()
    told = f"{count:,} images of {size} x {size} pixels take {wanted:,} bytes of memory"
    least = "smaller images, or fewer"
    if free is not None and wanted > free:
        raise DataError(f"{told}, and {free:,} are free; wanted are {least}")
    try:
        return torch.empty((count, channels, size, size), dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise DataError(f"{told}, which are not to be had; wanted are {least}") from None


def _free_memory() -> int | None:
    """Bytes that a program can still have, swap included; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return sum(1024 * int(found[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _as_seen(image: Image, channels: int) -> Image:
    """The picture as 8-bit grey or RGB."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        wide = np.asarray(image).astype(np.int64)
        image = _pillow().fromarray((wide.clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        seen = _pillow().new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        image = seen
    return image.convert("L" if channels == 1 else "RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError(
            'Pillow is missing, which reads images; try: pip install "maml_fast[train]"'
        ) from None
    return Image
