"""Small data sets of images on disk, each class a pattern, each image that and some noise."""

import itertools
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maml_fast.tasks import ImageSet


def picture(name: str, number: int, size: int, channels: int = 1) -> bytes:
    """A PNG; the same arguments give the same bytes."""
    pattern = np.random.default_rng(list(name.encode())).random((4, 4, channels)) < 0.5
    noise = np.random.default_rng([number, *name.encode()]).random((size, size, channels)) < 0.1
    scale = -(-size // 4)
    pixels = pattern.repeat(scale, 0).repeat(scale, 1)[:size, :size] ^ noise
    pixels = np.where(pixels, 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def characters(alphabets: dict[str, int]) -> list[str]:
    """Classes of Omniglot: {"Greek": 2} is Greek/character01 and Greek/character02."""
    return [
        f"{alphabet}/character{number:02}"
        for alphabet, count in alphabets.items()
        for number in range(1, count + 1)
    ]


def make_archive(path: Path, alphabets: dict[str, int], drawings: int = 6) -> Path:
    """An archive as Omniglot's."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in characters(alphabets):
            for number in range(drawings):
                archive.writestr(f"{path.stem}/{name}/{number}.png", picture(name, number, 28))
    return path


def make_folder(
    path: Path, classes: int, images: int = 6, size: int = 16, channels: int = 3
) -> Path:
    """A folder of classes "animals/0", "plants/1", "animals/2", ...."""
    for number in range(classes):
        name = f"{('animals', 'plants')[number % 2]}/{number}"
        (path / name).mkdir(parents=True)
        for image in range(images):
            (path / name / f"{image}.png").write_bytes(picture(name, image, size, channels))
    return path


def marked_set(counts, size=3, invert=False):
    """Images that tell what they are: the top left pixel is the image's number plus one, all other
    pixels are 0; so it also tells which way up it is."""
    total = sum(counts)
    assert total < 255
    pixels = torch.zeros(total, 1, size, size, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(1, total + 1)
    starts = torch.tensor([0, *itertools.accumulate(counts)])
    return ImageSet(pixels, starts, tuple(f"class{c}" for c in range(len(counts))), invert)
