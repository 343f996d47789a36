"""Reads what compilers print: ptxas' log, NVIDIA's machine code (SASS) and AMD's assembly."""

from __future__ import annotations

import re
from collections import Counter

# Kinds of instructions, by the beginning of their names; one may be of several kinds.
_NVIDIA = {
    "HGMMA": r"HGMMA\b",
    "HMMA": r"HMMA\b",
    "mma_tf32": r"HG?MMA\..*TF32",
    "mma_bf16": r"HG?MMA\..*BF16",
    "mma_other": r"(?!HG?MMA\..*(TF32|BF16))\w*MMA\b",
    "FFMA": r"FFMA",
    "LDG": r"LDG\b",
    "LDGSTS": r"LDGSTS|UTMALDG|UBLKCP",  # from global to shared memory, meanwhile
    "STG": r"STG\b",
    "LDS": r"LDSM?\b",
    "STS": r"STSM?\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "BAR": r"BAR\b",
    "total": r"(?!NOP\b)",
}
_AMD = {
    "MFMA": r"v_mfma_",
    "mma_tf32": r"v_mfma_f32_\w+_xf32",
    "mma_bf16": r"v_mfma_f32_\w+bf16",
    "mma_fp32": r"v_mfma_f32_\d+x\d+x\d+_(\d+b_)?f32",
    "mma_other": r"v_mfma_(?!f32_\w+(_xf32|bf16))(?!f32_\d+x\d+x\d+_(\d+b_)?f32)",
    "FFMA": r"v_(pk_)?fma\w*_f32",
    "LDG": r"(global|buffer|flat)_load(?!\w*_lds)",
    "LDGSTS": r"(global|buffer)_load\w*_lds",
    "STG": r"(global|buffer|flat)_store",
    "LDS": r"ds_(read|load)",
    "STS": r"ds_(write|store)",
    "LDL": r"scratch_load",
    "STL": r"scratch_store",
    "BAR": r"s_barrier",
    "total": r"(?!s_nop|s_code_end)",
}
# How an instruction's line begins, and the kinds there are.
_LANGUAGES = {
    "sass": (r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", _NVIDIA),
    "gfx": (r"\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)", _AMD),
    "ttir": (r"[^/]*?\b(tt\.dot)\b", {"dot": r"tt\.dot"}),
}


def instructions(code: str, language: str) -> dict[str, int]:
    """How many there are of each kind; the language is "sass", "gfx" or "ttir"."""
    line, kinds = _LANGUAGES[language]
    names = Counter(found[1] for found in map(re.compile(line).match, code.splitlines()) if found)
    return {
        kind: sum(n for name, n in names.items() if re.match(pattern, name))
        for kind, pattern in kinds.items()
    }


def ptxas_usage(log: str) -> tuple[int, int, int, int]:
    """Registers, bytes of stack, bytes of spills stored and loaded of a thread, from ptxas -v. A
    function that was not inlined adds its own."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    stack, stored, loaded = (
        [int(n) for n in re.findall(rf"(\d+) bytes {what}", log)]
        for what in ("stack frame", "spill stores", "spill loads")
    )
    if not (registers and stack and stored and loaded):
        raise ValueError(f"ptxas' log is not understood: {log!r}")
    return max(registers), sum(stack), sum(stored), sum(loaded)


def gfx_usage(assembly: str) -> tuple[int, int, int, int]:
    """The same of a lane, from the metadata at the end of AMD's assembly. It tells how many
    registers of 4 bytes are spilled, not how often: each is taken to be stored and loaded once.
    Scalar ones count too, although they go to vector registers and not to memory."""

    def number(name: str) -> int:
        (found,) = re.findall(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        return int(found)

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return number("vgpr_count"), number("private_segment_fixed_size"), spilled, spilled
