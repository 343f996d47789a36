"""Compiles the Triton kernels for GPUs that are not here, and says what became of them.

    python -m tests.compiled [--target sm_90] [--some] [PATTERN ...]

Each launch of ``tests/compiled_cases.py`` must pass three gates: no more spills and stack than
``tests/compiled_bounds.json`` records for it (none, where it does not; the bounds are those of the
Triton in constraints.txt), dots that became the instructions of their precision, and shared memory
within a block's limit. Exits with 1 if one fails.

Nothing above main() imports Triton, which decides at its import whether it interprets.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.compiled_gates import TARGETS, Bounds, Finding, failures, recorded
from tests.machine_code import gfx_usage, instructions, ptxas_usage

if TYPE_CHECKING:
    from maml_fast.kernels.launch import Launch

BOUNDS = Path(__file__).with_name("compiled_bounds.json")


def compile_launch(launch: Launch, target: str) -> Finding:
    """Compiles anew, in this process; what goes wrong is in the finding."""
    import triton

    precision = launch.constants.get("PRECISION")
    finding = Finding(launch.name, target, precision, triton=triton.__version__)
    start = time.perf_counter()
    try:
        _compile(launch, finding)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the innermost says what is wrong
            cause = cause.__cause__
        finding.error = f"{type(cause).__name__}: {cause}"
    finding.seconds = finding.seconds or round(time.perf_counter() - start, 2)
    return finding


def _compile(launch: Launch, finding: Finding) -> None:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise TypeError(f"{launch.kernel} is no JITFunction: unset TRITON_INTERPRET")
    nvidia = finding.target.startswith("sm_")
    arch = int(finding.target[3:]) if nvidia else finding.target
    target = GPUTarget("cuda", arch, 32) if nvidia else GPUTarget("hip", arch, 64)
    signature, constants, attributes = _arguments(launch, target)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder  # a cached kernel would have no log and take no time
        knobs.nvidia.dump_ptxas_log = True
        start = time.perf_counter()
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=target,
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
        finding.seconds = round(time.perf_counter() - start, 2)
        if nvidia:
            cubin = Path(folder, "cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
            code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            usage = ptxas_usage(log.getvalue())
        else:
            code = compiled.asm["amdgcn"]
            usage = gfx_usage(code)
    finding.registers, finding.stack_bytes = usage[:2]
    finding.spill_store_bytes, finding.spill_load_bytes = usage[2:]
    finding.shared_bytes = compiled.metadata.shared
    finding.dots = instructions(compiled.asm["ttir"], "ttir").get("dot", 0)
    finding.counts = instructions(code, "sass" if nvidia else "gfx")
    if not finding.counts.get("total"):
        raise ValueError("no machine code was recognized")


def _arguments(launch: Launch, target: Any) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a launch, as the JIT would make them."""
    from triton.compiler.compiler import make_backend

    names = launch.kernel.arg_names
    signature = {**launch.signature, **dict.fromkeys(launch.constants, "constexpr")}
    constexpr = {name for name, kind in signature.items() if kind == "constexpr"}
    if set(names) != set(signature) or constexpr != set(launch.constants):
        raise ValueError(
            f"the kernel takes {names}, the launch gives {list(signature)} "
            f"and values for {list(launch.constants)}"
        )
    # D: a multiple of 16; S: within 2 GiB, which only AMD's backend looks at
    backend, attributes = make_backend(target), {}
    for i, param in enumerate(launch.kernel.params):
        kind, _, multiple = signature[param.name].partition(":")
        signature[param.name] = kind
        aligned = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if multiple and (multiple != "16" or not aligned):
            raise ValueError(f"{param.name}: {kind}:{multiple} is not what a JIT would make of it")
        if aligned and (kind.startswith("*") or multiple):
            attributes[i,] = backend.parse_attr("DS" if kind.startswith("*") else "D")
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    return {name: signature[name] for name in names}, constants, attributes


def _compile_named(cases: str, name: str, target: str) -> Finding:
    """A worker's part: kernels do not travel between processes, names do."""
    return compile_launch(_launches(cases)[name], target)


def _launches(cases: str) -> dict[str, Launch]:
    launches = importlib.import_module(cases).launches()
    by_name = {launch.name: launch for launch in launches}
    if len(by_name) < len(launches):
        raise ValueError("two launches have the same name")
    return by_name


def compile_all(cases: str, jobs: Sequence[tuple[str, str]], processes: int) -> Iterator[Finding]:
    """The findings of (name, target), in the order in which they come."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        started = {pool.submit(_compile_named, cases, *job): job for job in jobs}
        for future in as_completed(started):
            try:
                yield future.result()
            except BrokenProcessPool:
                error = "the compiler's process died at this launch or at one beside or before it"
                yield Finding(*started[future], error=error)


def table(findings: Sequence[Finding]) -> str:
    kinds = ["mma_tf32", "mma_bf16", "mma_fp32", "HGMMA", "FFMA", "LDG", "LDGSTS", "STG"]
    kinds += ["LDS", "STS", "LDL", "STL", "BAR", "total"]
    rows = [["launch", "target", "reg", "stack", "spill", "shared", *kinds, "s"]]
    for f in sorted(findings, key=lambda f: (f.target, f.name)):
        numbers = [f.registers, f.stack_bytes, f.spill_bytes, f.shared_bytes]
        numbers += [f.counts.get(kind, 0) for kind in kinds]
        rows.append([f.name, f.target, *map(str, numbers), f"{f.seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compiled", description=__doc__)
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="names of launches, with * and ?")
    add("--target", action="append", choices=TARGETS, help="may be repeated [sm_90]")
    add("--some", action="store_true", help="the few that the tests compile")
    add("--json", action="store_true", help="a line for each finding, in place of a table")
    add("--record", action="store_true", help="write the bounds anew, from what is compiled")
    add("--bounds", type=Path, default=BOUNDS, metavar="FILE")
    add("--cases", default="tests.compiled_cases", metavar="MODULE", help="[%(default)s]")
    add("--processes", type=int, default=2, metavar="N", help="[%(default)s]")
    options = parser.parse_args(argv)

    os.environ.pop("TRITON_INTERPRET", None)
    names = list(_launches(options.cases))
    chosen = importlib.import_module(options.cases).SOME if options.some else names
    patterns = options.patterns or ["*"]
    chosen = [n for n in chosen if any(fnmatchcase(n, pattern) for pattern in patterns)]
    if not chosen or not set(chosen) <= set(names):
        parser.error(f"of {chosen or patterns} not all are among the launches {names}")
    bounds: Bounds = json.loads(options.bounds.read_text(encoding="utf-8"))

    findings, failed = [], {}
    jobs = [(name, target) for target in options.target or ["sm_90"] for name in chosen]
    for finding in compile_all(options.cases, jobs, options.processes):
        findings.append(finding)
        if options.record and not finding.error:
            bounds = recorded(bounds, [finding], names)
        failed[finding.name, finding.target] = failures(finding, bounds)
        if options.json:
            line = {**asdict(finding), "failures": failed[finding.name, finding.target]}
            print(json.dumps(line), flush=True)
    if options.record:
        options.bounds.write_text(json.dumps(bounds, indent=2) + "\n", encoding="utf-8")
    if not options.json:
        print(table(findings))
    stale = sorted(set(bounds) - set(names))
    messages = [f"{name}: bounded, but no launch" for name in stale]
    messages += [f"{' '.join(job)}: {text}" for job, texts in failed.items() for text in texts]
    print(*messages, sep="\n", end="\n" if messages else "", file=sys.stderr)
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
