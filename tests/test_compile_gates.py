"""The gates of compiled kernels, on findings made up, and the reading of what compilers print."""

import dataclasses

import pytest

from tests.compiled_gates import Finding, failures, recorded
from tests.machine_code import gfx_usage, instructions, ptxas_usage

GOOD = Finding(
    "f",
    "sm_90",
    "tf32x3",
    **dict(dots=3, registers=64, shared_bytes=1024, counts={"mma_tf32": 12, "FFMA": 5}),
)


def changed(**changes) -> Finding:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("finding", "message"),
    [
        (changed(error="TypeError: no"), "does not compile: TypeError: no"),
        (changed(spill_load_bytes=4), "spill_bytes: 4, bound 0"),
        (changed(spill_store_bytes=4), "spill_bytes: 4, bound 0"),
        (changed(stack_bytes=8), "stack_bytes: 8, bound 0"),
        (changed(shared_bytes=232449), "shared_bytes: 232449, a block may have 232448"),
        (changed(target="sm_80", shared_bytes=166913), "shared_bytes: 166913"),
        (changed(target="gfx942", shared_bytes=65537), "shared_bytes: 65537"),
        (changed(counts={"FFMA": 5, "mma_bf16": 0}), "tf32x3: no mma_tf32"),
        (changed(counts={"mma_tf32": 12, "mma_bf16": 1}), "tf32x3: 1 mma_bf16"),
        (changed(precision="tf32", counts={"FFMA": 5}), "tf32: no mma_tf32"),
        (changed(precision="tf32", counts={"mma_tf32": 1, "mma_other": 2}), "tf32: 2 mma_other"),
        (changed(precision="bf16"), "bf16: no mma_bf16"),
        (changed(precision="ieee"), "ieee: 12 mma_tf32"),
        (changed(precision="ieee", counts={"LDG": 5}), "ieee: no FFMA or mma_fp32"),
        (changed(precision="ieee", counts={"FFMA": 5, "mma_bf16": 1}), "ieee: 1 mma_bf16"),
        (changed(precision=None), "has dots, but their precision is said to be None"),
        (changed(precision="tf32x4"), "has dots, but their precision is said to be tf32x4"),
    ],
)
def test_a_gate_fails(finding, message) -> None:
    (failure,) = failures(finding, {})
    assert failure.startswith(message)


@pytest.mark.parametrize(
    "finding",
    [
        GOOD,
        changed(shared_bytes=232448),
        changed(dots=0, counts={}),
        changed(dots=0, precision=None),
        changed(precision="bf16", counts={"mma_bf16": 1, "mma_tf32": 1}),  # finer than asked for
        changed(precision="ieee", counts={"FFMA": 1}),
        changed(precision="ieee", counts={"mma_fp32": 1}),
    ],
)
def test_gates_pass(finding) -> None:
    assert failures(finding, {}) == []


def test_bounds_are_those_of_the_launch_and_the_target() -> None:
    finding = changed(spill_load_bytes=8, spill_store_bytes=4, stack_bytes=16)
    enough = {"spill_bytes": 12, "stack_bytes": 16}
    assert failures(finding, {"f": {"sm_90": enough}}) == []
    assert len(failures(finding, {"f": {"sm_80": enough}})) == 2
    assert len(failures(finding, {"g": {"sm_90": enough}})) == 2
    tight = {"spill_bytes": 11, "stack_bytes": 16}
    failed = failures(finding, {"f": {"sm_90": tight}})
    assert failed == ["spill_bytes: 12, bound 11"]


def test_recording_replaces_what_was_compiled_and_drops_what_is_no_more() -> None:
    old = {name: {t: {"stack_bytes": 8} for t in ("sm_80", "sm_90")} for name in ("f", "g", "old")}
    spills = changed(name="h", spill_load_bytes=8)
    assert recorded(old, [GOOD, spills], ["f", "g", "h"]) == {
        "f": {"sm_80": {"stack_bytes": 8}},
        "g": old["g"],
        "h": {"sm_90": {"spill_bytes": 8}},
    }


PTXAS = """
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    432 bytes stack frame, 424 bytes spill stores, 608 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 432 bytes cumulative stack size
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR8][R4.64] ;  /* 0x0000000804087981 */
        /*0020*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;         /* 0x0000000804087981 */
        /*0030*/                   LDGSTS.E.128 [R1], desc[UR8] ;    /* 0x0000000804087981 */
        /*0040*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4] ;  /* 0x00 */
        /*0050*/                   HMMA.1688.F32.TF32 R4, R8, R6, R4 ;       /* 0x00 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;      /* 0x00 */
        /*0070*/                   HMMA.16816.F32 R4, R8, R6, R4 ;           /* 0x00 */
        /*0080*/                   LDSM.16.M88.4 R4, [R5] ;          /* 0x00 */
        /*10090*/                  BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x00 */
        /*100a0*/                  NOP;                              /* 0x00 */
"""
GFX = """
f:                                      ; @f
; %bb.0:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	global_load_dwordx4 v[0:3], v0, s[4:5]
	buffer_load_dword v0, s[4:7], 0 offen
	global_load_lds_dwordx4 v[0:1], off
	s_nop 0
	v_mfma_f32_16x16x8_xf32 a[0:3], v[0:1], v[2:3], 0
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0
	v_mfma_f32_32x32x8_bf16_1k a[0:3], v[0:1], v[2:3], 0
	v_mfma_f32_16x16x4_f32 a[0:3], v0, v1, 0
	v_mfma_f32_4x4x1_16b_f32 a[0:3], v0, v1, 0
	v_mfma_f32_16x16x16_f16 a[0:3], v0, v1, 0
	v_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[4:5]
	scratch_store_dword off, v0, off
	.private_segment_fixed_size: 40
	.sgpr_count:     20
	.sgpr_spill_count: 1
	.vgpr_count:     128
	.vgpr_spill_count: 2
"""


def test_what_the_compilers_print_is_read() -> None:
    assert ptxas_usage(PTXAS) == (255, 432, 424, 608)
    assert gfx_usage(GFX) == (128, 40, 12, 12)
    assert {kind: n for kind, n in instructions(SASS, "sass").items() if n} == dict(
        **dict(HGMMA=1, HMMA=3, mma_tf32=2, mma_bf16=1, mma_other=1, LDG=1, LDGSTS=2, LDS=1),
        **dict(BAR=1, total=10),
    )
    assert {kind: n for kind, n in instructions(GFX, "gfx").items() if n} == dict(
        **dict(MFMA=6, mma_tf32=1, mma_bf16=2, mma_fp32=2, mma_other=1, FFMA=1, LDG=2),
        **dict(LDGSTS=1, STL=1, total=12),
    )


def test_what_is_not_understood_is_no_zero() -> None:
    with pytest.raises(ValueError, match="is not understood"):
        ptxas_usage("ptxas info : 0 bytes gmem")
    with pytest.raises(ValueError, match="not enough values"):
        gfx_usage("")
