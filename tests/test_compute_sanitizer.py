"""How compute-sanitizer is called, tried with a program in its place: there need be no GPU."""

import shutil
import sys

import pytest

from maml_fast.backends.cuda_graphs import Graphs
from tests import compute_sanitizer
from tests.compute_sanitizer import FOUND, TESTS, TOOLS, main, no_graphs  # noqa: F401

pytestmark = pytest.mark.skipif(
    shutil.which("timeout") is None, reason="needs the command timeout, as of GNU"
)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Puts a shell script in the sanitizer's place, and sets the arguments of the command line."""

    def put(script, *arguments):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $@ >> {tmp_path}/log\n{script}"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(sys, "argv", ["compute_sanitizer", *arguments])
        return tmp_path / "log"

    return put


def test_both_tools_are_run_on_the_kernels_tests(pretend, capsys):
    log = pretend("exit 0", "-k", "float32")
    assert main() == 0
    lines = log.read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == [f"{tool}: nothing found" for tool in TOOLS]
    assert len(lines) == len(TOOLS)
    for tool, line in zip(TOOLS, lines, strict=True):
        assert line.startswith(f"1 --tool {tool} --error-exitcode {FOUND} ")
        assert f"{sys.executable} -m pytest" in line
        assert line.endswith(" ".join([*TESTS, "-k float32"]))


@pytest.mark.parametrize(("status", "wanted"), [(FOUND, 1), (1, 1), (4, 1), (2, 0)])
def test_what_is_found_is_a_failure(status, wanted, pretend, capsys):
    """But not that the time is up."""
    pretend(f"exit {status}")
    assert main() == wanted
    assert ("the time is up" in capsys.readouterr().out) == (wanted == 0)


@pytest.mark.parametrize(("found", "wanted"), [("", 0), (f"exit {FOUND}", 1)])
def test_the_time_is_limited(found, wanted, pretend):
    """What was found before the interrupt counts."""
    pretend(f"trap '{found or 'exit 2'}' INT; sleep 5 & wait", "--seconds", "1")
    assert main() == wanted


def test_without_the_tool_nothing_is_checked_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(compute_sanitizer, "find", lambda: None)
    assert main() == 0
    assert "nothing was checked" in capsys.readouterr().out


def test_the_selected_tests_are_there(request):
    root = request.config.rootpath
    for name in TESTS:
        file, _, function = name.partition("::")
        assert f"def {function}" in (root / file).read_text()


def test_nothing_becomes_a_graph(no_graphs):  # noqa: F811
    assert Graphs().run("key", None, lambda batch: [batch]) == [None]
