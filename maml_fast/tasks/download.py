"""The public archives of Omniglot, fetched whole or not at all.

An archive is written to a temporary name beside its own, checked, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError

BASE_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
BASE_URL_VARIABLE = "MAML_FAST_OMNIGLOT_URL"
_BLOCK = 2**16


class DownloadError(OSError):
    """An archive could not be fetched; the message names it and says what came instead."""


@dataclass(frozen=True)
class Archive:
    """What is known of a published archive."""

    size: int  # bytes
    sha256: str


# Sizes and checksums as TensorFlow Datasets lists them (url_checksums/omniglot.txt).
ARCHIVES = {
    "images_background": Archive(
        9_464_212, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"
    ),
    "images_evaluation": Archive(
        6_462_886, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"
    ),
    "images_background_small1": Archive(
        1_319_022, "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"
    ),
    "images_background_small2": Archive(
        1_580_917, "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"
    ),
}


def download_omniglot(
    folder: Path | str,
    names: Sequence[str] = ("images_background", "images_evaluation"),
    *,
    base_url: str | None = None,
    timeout: float = 30.0,
    progress: bool = True,
) -> list[Path]:
    """Fetch archives into `folder`, those left out that are there already; their paths.

    Args:
        folder: made if it is not there.
        names: of `ARCHIVES`; the two that make up the whole set if left out.
        base_url: the address that "/<name>.zip" follows; the environment's MAML_FAST_OMNIGLOT_URL
            if left out, or else the authors' repository. What it serves is checked all the same.
        timeout: seconds without an answer, or between two pieces of it.
        progress: show a bar on stderr, if rich is installed.

    Raises:
        ValueError: a name or address that is none.
        DownloadError: no connection, an answer that is an error, late, cut off or not the archive;
            a file of this name that is not the archive, which is left alone; a full disk. Nothing
            half-written is left behind, and archives that came whole before are kept.
    """
    folder = Path(folder)
    for name in names:
        if name not in ARCHIVES:
            raise ValueError(f"{name!r} is no archive; wanted are some of {', '.join(ARCHIVES)}")
    base_url = base_url or os.environ.get(BASE_URL_VARIABLE) or BASE_URL
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"base_url is {base_url!r}; wanted is an address of http or https")
    targets = [folder / f"{name}.zip" for name in names]
    missing = []
    for name, target in zip(names, targets, strict=True):
        if not target.exists():
            missing.append((ARCHIVES[name], target))
        elif (digest := _digest(target)) != ARCHIVES[name].sha256:
            raise DownloadError(
                f"{target} is there, but its SHA-256 is {digest}; wanted is "
                f"{ARCHIVES[name].sha256}. Remove it to have it fetched"
            )
    for archive, target in missing:
        with _bar(target.name, archive.size, progress) as advance:
            _fetch(f"{base_url.rstrip('/')}/{target.name}", target, archive, timeout, advance)
    return targets


def _fetch(
    url: str, target: Path, archive: Archive, timeout: float, advance: Callable[[int], None]
) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                _copy(url, answer, file, archive, advance)
                file.flush()
                os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    except DownloadError:
        raise
    except HTTPError as error:
        error.close()
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from None
    except TimeoutError:
        raise DownloadError(f"{url}: no answer for {timeout:g} seconds") from None
    except URLError as error:
        late = isinstance(error.reason, TimeoutError)
        reason = f"no answer for {timeout:g} seconds" if late else error.reason
        raise DownloadError(f"{url}: {reason}") from None
    except http.client.HTTPException as error:
        raise DownloadError(f"{url}: the answer breaks off or is no HTTP: {error!r}") from None
    except OSError as error:  # of the connection, or of the disk
        raise DownloadError(f"{url} to {target}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _copy(
    url: str,
    answer: http.client.HTTPResponse,
    file: IO[bytes],
    archive: Archive,
    advance: Callable[[int], None],
) -> None:
    """The answer's bytes to the file, and no more than the archive has."""
    digest, size = hashlib.sha256(), 0
    while block := answer.read(_BLOCK):
        size += len(block)
        if size > archive.size:
            raise DownloadError(f"{url} is longer than the archive's {archive.size:,} bytes")
        file.write(block)
        digest.update(block)
        advance(size)
    if size < archive.size:
        raise DownloadError(f"{url} ends after {size:,} bytes of the archive's {archive.size:,}")
    if digest.hexdigest() != archive.sha256:
        raise DownloadError(
            f"{url} has the SHA-256 {digest.hexdigest()}; wanted is {archive.sha256}"
        )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DownloadError(f"{path} cannot be read: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    """Have the new name on disk; Windows has no such call, and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _bar(name: str, size: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what is told the bytes so far."""
    if wanted:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
        except ModuleNotFoundError:
            wanted = False
    if not wanted:
        yield lambda so_far: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=size)
        yield lambda so_far: bar.update(task, completed=so_far)
