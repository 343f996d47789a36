"""What a compiled kernel is found to be, and what it must pass (see tests/compiled.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Shared memory that a block may have, in bytes.
TARGETS = {"sm_90": 227 * 1024, "sm_80": 163 * 1024, "gfx942": 64 * 1024}
BOUNDED = ("spill_bytes", "stack_bytes")
Bounds = dict[str, dict[str, dict[str, int]]]


@dataclass
class Finding:
    """What one launch became on one target; bytes of stack and spills are a thread's."""

    name: str
    target: str
    precision: str | None = None
    error: str = ""
    dots: int = 0
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # of instructions, by kind
    seconds: float = 0.0
    triton: str = ""

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


def failures(finding: Finding, bounds: Bounds) -> list[str]:
    """The gates that a finding does not pass, in words."""
    if finding.error:
        return [f"does not compile: {finding.error}"]
    failed = []
    bound = bounds.get(finding.name, {}).get(finding.target, {})
    for what in BOUNDED:
        if getattr(finding, what) > bound.get(what, 0):
            failed.append(f"{what}: {getattr(finding, what)}, bound {bound.get(what, 0)}")
    if finding.shared_bytes > TARGETS[finding.target]:
        limit = TARGETS[finding.target]
        failed.append(f"shared_bytes: {finding.shared_bytes}, a block may have {limit}")
    if finding.dots:
        failed += _wrong_dots(finding.precision, finding.counts)
    return failed


def _wrong_dots(precision: str | None, counts: Mapping[str, int]) -> list[str]:
    """The intended instructions are there, and none that is coarser."""
    wanted, coarser = {
        "tf32x3": (("mma_tf32",), ("mma_bf16", "mma_other")),
        "tf32": (("mma_tf32",), ("mma_bf16", "mma_other")),
        "bf16": (("mma_bf16",), ("mma_other",)),
        "ieee": (("FFMA", "mma_fp32"), ("mma_tf32", "mma_bf16", "mma_other")),
    }.get(precision or "", ((), ()))
    if not wanted:
        return [f"has dots, but their precision is said to be {precision}"]
    failed = [f"{precision}: {counts[kind]} {kind}" for kind in coarser if counts.get(kind)]
    if not any(counts.get(kind) for kind in wanted):
        failed.append(f"{precision}: no {' or '.join(wanted)}")
    return failed


def recorded(bounds: Bounds, findings: Sequence[Finding], names: Sequence[str]) -> Bounds:
    """The bounds with those of the findings replaced; launches that are no more are left out."""
    new = {name: dict(of_targets) for name, of_targets in bounds.items() if name in names}
    for finding in findings:
        of_targets = new.setdefault(finding.name, {})
        of_targets.pop(finding.target, None)
        bound = {what: getattr(finding, what) for what in BOUNDED if getattr(finding, what)}
        if bound:
            of_targets[finding.target] = bound
    return {name: dict(sorted(new[name].items())) for name in sorted(new) if new[name]}
