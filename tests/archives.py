"""Small archives and folders in the layout of Omniglot, and images as the bytes of files."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def encode(pixels: np.ndarray, mode: str = "L", kind: str = "PNG", **options) -> bytes:
    """uint8 pixels [H, W] or [H, W, 3] as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def ink(seed: int, size: int = 105, share: float = 0.3) -> np.ndarray:
    """Random black strokes on white, uint8 [size, size] of 0 and 255."""
    black = np.random.default_rng(seed).random((size, size)) < share
    return np.where(black, 0, 255).astype(np.uint8)


def drawings(alphabets: dict[str, int], each: int = 2, size: int = 9) -> dict[str, bytes]:
    """Files of `each` drawings of every character: "Greek/character01/0001_01.png" and so on."""
    return {
        f"{alphabet}/character{character:02}/{number:04}_{i:02}.png": encode(
            ink(1000 * number + i, size), "1"
        )
        for number, (alphabet, character) in enumerate(
            (alphabet, c) for alphabet, count in alphabets.items() for c in range(1, count + 1)
        )
        for i in range(1, each + 1)
    }


def write_zip(
    path: Path, files: dict[str, bytes], top: str = "top/", method: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(f"{top}{name}", data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        path.joinpath(name).write_bytes(data)
    return path


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def patch_entry(data: bytes, name: str, offset: int, layout: str, value: int) -> bytes:
    """A zip with a field of an entry of its central directory overwritten."""
    start = data.rindex(name.encode()) - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    patched = bytearray(data)
    struct.pack_into(layout, patched, start + offset, value)
    return bytes(patched)


def equal(a, b):
    """Whether two sets of images are the same."""
    return (
        a.names == b.names
        and torch.equal(a.images, b.images)
        and torch.equal(a.starts, b.starts)
        and a.invert == b.invert
    )
