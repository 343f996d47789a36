"""Downloads from a server on loopback: whole and checked, or an error and nothing left behind."""

import errno
import hashlib
import http.server
import io
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

from maml_fast.tasks import DownloadError, download, download_omniglot

DATA = random.Random(0).randbytes(300_000)
NAME = "images_background_small1"
FILE = f"{NAME}.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA, in the way that the first part of the path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        way, name = self.path.strip("/").split("/")
        assert name.endswith(".zip")
        getattr(self, way)()

    def whole(self, data=DATA, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def cut(self):
        self.whole(DATA[:200_000], len(DATA))
        self.close_connection = True

    def short(self):
        self.whole(DATA[:200_000])

    def longer(self):
        self.whole(DATA + b"more")

    def endless(self):
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(DATA)
        except OSError:
            self.server.hung_up.set()

    def wrong(self):
        self.whole(bytes(len(DATA)))

    def chunked(self, end=True):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(DATA), 100_000):
            self.wfile.write(b"%x\r\n" % 100_000 + DATA[start : start + 100_000] + b"\r\n")
            if not end:
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def cut_chunks(self):
        self.chunked(end=False)

    def missing(self):
        self.send_error(404)

    def broken(self):
        self.send_error(503)

    def moved(self):
        self.send_response(302)
        self.send_header("Location", f"/whole/{FILE}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def silent(self):
        self.server.stopped.wait(20)

    def stalled(self):
        self.whole(DATA[:100_000], len(DATA))
        self.wfile.flush()
        self.silent()

    def garbage(self):
        self.wfile.write(b"not HTTP\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    known = download.Archive(len(DATA), hashlib.sha256(DATA).hexdigest())
    for name in (NAME, "images_background"):
        monkeypatch.setitem(download.ARCHIVES, name, known)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.stopped = [], threading.Event()
        server.hung_up = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


def fetch(server, folder, way, **options):
    return download_omniglot(
        folder, [NAME], base_url=f"{server.url}/{way}", progress=False, **options
    )


@pytest.mark.parametrize("way", ["whole", "chunked", "moved"])
def test_an_archive_comes_whole(way, server, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert fetch(server, folder, way) == [folder / FILE]
    assert (folder / FILE).read_bytes() == DATA
    assert os.listdir(folder) == [FILE]
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / FILE).stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_archive_that_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / FILE).write_bytes(DATA)
    paths = download_omniglot(
        str(tmp_path), (NAME, "images_background"), base_url=f"{server.url}/whole/", progress=False
    )
    assert paths == [tmp_path / FILE, tmp_path / "images_background.zip"]
    assert server.asked == ["/whole/images_background.zip"]
    assert paths[1].read_bytes() == DATA


def test_another_file_of_this_name_is_let_be(server, tmp_path):
    (tmp_path / FILE).write_bytes(b"mine")
    with pytest.raises(DownloadError, match=rf"{FILE} is there, but its SHA-256 is .*Remove it"):
        fetch(server, tmp_path, "whole")
    assert (tmp_path / FILE).read_bytes() == b"mine"
    assert server.asked == []


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("cut", "ends after 200,000 bytes of the archive's 300,000"),
        ("short", "ends after 200,000 bytes of the archive's 300,000"),
        ("cut_chunks", "the answer breaks off or is no HTTP: IncompleteRead"),
        ("longer", "is longer than the archive's 300,000 bytes"),
        ("endless", "is longer than the archive's 300,000 bytes"),
        ("wrong", rf"has the SHA-256 \w+; wanted is {hashlib.sha256(DATA).hexdigest()}"),
        ("missing", "the server answers 404 Not Found"),
        ("broken", "the server answers 503 Service Unavailable"),
        ("silent", "no answer for 0.3 seconds"),
        ("stalled", "no answer for 0.3 seconds"),
        ("garbage", "the answer breaks off or is no HTTP: BadStatusLine"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(way, message, server, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=f"{way}/{FILE}.*{message}"):
        fetch(server, tmp_path, way, timeout=0.3)
    assert time.monotonic() - start < 10
    assert os.listdir(tmp_path) == []
    if way == "endless":
        assert server.hung_up.wait(10)


def test_what_came_whole_before_a_failure_is_kept(server, tmp_path, monkeypatch):
    missing = Handler.missing
    monkeypatch.setattr(
        Handler,
        "whole",
        lambda self, whole=Handler.whole: (missing if "small" in self.path else whole)(self),
    )
    with pytest.raises(DownloadError, match="404"):
        download_omniglot(
            tmp_path, ["images_background", NAME], base_url=f"{server.url}/whole", progress=False
        )
    assert os.listdir(tmp_path) == ["images_background.zip"]


class SmallDisk(io.FileIO):
    """A file on a disk that has room for two blocks."""

    def write(self, data):
        if self.tell() + len(data) > 2 * 65536:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("when", ["writing", "flushing"])
def test_a_full_disk_leaves_nothing_behind(when, server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    seen = []

    def small(path, mode):
        seen.append(path)
        return SmallDisk(path, mode)

    if when == "writing":
        monkeypatch.setattr(Path, "open", small)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=rf"to .*{FILE}: No space left on device"):
        fetch(server, tmp_path, "whole")
    assert os.listdir(tmp_path) == []
    assert len(seen) == (when == "writing")


def test_an_interrupted_download_leaves_nothing_behind(server, tmp_path, monkeypatch):
    def interrupt(*_):
        assert len(os.listdir(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path, "whole")
    assert os.listdir(tmp_path) == []


def test_no_server_and_no_folder_are_told(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"{port}/{FILE}: .*refused"):
        download_omniglot(tmp_path, [NAME], base_url=f"http://127.0.0.1:{port}", progress=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=rf"to {tmp_path}/file/{FILE}: "):
        fetch(server, tmp_path / "file", "whole")
    assert os.listdir(tmp_path) == ["file"]


def test_the_address_comes_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MAML_FAST_OMNIGLOT_URL", f"{server.url}/whole")
    assert download_omniglot(tmp_path, [NAME], progress=False) == [tmp_path / FILE]


def test_progress_is_a_bar_on_stderr(server, tmp_path, capsys):
    download_omniglot(tmp_path, [NAME], base_url=f"{server.url}/whole")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert FILE in shown.err
    assert "300.0/300.0 kB" in shown.err


@pytest.mark.parametrize(
    ("names", "base_url", "message"),
    [
        (["strokes"], None, "'strokes' is no archive; wanted are some of images_background, "),
        ([NAME], "file:///etc", "base_url is 'file:///etc'; wanted is an address of http or https"),
    ],
)
def test_bad_arguments_are_named(names, base_url, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        download_omniglot(tmp_path, names, base_url=base_url)
