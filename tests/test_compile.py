"""The kernels compiled for GPUs that are not here, by a tool in a process of its own: this one may
run Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled_cases import SOME
from tests.compiled_gates import TARGETS

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_tool(*arguments: str, path: Path = ROOT) -> tuple[int, dict, str]:
    """Exit status, findings by (name, target), standard error; path is where modules are, too."""
    # The interpreter cannot compile: the tool must not have it, whatever this process has.
    environment = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", "--json", *arguments],
        **dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600),
    )
    assert done.returncode in (0, 1), done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {(line["name"], line["target"]): line for line in lines}, done.stderr


@pytest.fixture(scope="module")
def findings():
    targets = [f"--target={target}" for target in TARGETS]
    return run_tool("--some", *targets)


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SOME)
def test_gates(findings, name, target) -> None:
    assert findings[1][name, target]["failures"] == []


@needs_triton
def test_nothing_else_is_wrong(findings) -> None:
    status, found, errors = findings
    assert len(found) == len(SOME) * len(TARGETS)
    assert status == 0, errors


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_a_product_has_the_instructions_that_it_must(findings, target) -> None:
    """The tool sees what is there: without this, a gate could pass on what it does not see."""
    once, exact = (findings[1][f"dot-{p}-16x64x64-4", target] for p in ("tf32", "tf32x3"))
    for finding, dots in ((once, 1), (exact, 3)):
        assert finding["dots"] == dots
        assert finding["counts"]["mma_tf32"] == dots * once["counts"]["mma_tf32"] > 0
        assert 16 < finding["registers"] <= 255
        assert finding["shared_bytes"] >= 64 * 64 * 4  # b
        assert finding["seconds"] > 0
        for kind in ("LDG", "STG", "LDS", "STS", "BAR"):
            assert finding["counts"][kind] > 0, kind
        assert finding["counts"]["total"] > 50
    fma = findings[1]["dot-ieee-16x16x16-1", target]
    kind, needed = ("mma_fp32", 4) if target == "gfx942" else ("FFMA", 16**3 // 32)
    assert fma["counts"][kind] == needed


# Each is wrong in one way, or right.
BROKEN = """
import multiprocessing
import os
import triton
import triton.language as tl
from maml_fast.kernels.launch import Launch
from tests.compiled_kernels import product

@triton.jit
def copy(x, y, stride, ROWS: tl.constexpr):
    N: tl.constexpr = ROWS[1][0]
    for i in tl.static_range(N):
        at = i * stride + tl.arange(0, ROWS[1][1])
        tl.store(y + at, tl.load(x + at))

@triton.jit
def coarse(x, PRECISION: tl.constexpr):
    at = x + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(at, tl.dot(tl.load(at), tl.load(at), input_precision="tf32"))

@triton.jit(do_not_specialize=["stride"])
def unspecialized(x, stride):
    tl.store(x + stride, 1.0)

@triton.jit
def undefined(x):
    tl.store(x, nothing)

@triton.jit
def deadly(x):
    tl.store(x, 1.0)

def case(name, kernel, signature, num_warps=1, **constants):
    return Launch(name, kernel, signature, constants, num_warps)

def launches():
    pointers = dict.fromkeys("abc", "*fp32")
    rows = {"x": "*fp32", "y": "*fp32"}
    all_of_them = [
        case("right", product, pointers, SHAPE=(16, 16, 16), PRECISION="tf32"),
        case("aligned", copy, {**rows, "stride": "i32:16"}, ROWS=(1, (2, 128))),
        case("unaligned", copy, {**rows, "stride": "i32"}, ROWS=(1, (2, 128))),
        case("wrong-spills", product, pointers, SHAPE=(128, 128, 16), PRECISION="tf32"),
        case("wrong-shared", product, pointers, 8, SHAPE=(64, 512, 128), PRECISION="tf32"),
        case("wrong-dots", coarse, {"x": "*fp32"}, PRECISION="ieee"),
        case("wrong-name", undefined, {"x": "*fp32"}),
        case("wrong-signature", copy, rows, ROWS=(1, (2, 128))),
        case("wrong-alignment", unspecialized, {"x": "*fp32", "stride": "i32:16"}),
        case("deadly", deadly, {"x": "*fp32"}),
    ]
    if os.environ.get("DEADLY") and multiprocessing.parent_process():
        os._exit(1)
    return all_of_them

SOME = ("right", "aligned", "unaligned", "deadly")
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken_cases.py").write_text(BROKEN, encoding="utf-8")
    (folder / "bounds.json").write_text("{}", encoding="utf-8")
    return folder


def run_broken(folder: Path, *arguments: str) -> tuple[int, dict, str]:
    options = ("--cases=broken_cases", f"--bounds={folder / 'bounds.json'}", "--processes=1")
    return run_tool(*options, *arguments, path=folder)


@needs_triton
def test_wrong_kernels_fail_and_right_ones_beside_them_do_not(broken) -> None:
    status, found, errors = run_broken(broken)
    assert status == 1
    failed = {name: " ".join(line["failures"]) for (name, _), line in found.items()}
    for name, message in {
        "wrong-spills": r"spill_bytes: ",
        "wrong-shared": "shared_bytes: ",
        "wrong-dots": "ieee: ",
        "wrong-name": "nothing is not defined",
        "wrong-signature": "the launch gives ['x', 'y', 'ROWS']",
        "wrong-alignment": "stride: i32:16 is not what a JIT would make of it",
    }.items():
        assert message in failed.pop(name)
        assert f"{name} sm_90: " in errors
    assert failed == dict.fromkeys(["right", "aligned", "unaligned", "deadly"], "")
    # The inner tuple was read, and what is aligned is loaded four at a time.
    loads = [found[name, "sm_90"]["counts"]["LDG"] for name in ("aligned", "unaligned")]
    assert loads == [2, 5]


@needs_triton
def test_a_process_that_dies_is_a_failure(broken, monkeypatch) -> None:
    monkeypatch.setenv("DEADLY", "1")
    status, found, _ = run_broken(broken, "--some", "right", "deadly")
    assert status == 1
    assert sorted(name for name, _ in found) == ["deadly", "right"]
    assert all("process died" in line["error"] for line in found.values())


@needs_triton
def test_recorded_bounds_hold_and_stale_ones_are_named(broken) -> None:
    bounds = broken / "bounds.json"
    assert run_broken(broken, "--record", "wrong-spills", "right")[0] == 0
    recorded = json.loads(bounds.read_text(encoding="utf-8"))
    assert list(recorded) == ["wrong-spills"]
    assert recorded["wrong-spills"]["sm_90"]["spill_bytes"] > 100
    assert run_broken(broken, "wrong-spills")[0] == 0
    bounds.write_text(json.dumps({"gone": {}}), encoding="utf-8")
    status, _, errors = run_broken(broken, "right")
    assert status == 1
    assert "gone: bounded, but no launch" in errors
    bounds.write_text("{}", encoding="utf-8")
