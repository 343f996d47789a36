"""Omniglot: bad archives and folders are named, and nothing damaged passes for data."""

import sys
import tracemalloc
import zipfile

import pytest

from maml_fast.tasks import DataError, load_omniglot
from tests.archives import (
    drawings,
    encode,
    equal,
    huge_png,
    ink,
    patch_entry,
    write_folder,
    write_zip,
)

FILES = drawings({"Greek": 2, "Latin": 1})


def load_or_message(path):
    try:
        return load_omniglot([path], 9), None
    except DataError as error:
        return None, str(error)


def test_no_flipped_byte_of_an_archive_passes_for_data(tmp_path):
    files = drawings({"Greek": 2}, each=1)
    whole = write_zip(tmp_path / "whole.zip", files).read_bytes()
    reference = load_omniglot([tmp_path / "whole.zip"], 9)
    refused = 0
    for place in range(len(whole)):
        for flip in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            (tmp_path / "damaged.zip").write_bytes(damaged)
            found, message = load_or_message(tmp_path / "damaged.zip")
            if found is None:
                refused += 1
                assert "damaged.zip" in message
            else:  # a date or another byte that nobody reads
                assert equal(found, reference)
    assert refused > len(whole)


def test_no_flipped_byte_of_a_drawing_passes_for_data(tmp_path):
    whole = encode(ink(seed=3, size=9), "1")
    path = tmp_path / "Greek" / "character01" / "1.png"
    write_folder(tmp_path, {"Greek/character01/1.png": whole})
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        found, message = load_or_message(tmp_path)
        assert found is None, place
        assert str(path) in message


@pytest.mark.parametrize("cut", [1, 4, 5, 12, 13])
def test_a_drawing_that_is_cut_is_refused(cut, tmp_path):
    whole = encode(ink(seed=3, size=9), "1")
    folder = write_folder(tmp_path, {"Greek/character01/1.png": whole[:-cut]})
    with pytest.raises(DataError, match=r"character01.1.png is damaged"):
        load_omniglot([folder], 9)
    (folder / "Greek" / "character01" / "1.png").write_bytes(whole + b"more")  # is let be
    assert load_omniglot([folder], 9).images.shape == (1, 1, 9, 9)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(share, tmp_path):
    whole = write_zip(tmp_path / "whole.zip", FILES).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"cut.zip is no zip archive, or a damaged one"):
        load_omniglot([tmp_path / "cut.zip"])


DRAWING = "Greek/character01/0000_01.png"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (DRAWING, FILES[DRAWING][:-20], "0000_01.png is damaged"),
        (DRAWING, FILES[DRAWING][:40], "0000_01.png is no image, or a damaged one"),
        (DRAWING, b"", "0000_01.png is no image, or a damaged one; wanted is one of PNG"),
        (
            DRAWING,
            b"no image at all",
            "0000_01.png is no image, or a damaged one; wanted is one of PNG",
        ),
        (
            DRAWING,
            encode(ink(1, 9), kind="BMP"),
            "0000_01.png is no image, or a damaged one; wanted is one of PNG",
        ),
        (DRAWING, encode(ink(1, 9)[:5]), "0000_01.png is 9 x 5 pixels large; wanted is a square"),
        (DRAWING, huge_png(5000, 5000), "5000 x 5000 pixels large; wanted are at most 16,777,216"),
        (DRAWING, huge_png(2**31 - 1, 2**31 - 1), "is too large"),
        (DRAWING, huge_png(12_000, 12_000), "12000 x 12000 pixels large"),
        ("Greek/character01/notes.txt", b"", "notes.txt is no drawing; wanted are PNG files"),
        ("Greek/x.png", b"", "x.png lies in no character; wanted is <alphabet>/character<NN>"),
        ("Greek/alpha/1.png", b"", "1.png lies in no character"),
        ("Greek/character01/more/1.png", b"", "1.png lies in no character"),
        ("1.png", b"", "1.png lies in no character"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_bad_file_is_named(kind, name, data, message, tmp_path):
    files = FILES | {name: data}
    path = tmp_path / "source"
    write_zip(path, files) if kind == "zip" else write_folder(path, files)
    with pytest.raises(DataError, match=f"source.*{message}"):
        load_omniglot([path])


@pytest.mark.parametrize(
    "name",
    ["../1.png", "a/../../1.png", "/etc/1.png", "C:/1.png", "..\\1.png", "\\\\host\\share\\1.png"],
)
def test_paths_that_leave_the_archive_are_refused(name, tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES | {name: b""}, top="")
    with pytest.raises(DataError, match=r"is a path that leaves the archive"):
        load_omniglot([path])
    assert sorted(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A:x/1.png", "'.*a.zip: A:x/1.png' is a path on a drive of Windows, 'A:'; wanted are"),
        (".", "'.*a.zip: .' is a file without a name; wanted are paths inside the archive"),
    ],
)
def test_paths_that_are_none_are_refused(name, message, tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES | {name: b""}, top="")
    with pytest.raises(DataError, match=message):
        load_omniglot([path])


def test_a_zero_byte_in_a_name_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(path.read_bytes().replace(DRAWING.encode(), DRAWING.encode()[:-1] + b"\0"))
    with pytest.raises(DataError, match=r"0000_01.pn' has a zero byte in its name; wanted are"):
        load_omniglot([path])


def test_a_symbolic_link_in_an_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("top/Greek/character01/9.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"9.png is a symbolic link; wanted are plain files"):
        load_omniglot([path])


def test_an_encrypted_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(patch_entry(path.read_bytes(), f"top/{DRAWING}", 8, "<H", 1))
    with pytest.raises(DataError, match=r"0000_01.png is encrypted; wanted is an archive without"):
        load_omniglot([path])


def test_an_unknown_compression_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(patch_entry(path.read_bytes(), f"top/{DRAWING}", 10, "<H", 99))
    with pytest.raises(DataError, match=r"0000_01.png is compressed by method 99 .*deflated"):
        load_omniglot([path])


@pytest.mark.parametrize(("offset", "letter"), [(-6, b"/"), (-11, b".")])
def test_an_entry_whose_name_is_damaged_is_not_passed_over(offset, letter, tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    whole = bytearray(path.read_bytes())
    end = whole.rindex(DRAWING.encode()) + len(DRAWING)
    whole[end + offset : end + offset + 1] = letter  # now in a hidden folder, or a hidden file
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"a.zip: top/.* (is damaged: File name in|lies in no)"):
        load_omniglot([path])


def test_an_entry_that_promises_too_much_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(patch_entry(path.read_bytes(), f"top/{DRAWING}", 24, "<I", 2**30))
    with pytest.raises(DataError, match=r"is 1,073,741,824 bytes long; wanted are at most 67,108,"):
        load_omniglot([path])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_entry_that_holds_less_than_it_promises_is_refused(method, tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES, method=method)
    size = len(FILES[DRAWING])
    path.write_bytes(patch_entry(path.read_bytes(), f"top/{DRAWING}", 24, "<I", size + 7))
    with pytest.raises(DataError, match=rf"0000_01.png is damaged: {size} bytes of {size + 7}"):
        load_omniglot([path])


def test_an_entry_that_holds_more_than_it_promises_is_not_inflated(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES | {DRAWING: bytes(100 * 2**20)})
    path.write_bytes(patch_entry(path.read_bytes(), f"top/{DRAWING}", 24, "<I", 200))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"0000_01.png is damaged: Bad CRC-32"):
        load_omniglot([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_drawing_that_is_there_twice_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"top/{DRAWING}", FILES[DRAWING])
    with pytest.raises(DataError, match=r"0000_01.png is in the archive twice"):
        load_omniglot([path])


def test_a_class_of_two_archives_is_refused(tmp_path):
    one = write_zip(tmp_path / "one.zip", FILES)
    two = write_folder(tmp_path / "two", drawings({"Latin": 1}))
    with pytest.raises(
        DataError,
        match=r"'Latin/character01' is there twice, in .*one.zip: top/Latin.* in .*two: L",
    ):
        load_omniglot([one, two])
    with pytest.raises(DataError, match=r"'Greek/character01' is there twice"):
        load_omniglot([one, one])


def test_sources_without_characters_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_zip(tmp_path / "empty.zip", {})
    write_zip(tmp_path / "other.zip", {"README.md": b""})
    for name in ("empty", "empty.zip", "other.zip"):
        with pytest.raises(DataError, match=rf"{name} has no characters; wanted is <alphabet>"):
            load_omniglot([tmp_path / name])
    with pytest.raises(DataError, match=r"nowhere is not there; wanted is a folder or a zip"):
        load_omniglot([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"sources is empty"):
        load_omniglot([])
    for size in (0, 2000, 28.0):
        with pytest.raises(ValueError, match=r"image_size is"):
            load_omniglot([tmp_path / "empty"], size)


def test_a_character_without_drawings_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a", FILES)
    (folder / "Greek" / "character03").mkdir()
    with pytest.raises(DataError, match=r"a: Greek/character03 has no drawings"):
        load_omniglot([folder])
    path = write_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("top/Greek/character03")
    with pytest.raises(DataError, match=r"a.zip: top/Greek/character03 has no drawings"):
        load_omniglot([path])


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", FILES)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'Pillow is missing.* pip install "maml_fast\[train\]"'):
        load_omniglot([path])
