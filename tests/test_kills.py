"""A run that is killed by SIGKILL, wherever it is, goes on to the bits of one never stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def killed(kind, folder):
    """What tests/killed_runs.py says of its kills, having compared the files."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", kind, folder / kind],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fifty_kills_at_random_moments(tmp_path):
    found = killed("sinusoid", tmp_path)
    assert found["killed"] == 50
    assert found["begun"] > 20


def test_a_kill_at_every_moment_of_the_files(tmp_path):
    """Before, in and behind each write, sync, link and renaming, and again in the next start."""
    found = killed("everywhere", tmp_path)
    assert found["killed"] > 80
    assert {"nothing", "at 0", "begun"} <= found.keys()


def test_kills_of_a_run_that_validates(tmp_path):
    """Between the checkpoint and the best one, too."""
    found = killed("images", tmp_path)
    assert found["killed"] > 30
    assert found["begun"] > 10
