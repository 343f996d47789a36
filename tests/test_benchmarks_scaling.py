"""The benchmark of many processes: its model on paper, what it measures, and what it refuses."""

import json

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling_model import Network, Step, line

CASE = "sinusoid-T25-S1"
NETWORK = Network(latency=1e-4, bandwidth=1e9)
STEP = Step(tasks=100, parameters=250_000, draw=1e-3, fixed=2e-3, task=1e-3, rest=3e-3)


@pytest.mark.parametrize(
    ("ranks", "cores", "wanted"),
    [
        (1, 2, 0.106),
        (2, 2, 0.056 + 0.0002 + 0.001),  # 2 latencies, and every number once
        (4, 4, 0.031 + 0.0006 + 0.0015),  # 6 latencies, and every number one and a half times
        (4, 2, 2 * 0.031 + 0.0006 + 0.0015),
        (3, 4, 0.006 + 0.034 + 0.0004 + 0.001 * 4 / 3),  # 34, 33 and 33 tasks
    ],
)
def test_a_step_on_paper(ranks, cores, wanted):
    assert STEP.seconds(ranks, NETWORK, cores) == pytest.approx(wanted, rel=1e-12)


def test_a_small_step_loses_by_processes():
    small = Step(tasks=25, parameters=1_761, draw=1e-5, fixed=5e-5, task=2e-6, rest=5e-5)
    assert small.seconds(2, NETWORK, 2) > small.seconds(1, NETWORK, 2)
    assert STEP.seconds(1, NETWORK, 2) / STEP.seconds(2, NETWORK, 2) > 1.8


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_network_is_found_from_its_times(ranks):
    lengths = (1_000, 100_000, 1_000_000)
    found = Network.fitted([(n, NETWORK.allreduce(ranks, n)) for n in lengths], ranks)
    assert found.bandwidth == pytest.approx(NETWORK.bandwidth, rel=1e-9)
    assert found.latency == pytest.approx(NETWORK.latency, rel=0.05)  # a few bytes went along


def test_lines():
    assert line([(1, 3.0), (2, 5.0), (4, 9.0)]) == pytest.approx((1.0, 2.0))
    assert line([(1, 1.0), (2, 3.0)]) == pytest.approx((0.0, 1.4))  # never below 0 at 0


def assert_whole(found):
    """The format of a file of results."""
    assert found["machine"]["cpu"]
    assert found["network"].keys() == {"latency", "bandwidth"}
    for row in found["rows"]:
        assert row["error"] <= scaling.WRONG
        assert row["seconds"] > 0
        step = Step(**found["steps"][row["case"]])
        network = Network(**found["network"])
        paper = step.seconds(row["processes"], network, found["machine"]["cores"])
        assert row["predicted"] == pytest.approx(paper)
    by_case = {case: {} for case in found["steps"]}
    for row in found["rows"]:
        by_case[row["case"]][row["processes"]] = row
    for rows in by_case.values():
        assert list(rows)[:2] == [1, 2]
        for row in rows.values():
            assert row["speedup"] == pytest.approx(rows[1]["seconds"] / row["seconds"])


def test_it_measures_and_foretells(monkeypatch, tmp_path, threads):
    launch = scaling.launch

    def quicker(processes, cases, budget, folder):
        if processes > 1:
            return launch(processes, cases, budget, folder)
        scaling.worker(cases, budget, folder)  # which torchrun would start
        return json.loads((folder / "1.json").read_text())

    monkeypatch.setattr(scaling, "launch", quicker)
    before = torch.get_num_threads()
    arguments = f"--case {CASE} --processes 1 2 --seconds 0.02 --rounds 1 --out {tmp_path}"
    try:
        assert scaling.main(arguments.split()) == 0
    finally:
        threads(before)
    (path,) = tmp_path.glob("cpu-*.json")
    found = json.loads(path.read_text())
    assert [(row["case"], row["processes"]) for row in found["rows"]] == [(CASE, 1), (CASE, 2)]
    assert found["steps"][CASE]["parameters"] == 1_761
    assert_whole(found)


def test_what_is_wrong_is_refused(monkeypatch):
    def wrong(processes, cases, budget, folder):
        for case in cases:
            torch.save(torch.full((4,), 1 + 1e-4 * processes), folder / f"{case}-{processes}.pt")
        return {}

    monkeypatch.setattr(scaling, "launch", wrong)
    with pytest.raises(ValueError, match=r"the gradient of 2 processes is wrong by 1e-04"):
        scaling.measure([CASE], (1, 2), 0.01, 1, 2)
    with pytest.raises(ValueError, match=r"processes is \[2, 4\]; wanted are 1, then 2"):
        scaling.measure([CASE], (2, 4), 0.01, 1, 2)


def test_the_committed_figures():
    files = sorted(scaling.RESULTS.glob("*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text())
        assert_whole(found)
        assert list(found["steps"]) == list(scaling.CASES)
        assert [row["processes"] for row in found["rows"]] == [1, 2, 4] * len(scaling.CASES)
    assert tuple(dict.fromkeys(scaling.CASES)) == scaling.CASES
