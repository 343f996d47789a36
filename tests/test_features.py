"""The table of what runs where, made by running it: that of the documentation is this one."""

from pathlib import Path

import pytest

from maml_fast.cli import main
from maml_fast.features import BACKENDS, FEATURES, all_found, as_markdown, reasons, try_out

PAGE = (Path(__file__).parents[1] / "docs" / "backends.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found():
    return all_found()


def test_the_page_has_the_table(found):
    """Triton's kernels run in the interpreter here, or on a GPU."""
    assert as_markdown(found) in PAGE


def test_the_reference_and_functional_have_all(found):
    assert {one.backend for one in found if one.runs} == set(BACKENDS)
    assert all(one.runs for one in found if one.backend in ("reference", "functional"))
    assert len(found) == len(FEATURES) * len(BACKENDS)


def test_whoever_has_not_says_why(found):
    lacking = [one for one in found if not one.runs]
    assert lacking
    for one in lacking:
        assert f"backend {one.backend!r} cannot run this model" in one.reason
        assert any(one.feature in line for line in reasons(found))


def test_auto_runs_them_all():
    for feature in FEATURES:
        assert try_out(feature, "auto").runs, feature.name


def test_the_command(capsys):
    assert main(["features", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| | `reference` | `functional` |")
