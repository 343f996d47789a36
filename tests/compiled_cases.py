"""The launches that ``python -m tests.compiled`` compiles, and the few that the tests do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maml_fast.kernels.launch import Launch

# One of each precision and number of warps, in little time.
SOME = (
    "dot-tf32x3-16x16x16-1",
    "dot-ieee-16x16x16-1",
    "dot-tf32-16x64x64-4",
    "dot-tf32x3-16x64x64-4",
    "dot-bf16-16x64x64-8",
    "dot-tf32x3-64x64x64-4",
    "dot-bf16-64x64x64-4",
)


def launches() -> list[Launch]:
    """All of them. Imports Triton, which is why nothing is imported above: whether it interprets
    is settled by then."""
    from maml_fast.kernels.launch import Launch
    from tests.compiled_kernels import product

    shapes = [((16, 16, 16), (1,)), ((16, 64, 64), (1, 4, 8)), ((64, 64, 64), (4,))]
    return [
        Launch(
            name=f"dot-{precision}-{'x'.join(map(str, shape))}-{num_warps}",
            kernel=product,
            signature={"a": "*fp32", "b": "*fp32", "c": "*fp32"},
            constants={"SHAPE": shape, "PRECISION": precision},
            num_warps=num_warps,
        )
        for shape, warps in shapes
        for num_warps in warps
        for precision in ("tf32x3", "ieee", "tf32", "bf16")
    ]
