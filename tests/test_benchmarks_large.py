"""The benchmark of large task batches: what is wrong is refused, and the committed figures are
whole."""

import json

import pytest

from benchmarks import large
from maml_fast import MAML

pytestmark = pytest.mark.usefixtures("extension")


@pytest.mark.parametrize("implementation", large.TITLES)
def test_rows_are_checked_and_measured(implementation):
    row = large.measure(implementation, 200, rounds=1)
    assert row.median > 0
    assert row.error <= 1e-6
    assert row.results == (200 * (1 + 1 + 10) * 4 if implementation == "ours" else 0)


def test_a_wrong_gradient_is_refused(monkeypatch):
    right = large._ours

    def wrong(maml, data):
        step = right(maml, data)
        scale = 1 if maml.backend == "torch" else 1 + 1e-8
        return lambda: {name: g * scale for name, g in step().items()}

    monkeypatch.setattr(large, "_ours", wrong)
    with pytest.raises(ValueError, match="gradient of 50 tasks is off by 1"):
        large.measure("ours", 50, rounds=1)


def test_bits_that_depend_on_the_chunk_are_refused(monkeypatch):
    right = MAML._run

    def by_chunk(self, *arguments, **options):
        outcome = right(self, *arguments, **options)
        if self.chunk_size == 999:
            outcome.gradients.flat.mul_(1 + 1e-6)
        return outcome

    monkeypatch.setattr(MAML, "_run", by_chunk)
    with pytest.raises(ValueError, match="with chunk_size 999 the gradient of"):
        large.measure("ours", 50, rounds=1)


def test_a_process_that_fails_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="eager vmap.* with 0 tasks: .*tasks is 0"):
        large.measure_apart("vmap", 0, 1)


def test_the_committed_figures():
    files = sorted(large.RESULTS.glob("*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text())
        assert found["machine"]["cpu"]
        assert path.with_suffix(".png").exists()
        rows = [large.Row(**row) for row in found["rows"]]
        assert [row.tasks for row in rows if row.implementation == "ours"] == list(large.TASKS)
        assert all(row.error <= 1e-3 for row in rows)
        assert any(row.implementation == "vmap" for row in rows)


def test_the_plot(tmp_path):
    rows = [large.Row(name, t, 1e-6 * t, 1e-7, 0, 10**6) for name in large.TITLES for t in (10, 99)]
    described = {"cpu": "a processor", "cores": 2, "date": "2026-01-01T00:00"}
    large.plot(rows, described, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
