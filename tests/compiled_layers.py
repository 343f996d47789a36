"""Launches of the layer kernels, at the sizes of networks they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maml_fast.kernels.launch import Launch

RELU, TANH, SILU = (("relu",),), (("tanh",),), (("silu",),)
MOVED = ("rates", "m_query", "m_key", "m_value")
ADJOINT = ("rates", "a_query", "a_key", "a_value")


def launches() -> list[Launch]:
    """Imports Triton."""
    from maml_fast.kernels import attend, matmul

    def one(kind, ops, sizes, *given, precision="tf32x3"):
        names = frozenset(("out", *given))
        return attend.describe(kind, ops, names, attend.Sizes(*sizes), precision)

    def all_passes(sizes, ops=RELU, precision="tf32x3"):
        """With both sums, as after the first inner step."""
        curved = ops in (TANH, SILU)
        bent, extra = ("t_z", "dx") if curved else (), ("extra",) if curved else ()
        both = (*MOVED, *ADJOINT)
        return [
            one("forward", ops, sizes, "base", "bias", *MOVED, *extra, precision=precision),
            one("backward", ops, sizes, "base", "kept", *MOVED, *extra, precision=precision),
            one("tangent", ops, sizes, "base", "kept", *both, *extra, precision=precision),
            one("tangent_backward", ops, sizes, "base", "kept", *both, *bent, precision=precision),
        ]

    # T, rows, F, O, keys: 784-256-128-64-64-5 with N = M = 5, S = 5
    found = []
    for sizes in ((1024, 5, 256, 128, 30), (1024, 5, 128, 256, 30), (1024, 5, 64, 64, 16)):
        found += all_passes(sizes)
    found += all_passes((1024, 5, 64, 5, 30), ops=())
    # 2-256-256-256-3, N = M = 1024, S = 3
    found += all_passes((64, 1024, 256, 256, 5120), SILU)
    found += all_passes((128, 20, 100, 100, 60), TANH)
    for precision in ("ieee", "tf32", "bf16"):
        found += all_passes((1024, 5, 256, 128, 30), precision=precision)
    # the first layer, whose Gram blocks are given
    first = (1024, 5, 1, 256, 10)
    found += [
        one("forward", RELU, first, "base", "extra", "rates", "m_query", "m_value"),
        one("tangent", RELU, first, "kept", "rates", "a_query", "a_value"),
    ]
    # no sums: rows of all tasks
    alone = (1, 5120, 1, 256, 0)
    found += [
        one("forward", RELU, alone, "base", "bias"),
        one("backward", SILU, alone, "base", "kept", "extra"),
        one("tangent_backward", SILU, alone, "base", "kept", "t_z", "dx", "add"),
    ]
    for precision in ("tf32x3", "tf32", "bf16"):
        for shape, strides in (
            ((5120, 256, 784), (5120 * 784, 784, 1, 0, 1, 784, 5120 * 256, 256)),
            ((5120, 128, 256), (5120 * 256, 256, 1, 0, 128, 1, 5120 * 128, 128)),
            ((5120, 5, 64), (5120 * 64, 64, 1, 0, 1, 64, 5120 * 5, 5)),
        ):
            found.append(matmul.describe(1, shape, strides, frozenset(), precision))
    return found
