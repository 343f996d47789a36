"""Foreign archives, folders and pictures: read or refused by name, in little time and memory, and
nothing is written. The damage of single bytes, one by one, is in test_omniglot_bad.py."""

import io
import os
import stat
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maml_fast.tasks import DataError, load_folder, load_omniglot
from tests.archives import drawings, encode, ink, patch_entry, write_folder, write_zip
from tests.mutations import EXTREMES, FOREIGN, bounded, damaged

FILES = drawings({"Greek": 2, "Latin": 1})
NAMES = [f"top/{name}" for name in FILES]


def read(path):
    """By both readers: each succeeds or refuses by the archive's name. Returns how many did."""
    before = sorted(path.parent.rglob("*"))
    taken = 0
    with bounded():
        for reading in (load_omniglot, load_folder):
            try:
                images = reading(path, 9)
            except DataError as error:
                assert path.name in str(error)  # noqa: PT017
            else:
                taken += 1
                assert len(images.images) > 0
                assert len(images.names) > 0
    assert sorted(path.parent.rglob("*")) == before
    return taken


def zipped(files, method=zipfile.ZIP_DEFLATED):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return memory.getvalue()


WHOLE = zipped((name, FILES[name.removeprefix("top/")]) for name in NAMES)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@FOREIGN
@given(data=st.data())
def test_damaged_bytes(data, method, tmp_path):
    path = tmp_path / "foreign.zip"
    whole = zipped(((name, FILES[name.removeprefix("top/")]) for name in NAMES), method)
    path.write_bytes(data.draw(damaged(whole)))
    read(path)


# Offsets and lengths of the fields of an entry in the central directory
FIELDS = [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2),
          (32, 2), (34, 2), (36, 2), (38, 4), (42, 4)]  # fmt: skip


@FOREIGN
@given(
    name=st.sampled_from(NAMES),
    edits=st.lists(
        st.tuples(st.sampled_from(FIELDS), EXTREMES | st.integers(0, 120)), min_size=1, max_size=3
    ),
)
def test_fields_of_an_entry(name, edits, tmp_path):
    path, data = tmp_path / "foreign.zip", WHOLE
    for (offset, size), value in edits:
        data = patch_entry(data, name, offset, {2: "<H", 4: "<I"}[size], value % 256**size)
    path.write_bytes(data)
    read(path)


PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "top", "Greek", "character01", "C:", "\\", "~", "CON", "a\0b"]),
    st.text(max_size=6),
)


@FOREIGN
@given(
    entries=st.lists(
        st.tuples(
            st.lists(PARTS, min_size=1, max_size=5).map("/".join),
            st.sampled_from(["", "/", "1.png", "/1.png", "1.PNG"]),
            st.sampled_from([0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, 0xFFFF]),
            st.sampled_from([*FILES.values(), b"", b"/etc/passwd"]),
        ),
        max_size=4,
    )
)
def test_any_names_and_kinds(entries, tmp_path):
    path = tmp_path / "foreign.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are there twice
        for name, ending, kind, data in entries:
            entry = zipfile.ZipInfo((name + ending).encode("utf-8", "replace").decode())
            entry.external_attr = kind << 16
            archive.writestr(entry, data)
    read(path)


def pictures():
    """One of each kind, and of each mode that a PNG knows."""
    grey, colour = ink(1, 9), np.stack([ink(seed, 9) for seed in (1, 2, 3)], 2)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    memory = io.BytesIO()
    wide.save(memory, "PNG")
    found = {
        "black": encode(grey, "1"),
        "grey": encode(grey),
        "wide": memory.getvalue(),
        "grey, transparent": encode(grey, "LA"),
        "palette": encode(colour, "P"),
        "palette, transparent": encode(colour, "P", transparency=0),
        "colour": encode(colour, "RGB", icc_profile=bytes(300)),
        "colour, transparent": encode(colour, "RGBA", dpi=(72, 72)),
    }
    moving = [Image.fromarray(ink(seed, 9)) for seed in range(3)]
    for kind in ("PNG", "GIF", "WEBP"):
        memory = io.BytesIO()
        moving[0].save(memory, kind, save_all=True, append_images=moving[1:])
        found[f"moving {kind}"] = memory.getvalue()
    for kind in ("JPEG", "BMP", "GIF", "WEBP"):
        found[kind] = encode(colour, "RGB", kind)
    return found


PICTURES = pictures()


@FOREIGN
@given(data=st.data())
def test_damaged_pictures(data, tmp_path):
    """The readers look at what a file begins with, not at its ending."""
    whole = PICTURES[data.draw(st.sampled_from(sorted(PICTURES)))]
    name = "Greek/character01/1.png"
    read(write_folder(tmp_path / "foreign", {name: data.draw(damaged(whole))}))


def chunks(png):
    """The chunks of a PNG, each its kind and data."""
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += length + 12
    return found


def assembled(parts):
    """A PNG of chunks, with checksums that are right."""
    text = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        text += struct.pack(">I", len(data)) + kind + data
        text += struct.pack(">I", zlib.crc32(kind + data))
    return text


OTHERS = [b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL",
          b"fdAT", b"gAMA", b"pHYs", b"sRGB", b"IEND", b"IDAT", b"abcd"]  # fmt: skip


@FOREIGN
@given(data=st.data())
def test_pngs_whose_checksums_are_right(data, tmp_path):
    """Chunks damaged, left out, put in, and in another order."""
    pngs = sorted(name for name in PICTURES if PICTURES[name].startswith(b"\x89PNG"))
    parts = chunks(PICTURES[data.draw(st.sampled_from(pngs))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(parts) - 1))
        kind, content = parts[at]
        what = data.draw(st.sampled_from(["damage", "damage", "out", "in", "move"]))
        if what == "damage":
            parts[at] = kind, data.draw(damaged(content))
        elif what == "in":
            content = data.draw(st.binary(max_size=30) | st.binary(max_size=30).map(zlib.compress))
            parts.insert(at, (data.draw(st.sampled_from(OTHERS)), content))
        elif what == "move":
            parts.insert(data.draw(st.integers(0, len(parts) - 1)), parts.pop(at))
        elif len(parts) > 1:
            del parts[at]
    read(write_folder(tmp_path / "foreign", {"Greek/character01/1.png": assembled(parts)}))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_text_that_grows_is_not_inflated(kind, tmp_path):
    """A hundred megabytes of zeros in a tenth of one, and three times."""
    grown = zlib.compressobj(9)
    zeros = b"".join(grown.compress(bytes(2**22)) for _ in range(25)) + grown.flush()
    head = b"name\0\0" if kind != b"iTXt" else b"name\0\1\0\0\0"
    parts = chunks(encode(ink(1, 9), "1"))
    parts[1:1] = [(kind, head + zeros)] * 3
    read(write_folder(tmp_path / "foreign", {"Greek/character01/1.png": assembled(parts)}))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_the_reader_would_inflate_whole_is_refused(method, tmp_path):
    """However little is asked for: of 60 MB of bzip2, a terabyte."""
    path = write_zip(tmp_path / "a.zip", FILES | {"Greek/character01/9.png": bytes(2**26)},
                     method=method)  # fmt: skip
    data = path.read_bytes()
    for name in [f"top/{name}" for name in FILES] + ["top/Greek/character01/9.png"]:
        data = patch_entry(data, name, 24, "<I", 200)
    path.write_bytes(data)
    with (
        bounded(megabytes=20),
        pytest.raises(DataError, match=rf"01.png is compressed by method {method} of zip archives"),
    ):
        load_omniglot(path)


def test_an_entry_without_a_name_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"")
    for reading in (load_omniglot, load_folder):
        with pytest.raises(DataError, match=r"a.zip: ' is a file without a name; wanted are paths"):
            reading(path, 9)


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """Thousands of drawings in the bytes of one."""
    path = write_zip(tmp_path / "a.zip", {"Greek/character01/1.png": bytes(2**20)})
    with zipfile.ZipFile(path, "a") as archive:
        (first,) = archive.infolist()
        for number in range(2000):
            entry = zipfile.ZipInfo.from_file(path, f"top/Greek/character01/{number:04}.png")
            for name in ("CRC", "compress_size", "file_size", "compress_type", "header_offset"):
                setattr(entry, name, getattr(first, name))
            archive.filelist.append(entry)
        archive._didModify = True
    with bounded(), pytest.raises(DataError, match=r"a.zip is a damaged zip archive: its entries"):
        load_omniglot(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for reading in (load_omniglot, load_folder):
        with pytest.raises(DataError, match=r"pipe is neither a file nor a folder"):
            reading(tmp_path / "pipe", 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 5000, "cannot be read: File name too long"),
        ("a\0b", "is no path; wanted is a folder"),
        ("foreign.zip/inside", "is not there; wanted is a folder"),
    ],
    ids=["long", "zero byte", "below a file"],
)
def test_a_path_that_is_none_is_refused(name, message, tmp_path):
    (tmp_path / "foreign.zip").write_bytes(WHOLE)
    for reading in (load_omniglot, load_folder):
        with pytest.raises(DataError, match=message):
            reading(tmp_path / name, 9)


def test_what_is_damaged_here_is_sound(tmp_path):
    (tmp_path / "foreign.zip").write_bytes(WHOLE)
    assert read(tmp_path / "foreign.zip") == 2
    for place, whole in enumerate(PICTURES.values()):
        assert read(write_folder(tmp_path / str(place), {"Greek/character01/1.png": whole})) >= 1
