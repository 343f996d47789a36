"""The benchmark of the family: what is wrong is not timed, and the committed figures are whole."""

import json

import pytest
import torch

from benchmarks import family
from benchmarks.cases import named
from benchmarks.problem import load

pytestmark = pytest.mark.usefixtures("extension")
CASE = "omniglot-fc-T32-S1"


def test_variants_are_right_and_timed(monkeypatch):
    few = {name: family.VARIANTS[name] for name in ("MAML", "ANIL", "masked rows", "learned rates")}
    monkeypatch.setattr(family, "VARIANTS", few)
    rows = family.measure(CASE, rounds=1)
    assert [row.variant for row in rows] == list(few)
    assert all(row.backend == "cpu" and row.error <= 1e-9 for row in rows)
    assert all(row.median > 0 and row.loop > 0 for row in rows)
    assert rows[0].times_maml == 1


def test_what_is_wrong_is_refused(monkeypatch):
    right = family.step

    def wrong(maml, problem, weights):
        found = right(maml, problem, weights)
        if maml.backend == "auto":
            found["model.0.weight"] = found["model.0.weight"] * (1 + 1e-6)
        return found

    monkeypatch.setattr(family, "step", wrong)
    problem = load(named(CASE), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"MAML: the error of model\.0\.weight is 1\.0e-06"):
        family.error_of("MAML", problem)


def test_the_committed_figures():
    files = sorted(family.RESULTS.glob("*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text())
        assert found["machine"]["cpu"]
        by_case = {row["case"]: set() for row in found["rows"]}
        for row in found["rows"]:
            assert row["error"] <= 1e-9
            by_case[row["case"]].add(row["variant"])
        assert list(by_case) == list(family.CASES)
        assert all(names == set(family.VARIANTS) for names in by_case.values())
