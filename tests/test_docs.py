"""Every page of docs/ runs, as a reader would paste it, and says what is so."""

import re

import pytest
import torch

import maml_fast
from maml_fast import inner, models, ops, outer, presets, tasks, trace
from tests.pages import ROOT, blocks, check, commands, links, run, with_options

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMPARED = sorted((DOCS / "migration").glob("*.md"))  # run by test_migration.py, in pairs
RUN = [
    page
    for page in PAGES
    if page not in COMPARED and re.search(r"^```(python|console)", page.read_text(), re.MULTILINE)
]


def name_of(page):
    return str(page.relative_to(DOCS))


@pytest.fixture
def as_before(monkeypatch):
    """What a page may change, put back behind it."""
    dtype, before = torch.get_default_dtype(), list(ops.OPERATIONS)
    for table in ("MODULES", "CALLS"):
        monkeypatch.setattr(trace, table, dict(getattr(trace, table)))
    yield
    ops.OPERATIONS[:] = before
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_page_runs(page, tmp_path, monkeypatch, as_before):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_there_are_pages_that_run():
    assert len(RUN) >= 10


@pytest.mark.parametrize("page", [page for page in PAGES if page not in COMPARED], ids=name_of)
def test_excerpts_are_what_the_files_say(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.title:
            source = (ROOT / block.title).read_text(encoding="utf-8")
            for part in block.text.split("\n...\n"):
                assert part.rstrip("\n") in source, f"{block.title} has not: {part}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences_are_at_the_margin(page):
    """Where they are seen by these tests."""
    assert not re.search(r"^[ \t>]+```", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_it_links_to_exists(page):
    for target in links(page):
        assert (page.parent / target.split("#")[0]).exists(), target


def test_the_reference_has_all_public_names():
    wanted = {f"maml_fast.{name}" for name in maml_fast.__all__} - {
        f"maml_fast.{module}" for module in ("inner", "outer", "presets")
    }
    wanted |= {f"maml_fast.tasks.{name}" for name in tasks.__all__}
    for module in (inner, outer, presets, models):
        wanted |= {
            f"{module.__name__}.{name}"
            for name, thing in vars(module).items()
            if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
        }
    found = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(), re.MULTILINE))
    assert not wanted - found


class TestThePagesOfTheseTests:
    """What would make the checks above pass in vain."""

    def test_wrong_output_is_seen(self):
        check("a ... c\n", "a b c\n", "")
        with pytest.raises(AssertionError, match="but found"):
            check("a ... d\n", "a b c\n", "")

    def test_wrong_code_is_seen(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tests.pages.ROOT", tmp_path)
        page = tmp_path / "page.md"
        page.write_text("```python\nx = 1\n```\n```python\nprint(x)\nassert x == 1\n```\n")
        assert run(page) == "1\n"
        page.write_text("```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
        with pytest.raises(AssertionError):
            run(page)
        page.write_text("```console\n$ rm page.md\n```\n")
        with pytest.raises(AssertionError, match="cannot run rm"):
            run(page)
        page.write_text("```console\n$ maml-fast train sinusoid --tasks 0\n```\n")
        with pytest.raises(AssertionError, match="ended with 2"):
            run(page)

    def test_commands_and_options(self):
        text = "$ maml-fast a \\\n    --b 1 2  # why\n$ make\nout\n"
        assert [command.split() for command, _ in commands(text)] == [
            ["maml-fast", "a", "--b", "1", "2", "#", "why"],
            ["make"],
        ]
        assert commands(text)[1][1] == "out\n"
        given = ["a", "--b", "1", "2", "--c", "--d", "5"]
        assert " ".join(with_options(given, ["--b", "3", "--e"])) == "a --c --d 5 --b 3 --e"
