"""What is installed: the packages, their version, and the C++ extension where it can be built."""

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import maml_fast
from maml_fast import cpu_features

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def needs_extension() -> None:
    """Skips without the extension; fails if it could have been built and nobody turned it off."""
    if cpu_features.available():
        return
    reason = cpu_features.why_missing()
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++", "cl")), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if compiler and headers and "MAML_FAST_CPU=OFF" not in reason:
        pytest.fail(f"{compiler} and Python.h are here, but {reason}")
    pytest.skip(reason)


def test_the_checkout_is_what_is_tested() -> None:
    assert Path(maml_fast.__file__).resolve() == ROOT / "maml_fast" / "__init__.py"


def test_kernels_are_installed_inside_the_package() -> None:
    kernels = importlib.import_module("maml_fast.kernels")
    assert kernels.__name__ == "maml_fast.kernels"
    assert kernels.__file__ is not None
    assert Path(kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_nothing_else_is_installed_at_top_level() -> None:
    files = importlib.metadata.files("maml_fast")
    assert files
    # "..": the console script. An editable install also has a finder and the file that starts it.
    named = {file.parts[0] for file in files} - {"..", "__pycache__"}
    assert all("maml_fast" in name for name in named), named


def test_typed() -> None:
    assert (Path(maml_fast.__file__).parent / "py.typed").is_file()


def test_installed_version_is_that_of_pyproject() -> None:
    assert importlib.metadata.version("maml_fast") == PROJECT["version"]


def test_command_line_is_declared() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="maml-fast")
    assert callable(script.load())


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            name, version = text.split("==")
            pins[name] = version
    extras = PROJECT["optional-dependencies"].values()
    requirements = [
        Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group
    ]
    for requirement in requirements:
        if requirement.name != PROJECT["name"]:  # one extra may include another
            assert requirement.name in pins
            assert pins[requirement.name] in requirement.specifier, requirement


def test_extension_has_the_version_of_the_package() -> None:
    needs_extension()
    extension = importlib.import_module("maml_fast._cpu")
    assert extension.version() == importlib.metadata.version("maml_fast")


def test_instruction_sets() -> None:
    needs_extension()
    sets = cpu_features.instruction_sets()
    assert cpu_features.why_missing() == ""
    assert sets[0] == "baseline"
    assert sets in (
        ["baseline"],
        ["baseline", "avx2"],
        ["baseline", "avx2", "avx512"],
        ["baseline", "neon"],
    )
    if platform.machine().lower() in ("aarch64", "arm64"):
        assert sets[-1] == "neon"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="compares with /proc/cpuinfo of an x86 processor",
)
def test_instruction_sets_are_those_of_the_kernel() -> None:
    needs_extension()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    expected = ["baseline"]
    if {"avx2", "fma"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected.append("avx512")
    assert cpu_features.instruction_sets() == expected


@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("nm") is None, reason="needs c++ and nm"
)
def test_an_instruction_set_keeps_its_code_to_itself(tmp_path: Path) -> None:
    """Of a function that several objects have, the linker keeps one: none may be compiled with one
    instruction set and be found by code for another."""
    needs_extension()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    name, vector_bytes, registers = ("neon", 16, 32) if arm else ("avx2", 32, 16)
    object_file = tmp_path / "engine.o"
    subprocess.run(
        [
            *("c++", "-std=c++17", "-O2", "-Wno-psabi", *([] if arm else ["-mavx2", "-mfma"])),
            *(f"-DMAML_FAST_{key}" for key in (f"ISA={name}", f"VECTOR_BYTES={vector_bytes}")),
            *(f"-DMAML_FAST_REGISTERS={registers}", "-I", ROOT / "csrc"),
            *("-c", ROOT / "csrc" / "meta_step.cpp", "-o", object_file),
        ],
        check=True,
    )
    listed = subprocess.run(
        ["nm", "--demangle", object_file], check=True, capture_output=True, text=True
    ).stdout
    weak = [line.split(" W ")[1] for line in listed.splitlines() if " W " in line]
    assert len(weak) > 100
    assert [symbol for symbol in weak if f"maml_fast::{name}::" not in symbol] == []


def test_missing_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maml_fast, "__path__", [])  # no note of a build
    monkeypatch.setitem(sys.modules, "maml_fast._cpu", None)
    assert not cpu_features.available()
    assert cpu_features.instruction_sets() == []
    message = cpu_features.why_missing()
    assert "was not built: most likely no C++ compiler was found" in message
    assert "Install a C++17 compiler" in message
    assert "--force-reinstall" in message


def test_missing_extension_gives_the_reason_that_the_build_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_cpu_missing.txt").write_text(
        "the headers of this Python (Python.h) were not found\n"
    )
    monkeypatch.setattr(maml_fast, "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "maml_fast._cpu", None)
    assert (
        "was not built: the headers of this Python (Python.h) were not found."
        in cpu_features.why_missing()
    )


def test_extension_that_does_not_load_is_not_called_unbuilt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(MetaPathFinder):
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "maml_fast._cpu":
                raise ImportError("libstdc++.so.6: version not found")

    monkeypatch.delitem(sys.modules, "maml_fast._cpu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert not cpu_features.available()
    message = cpu_features.why_missing()
    assert "does not load: libstdc++.so.6: version not found" in message
    assert "was not built" not in message
