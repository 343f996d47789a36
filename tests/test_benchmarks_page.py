"""The benchmark page is what the kept results say."""

import dataclasses
import json
import re
import shutil

import pytest

from benchmarks import page, page_plot
from benchmarks.results import Results

CASE, LOST = "sinusoid-T25-S1", "sinusoid-T512-S20"
KEPT = page.RESULTS / "cpu-2026-11-25.json"


@pytest.fixture
def folders(tmp_path):
    """Results, and where the page goes."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    return tmp_path / "results", tmp_path / "docs"


def write(folders, *more):
    results, docs = folders
    return page.main(["--results", str(results), "--docs", str(docs), *more])


def test_the_committed_page_is_up_to_date():
    assert page.main(["--check"]) == 0


def test_a_stale_page_is_found(folders, capsys):
    results, docs = folders
    shutil.copy(KEPT, results)
    assert write(folders, "--check") == 1
    assert write(folders) == 0
    assert write(folders, "--check") == 0
    text = (docs / "benchmarks.md").read_text()
    (docs / "benchmarks.md").write_text(text.replace("LOST", "won"))
    capsys.readouterr()
    assert write(folders, "--check") == 1
    assert "not up to date: benchmarks.md" in capsys.readouterr().out
    assert "LOST" not in (docs / "benchmarks.md").read_text()  # nothing was written


def test_every_row_is_there_the_lost_and_the_failed_too():
    text = (page.DOCS / "benchmarks.md").read_text()
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    seen = 0
    for path in page.RESULTS.glob("*.json"):
        results = Results.load(path)
        for row in results.rows:
            if f"From `{path.name}`" in sections[row.case]:
                assert f"| {row.title} | " in sections[row.case], (row.case, row.title)
                seen += 1
    assert seen > 100
    assert re.search(rf"\| {LOST} .*\| LOST \|", text)
    assert f"- **{LOST}**" in text
    assert "There are no GPU results yet" in text


def test_the_newest_run_of_a_case_counts_and_memory_is_of_another(folders):
    results, docs = folders
    old = Results.load(KEPT)
    cases = [row for row in old.rows if row.case == CASE]
    with_memory = [dataclasses.replace(row, peak_bytes=12_300_000) for row in cases]
    machine = {**old.machine, "date": "2026-11-24T10:00:00+00:00"}
    Results(machine, old.references, with_memory).save(results / "older.json")
    Results(old.machine, old.references, cases).save(results / "newer.json")
    assert write(folders) == 0
    text = (docs / "benchmarks.md").read_text()
    assert "From `newer.json`" in text
    assert "From `older.json`" not in text
    timed = sum(row.status == "timed" for row in cases)
    assert text.count("12.3 MB") == text.count("peak memory: taken in older.json") == timed


def test_results_of_a_gpu_have_a_section_of_their_own(folders):
    results, docs = folders
    found = Results.load(KEPT)
    machine = {**found.machine, "device": "NVIDIA H100", "gpu": {}}
    rows = [row for row in found.rows if row.case == CASE]
    Results(machine, found.references, rows).save(results / "nvidia-h100.json")
    assert write(folders) == 0
    text = (docs / "benchmarks.md").read_text()
    assert "## GPU: NVIDIA H100" in text
    assert "no GPU results" not in text
    assert "of floor" in text
    assert (docs / "pictures" / "nvidia-h100-speed.svg").exists()


def test_files_of_another_kind_are_named(folders):
    results, docs = folders
    (results / "deep").mkdir()
    (results / "deep" / "other.json").write_text(json.dumps({"rows": [{"what": 1}]}))
    assert write(folders) == 0
    assert "- `benchmarks/results/deep/other.json`" in (docs / "benchmarks.md").read_text()


def test_the_pictures_show_every_time():
    results = Results.load(KEPT)
    picture = page_plot.speed(results)
    timed = [row for row in results.rows if row.times]
    assert picture.count("<circle") == len(timed)
    shares = [row for row in results.rows if row.ours and row.times and row.share is not None]
    assert page_plot.peak(results).count("<rect") == len(shares) + 1  # and the ground
