"""The files below a folder or inside a zip archive, listed and read with suspicion.

Nothing is extracted: the entries of an archive are read in memory, each as long as it says it is.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath

from maml_fast.errors import DataError

MAX_BYTES = 64 * 2**20  # of one file; a photograph of 60 megapixels takes about half
_ENCRYPTED = 0x1  # of the flags of an entry
# Of the others, the reader inflates all that is there, however little is asked for.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class File:
    """A file of a tree; hidden ones and what Finder and Explorer leave behind are no part of it."""

    where: str  # for messages
    parts: tuple[str, ...]  # the folders below the tree's root, then the file's own name
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Tree:
    """The files of a folder or archive, and its folders, both sorted by their parts."""

    files: list[File]
    folders: list[tuple[str, ...]]


@contextmanager
def open_tree(path: Path) -> Iterator[Tree]:
    """The tree of a folder or zip archive; its files can be read within the context.

    Symbolic links in a folder are followed, out of it too: who unpacks a foreign archive sees to
    it that it has none.

    Raises:
        DataError: there is neither, an archive is damaged or encrypted, a path in it leaves it, an
            entry is a symbolic link, is there twice, is too large or neither stored nor deflated;
            a folder cannot be read, or contains itself by a symbolic link. A file's `read` raises
            it likewise.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is not there; wanted is a folder or a zip archive") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise DataError(f"{str(path)!r} is no path; wanted is a folder or a zip archive") from None
    if stat.S_ISDIR(kind):
        yield _folder_tree(path)
        return
    if not stat.S_ISREG(kind):  # a pipe would be waited for
        raise DataError(f"{path} is neither a file nor a folder")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # what a foreign file makes of the reader, as struct.error
        raise DataError(f"{path} is no zip archive, or a damaged one: {error}") from None
    with archive:
        _check_count(path, len(archive.infolist()))
        _check_overlap(path, archive.infolist())
        yield _archive_tree(path, archive)


def _ignored(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _is_text(name: str) -> bool:
    """Whether it can be printed and saved: on Linux, a file's name may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_size(where: str, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{where} is {size:,} bytes long; wanted are at most {MAX_BYTES:,}")


def _check_count(path: Path, found: int) -> None:
    """As many entries are listed as the archive's last record says: the reader does not look.

    A damaged length can make one entry swallow the next.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 22 - 2**16))
        end = file.read()
    start = len(end) - 22 if end[-22:-18] == b"PK\5\6" else end.rfind(b"PK\5\6")
    promised = int.from_bytes(end[start + 10 : start + 12], "little")
    if promised not in (found % 2**16, 2**16 - 1):  # the latter: the number is elsewhere
        raise DataError(f"{path} is a damaged zip archive: {found} entries of {promised}")


def _check_overlap(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Entries do not share their bytes: a small archive of many would be a large one to read."""
    found, size = sum(entry.compress_size for entry in entries), path.stat().st_size
    if found > size:
        raise DataError(
            f"{path} is a damaged zip archive: its entries have {found:,} bytes, itself {size:,}"
        )


def _archive_tree(path: Path, archive: zipfile.ZipFile) -> Tree:
    files: dict[tuple[str, ...], File] = {}
    folders: set[tuple[str, ...]] = set()
    for entry in archive.infolist():
        where = f"{path}: {entry.filename}"
        parts = _entry_parts(where, entry)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{where} is a symbolic link; wanted are plain files")
        if entry.flag_bits & _ENCRYPTED:
            raise DataError(f"{where} is encrypted; wanted is an archive without a password")
        if entry.compress_type not in _METHODS:
            raise DataError(
                f"{where} is compressed by method {entry.compress_type} of zip archives; wanted is "
                f"one of {_METHODS}: stored, or deflated"
            )
        _check_size(where, entry.file_size)
        # Opened although not all will be read: a damaged name must not hide an entry.
        _read_entry(where, archive, entry, 0)
        if not parts or any(_ignored(part) for part in parts):
            continue
        folders.update(parts[:depth] for depth in range(1, len(parts)))
        if entry.is_dir():
            folders.add(parts)
            continue
        if parts in files:
            raise DataError(f"{where} is in the archive twice")
        files[parts] = File(
            where, parts, partial(_read_entry, where, archive, entry, entry.file_size)
        )
    return Tree([files[parts] for parts in sorted(files)], sorted(folders))


def _entry_parts(where: str, entry: zipfile.ZipInfo) -> tuple[str, ...]:
    """The parts of an entry's path; some archivers of Windows separate them by backslashes.

    There are none of the folder "./", which is the archive itself.
    """
    path = PureWindowsPath(entry.filename)
    wrong = None
    if path.root or ".." in path.parts:
        wrong = "is a path that leaves the archive"
    elif path.drive:
        wrong = f"is a path on a drive of Windows, {path.drive!r}"
    elif "\0" in entry.orig_filename:  # behind which a name goes on, unseen by the reader
        wrong = "has a zero byte in its name"
    elif not path.parts and not entry.filename.endswith("/"):
        wrong = "is a file without a name"
    if wrong:
        raise DataError(f"{where!r} {wrong}; wanted are paths inside the archive")
    return path.parts


def _read_entry(where: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> bytes:
    """The first `size` bytes of an entry. Without a size all that is there would be inflated, even
    where it is more than was declared."""
    try:
        with archive.open(entry) as file:
            data = file.read(size)
    except Exception as error:  # what a foreign file makes of the reader, as zlib.error
        raise DataError(f"{where} is damaged: {error}") from None
    if len(data) != size:
        raise DataError(f"{where} is damaged: {len(data)} bytes of {size}")
    return data


def _folder_tree(root: Path) -> Tree:
    files: list[File] = []
    folders: list[tuple[str, ...]] = []
    # Folders to be looked into, each with the identities of those it lies in.
    waiting: list[tuple[Path, tuple[str, ...], frozenset[tuple[int, int]]]] = [
        (root, (), frozenset())
    ]
    while waiting:
        folder, parts, above = waiting.pop()
        try:
            status = folder.stat()
            inside = sorted(child for child in folder.iterdir() if not _ignored(child.name))
            kinds = [child.stat() for child in inside]
        except OSError as error:
            where = error.filename or folder
            raise DataError(f"{where} cannot be read: {error.strerror or error}") from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise DataError(f"{folder} is a symbolic link to a folder that it lies in itself")
        if parts:
            folders.append(parts)
        for child, kind in zip(inside, kinds, strict=True):
            if not _is_text(child.name):
                raise DataError(f"{str(child)!a} is no name in UTF-8")
            if stat.S_ISDIR(kind.st_mode):
                waiting.append((child, (*parts, child.name), above | {identity}))
            elif stat.S_ISREG(kind.st_mode):
                _check_size(str(child), kind.st_size)
                files.append(File(str(child), (*parts, child.name), partial(_read_file, child)))
            else:
                raise DataError(f"{child} is neither a file nor a folder")
    return Tree(sorted(files, key=lambda file: file.parts), sorted(folders))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
