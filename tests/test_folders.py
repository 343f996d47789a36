"""Folders of class sub-folders: formats, colours, cutting; what folders can be that is no data."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_fast.tasks import DataError, load_folder, pixels
from tests.archives import encode, huge_png, write_folder, write_zip

SHADES = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
COLOURS = np.stack([SHADES, SHADES.T, 255 - SHADES], axis=-1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP"])
@pytest.mark.parametrize("ending", ["lower", "upper"])
def test_every_format_is_read(kind, ending, tmp_path):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    name = f"cats/1.{kind.lower() if ending == 'lower' else kind}"
    write_folder(tmp_path, {name: encode(COLOURS, "RGB", kind, **options.get(kind, {}))})
    data = load_folder(tmp_path, 4)
    assert data.images.shape == (1, 3, 4, 4)
    assert not data.invert
    error = data.images[0].int() - torch.from_numpy(COLOURS).permute(2, 0, 1).int()
    assert error.abs().max() <= (8 if kind == "JPEG" else 0)


def test_grey_is_luma(tmp_path):
    write_folder(tmp_path, {"cats/1.png": encode(COLOURS, "RGB")})
    found = load_folder(tmp_path, 4, channels=1).images
    assert found.shape == (1, 1, 4, 4)
    assert np.abs(found[0, 0].numpy() - COLOURS @ [0.299, 0.587, 0.114]).max() <= 1


def test_the_square_in_the_middle_is_taken(tmp_path):
    wide = np.concatenate([SHADES * 0, SHADES, SHADES * 0 + 255], axis=1)
    write_folder(tmp_path, {"a/wide.png": encode(wide), "b/tall.png": encode(wide.T.copy())})
    images = load_folder(tmp_path, 4, channels=1).images
    assert np.array_equal(images[0, 0].numpy(), SHADES)
    assert np.array_equal(images[1, 0].numpy(), SHADES.T)
    halved = load_folder(tmp_path, 2, channels=1).images[0, 0].double().numpy()
    means = SHADES.reshape(2, 2, 2, 2).astype(np.float64).mean((1, 3))
    assert np.abs(halved - means).max() <= 1


def test_photographs_are_turned_as_they_say(tmp_path):
    turned = Image.fromarray(SHADES)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    write_folder(tmp_path, {"a/1.png": encode(SHADES, exif=exif)})
    found = load_folder(tmp_path, 4, channels=1).images[0, 0].numpy()
    assert np.array_equal(found, np.rot90(SHADES, -1))


def test_classes_are_the_folders_that_images_lie_in(tmp_path):
    image = encode(SHADES)
    names = ["b/1.png", "b/2.png", "a/x/1.png", "a/y/1.png", "a/y/2.png", "a/y/3.png", "c d/é.png"]
    files = dict.fromkeys(names, image)
    ignored = {"b/labels.csv": b"1", ".hidden/1.png": b"", "b/.2.png": b"", "README": b""}
    folder = write_folder(tmp_path / "folder", files | ignored)
    (folder / ".cache").mkdir()
    data = load_folder(folder, 4)
    assert data.names == ("a/x", "a/y", "b", "c d")
    assert data.counts.tolist() == [1, 3, 2, 1]
    zipped = load_folder(write_zip(tmp_path / "a.zip", files | ignored, top=""), 4)
    assert zipped.names == data.names
    assert torch.equal(zipped.images, data.images)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    folder = write_folder(tmp_path / "data", {"a/1.png": encode(SHADES)})
    elsewhere = write_folder(tmp_path / "elsewhere", {"1.png": encode(SHADES)})
    (folder / "b").symlink_to(elsewhere, target_is_directory=True)
    assert load_folder(folder, 4).names == ("a", "b")
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    with pytest.raises(DataError, match=r"a/again is a symbolic link to a folder that it lies in"):
        load_folder(folder, 4)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, {"a/1.png": encode(SHADES), "a/2.png": encode(SHADES)})
    with monkeypatch.context() as patch:
        read = Path.read_bytes

        def refuse(path):
            if path.name == "2.png":
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(DataError, match=r"a/2.png cannot be read: Permission denied"):
            load_folder(folder, 4)
    bytes_name = os.fsencode(folder) + b"/a/\xff.png"
    os.close(os.open(bytes_name, os.O_CREAT))
    with pytest.raises(DataError, match=r"a/.udcff.png' is no name in UTF-8"):
        load_folder(folder, 4)
    os.unlink(bytes_name)
    (folder / "a" / "3.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a/3.png cannot be read: No such file"):
        load_folder(folder, 4)
    (folder / "a" / "3.png").unlink()
    os.mkfifo(folder / "a" / "4.png")
    with pytest.raises(DataError, match=r"a/4.png is neither a file nor a folder"):
        load_folder(folder, 4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no class sub-folders of images"),
        ({"notes.txt": b""}, "has no class sub-folders of images"),
        ({"1.png": encode(SHADES)}, "1.png is in no class; wanted is .*<class>"),
        ({"a/1.png": encode(SHADES), "b/1.tif": b""}, "folder 'b' has no images; wanted are .png"),
        ({"a/1.png": b"text"}, "a/1.png is no image, or a damaged one; wanted is one of PNG, JPEG"),
        ({"a/1.jpg": encode(SHADES, kind="JPEG")[:-40]}, "a/1.jpg is damaged"),
        ({"a/1.gif": encode(SHADES, kind="GIF")[:-30]}, "a/1.gif is no image, or a damaged one"),
        ({"a/1.png": huge_png(10_000, 10_000)}, "10000 x 10000 pixels large; wanted are at most"),
    ],
)
def test_bad_folders_are_told(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_folder(write_folder(tmp_path, files), 4)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (10 * 3 * 64**2 - 1, "take 122,880 bytes of memory, and 122,879 are free; wanted are"),
        (None, "take 122,880 bytes of memory, which are not to be had; wanted are smaller images"),
    ],
)
def test_images_that_do_not_fit_into_memory_are_not_decoded(tmp_path, monkeypatch, free, message):
    write_folder(tmp_path, {f"a/{i}.png": b"damaged" for i in range(10)})

    def refuse(shape, dtype):
        raise RuntimeError(f"you tried to allocate {math.prod(shape)} bytes")

    monkeypatch.setattr(pixels, "_free_memory", lambda: free)
    monkeypatch.setattr(pixels.torch, "empty", refuse)
    with pytest.raises(DataError, match=f"10 images of 64 x 64 pixels {message}"):
        load_folder(tmp_path, 64)


def test_as_much_memory_as_there_is_may_be_filled(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/1.png": encode(SHADES)})
    monkeypatch.setattr(pixels, "_free_memory", lambda: 3 * 4**2)
    assert load_folder(tmp_path, 4).images.nbytes == 3 * 4**2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_the_free_memory_is_what_linux_says():
    assert 2**20 < pixels._free_memory() < 2**60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4, "channels": 2}, "channels is 2; wanted is 1 or 3"),
        ({"image_size": 4, "channels": "3"}, "channels is '3'; wanted is a whole number"),
        ({"image_size": 0}, "image_size is 0; wanted is a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message, tmp_path):
    write_folder(tmp_path, {"a/1.png": encode(SHADES)})
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path, **options)


def test_tasks_are_imported_without_the_extras():
    code = """
import sys
for name in ("PIL", "rich", "safetensors", "cyclopts", "matplotlib"):
    sys.modules[name] = None
import maml_fast.tasks as tasks
print(sorted(tasks.__all__) == sorted(name for name in tasks.__all__ if hasattr(tasks, name)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
