"""Omniglot: the layout as published, zipped and not, pixels, several archives."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from maml_fast.tasks import ImageTasks, load_omniglot
from tests.archives import (
    drawings,
    encode,
    equal,
    ink,
    write_folder,
    write_zip,
)

FILES = drawings({"Greek": 2, "Latin": 1})
NAMES = ("Greek/character01", "Greek/character02", "Latin/character01")


def area_means(pixels, size):
    """The mean over each new pixel's area, in float64."""
    edges = np.linspace(0, len(pixels), size + 1)
    old = np.arange(len(pixels))
    low, high = np.maximum(edges[:-1, None], old), np.minimum(edges[1:, None], old + 1)
    weights = np.clip(high - low, 0, None) * size / len(pixels)
    return weights @ pixels.astype(np.float64) @ weights.T


@pytest.fixture
def reference(tmp_path):
    return load_omniglot([write_zip(tmp_path / "reference.zip", FILES)], 9)


def test_a_set_has_every_drawing_by_class(reference):
    assert reference.names == NAMES
    assert reference.starts.tolist() == [0, 2, 4, 6]
    assert reference.images.shape == (6, 1, 9, 9)
    assert reference.invert
    for row, data in zip(reference.images, FILES.values(), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(row[0].numpy(), np.asarray(image.convert("L")))
    x = ImageTasks(reference, 3).sample(1, 1, 1).support_x
    assert ((x == 0) | (x == 1)).all()
    assert 0.2 < x.mean() < 0.4  # the ink is 1


@pytest.mark.parametrize("top", ["", "images_background/", "a b/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_and_folders_are_the_same_data(top, method, tmp_path, reference):
    zipped = write_zip(tmp_path / "a.zip", FILES, top, method)
    folder = tmp_path / "folder"
    write_folder(folder / top, FILES)
    assert equal(load_omniglot([zipped], 9), reference)
    assert equal(load_omniglot(zipped, 9), reference)
    assert equal(load_omniglot([folder], 9), reference)
    assert equal(load_omniglot(str(folder), 9), reference)


def test_several_archives_are_one_set_in_any_order(tmp_path, reference):
    greek = {name: data for name, data in FILES.items() if name.startswith("Greek")}
    one = write_zip(tmp_path / "one.zip", greek)
    two = write_folder(tmp_path / "two", {n: d for n, d in FILES.items() if n not in greek})
    assert equal(load_omniglot([one, two], 9), reference)
    assert equal(load_omniglot([two, one], 9), reference)


def test_two_archives_unpacked_into_one_folder(tmp_path, reference):
    for name, data in FILES.items():
        top = "images_background" if name.startswith("Greek") else "images_evaluation"
        write_folder(tmp_path / "both" / top, {name: data})
    assert equal(load_omniglot([tmp_path / "both"], 9), reference)


def test_what_is_no_data_is_let_be(tmp_path, reference):
    extra = {
        "README.md": b"about",
        "Greek/notes.txt": b"about Greek",
        "Greek/character01/.DS_Store": b"\0",
        "Greek/character01/._0000_01.png": b"\0",
        "Greek/character02/Thumbs.db": b"\0",
        ".git/character01/x.png": b"\0",
        "__MACOSX/Greek/character01/0000_01.png": b"\0",
    }
    assert equal(load_omniglot([write_zip(tmp_path / "a.zip", FILES | extra)], 9), reference)
    assert equal(load_omniglot([write_folder(tmp_path / "a", FILES | extra)], 9), reference)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("./", b"")  # the archive itself, as some archivers list it
        archive.mkdir("top")
        archive.mkdir("top/Greek")
        archive.writestr("__MACOSX/top/._Greek", b"\0")
        for name, data in FILES.items():
            archive.writestr(f"top\\{name}".replace("/", "\\"), data)
    assert equal(load_omniglot([tmp_path / "b.zip"], 9), reference)


@pytest.mark.parametrize("size", [28, 20, 105, 64])
def test_smaller_drawings_are_area_means(size, tmp_path):
    pixels = ink(seed=1)
    path = write_folder(tmp_path, {"Greek/character01/1.png": encode(pixels, "1")})
    found = load_omniglot([path], size).images[0, 0].numpy()
    assert np.abs(found - area_means(pixels, size)).max() <= 0.5 + 1e-4  # rounded once
    assert found.shape == (size, size)


def test_larger_drawings_are_interpolated(tmp_path):
    ramp = np.tile(np.linspace(0, 240, 9).astype(np.uint8), (9, 1))
    path = write_folder(tmp_path, {"Greek/character01/1.png": encode(ramp)})
    found = load_omniglot([path], 36).images[0, 0].int()
    assert torch.equal(found, found[:1].expand(36, 36))
    steps = found[0].diff()
    assert steps.min() >= 0  # ninths of 240, each in four steps but for the flat ends
    assert steps.max() <= 8


def transparent(pixels):
    opaque = np.where(pixels == 0, 255, 0).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(pixels * 0), Image.fromarray(opaque)])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA", "CMYK", "I;16", "transparent"])
def test_drawings_of_every_mode(mode, tmp_path):
    pixels = ink(seed=2, size=28)
    path = tmp_path / "Greek" / "character01" / "1.png"
    path.parent.mkdir(parents=True)
    if mode == "transparent":
        transparent(pixels).save(path)
    elif mode == "I;16":
        Image.fromarray(pixels.astype(np.uint16) * 257).save(path)
    elif mode == "CMYK":  # which PNG has not: grey as two palettes' entries instead
        Image.fromarray(pixels).quantize(2).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    assert np.array_equal(load_omniglot([tmp_path]).images[0, 0].numpy(), pixels)
