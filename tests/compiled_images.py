"""Launches of the kernels of convolutional networks, at the sizes of networks they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maml_fast.kernels.launch import Launch


def launches() -> list[Launch]:
    """Imports Triton."""
    return _convolutions() + _norms()


def _convolutions() -> list[Launch]:
    from maml_fast.kernels import conv

    def one(kind, geometry, *given, precision="tf32x3"):
        sizes = conv.Geometry(*geometry)
        return conv.describe(kind, frozenset(("out", *given)), 32, sizes, precision)

    def all_products(geometry, precision="tf32x3"):
        first, second = ("x", "weight"), ("x2", "weight2")
        return [
            one("forward", geometry, *first, "partials", precision=precision),
            one("forward", geometry, *first, *second, "bias", precision=precision),
            one("backward", geometry, *first, precision=precision),
            one("backward", geometry, *first, *second, precision=precision),
            one("outer", geometry, "x", "d", "base", precision=precision),
            one("outer", geometry, "x", "d", "x2", "d2", "base", "bias", "bias_out",
                precision=precision),
        ]  # fmt: skip

    # images, height, width, C, K, kernel, stride, padding: Conv4-64 with pools, and by strides
    found = all_products((5, 14, 14, 64, 64, 3, 1, 1))
    found += all_products((5, 3, 3, 64, 64, 3, 1, 1))
    found += all_products((5, 14, 14, 64, 64, 3, 2, 1))
    found += all_products((5, 42, 42, 32, 32, 3, 1, 1))
    found += all_products((5, 14, 14, 128, 256, 1, 1, 0))
    found += all_products((5, 14, 14, 20, 40, 3, 1, 1))  # channels that are no multiples of 16
    for precision in ("ieee", "tf32", "bf16"):
        found += all_products((5, 14, 14, 64, 64, 3, 1, 1), precision)
    for channels, size, filters, stride in ((1, 28, 64, 1), (3, 84, 32, 1), (1, 28, 64, 2)):
        first = (5, size, size, channels, filters, 3, stride, 1)
        found += [
            one("forward", first, "x", "weight", "partials"),
            one("forward", first, "x2", "weight2", "bias"),
            one("outer", first, "x", "d", "base"),
        ]
    return found


def _norms() -> list[Launch]:
    from maml_fast.kernels import norm

    own, known = ("gamma", "beta"), ("x", "stats")
    back = (*known, *own, "dy")
    bent = (*back, "t_x", "t_stats", "t_dy", "lam", "lam_b")

    def all_passes(sizes, how, ops, pool, group_size=1):
        shape = norm.Shape(*sizes, how, ops, pool, group_size)
        code = ("code",) if pool else ()

        def one(kernel, kind, *given, by_group=False):
            names = frozenset((*given, "out" if kernel == "apply" else "partials"))
            return norm.describe(kernel, kind, names, 32, shape, by_group)

        by_groups = (False, True) if how == "rows" else (False,)
        found = [
            one("apply", "forward", *known, *own, *code),
            one("apply", "backward", *back, *code, "sums"),
            one("apply", "tangent", *known, *own, *code, "t_x", "t_stats", "lam", "lam_b"),
            one("apply", "tangent_backward", *bent, *code, "sums", "t_sums"),
            one("sum", "forward", "x", by_group=how == "rows"),
            one("sum", "tangent", *known, "t_x", by_group=how == "rows"),
        ]
        for by_group in by_groups:
            found.append(one("sum", "backward", *back, *code, by_group=by_group))
            found.append(one("sum", "tangent_backward", *bent, *code, by_group=by_group))
        return found

    relu, silu = (("relu",),), (("silu",),)
    found = all_passes((5, 28, 28, 64), "batch", relu, True)
    found += all_passes((5, 14, 14, 64), "batch", relu, False)
    found += all_passes((5, 84, 84, 32), "batch", silu, True)
    found += all_passes((20, 1, 1, 256), "batch", relu, False)
    found += all_passes((5, 7, 5, 20), "batch", (("gelu",),), True)  # no multiple of 16
    found += all_passes((5, 14, 14, 64), "rows", relu, False, 16)
    found += all_passes((20, 1, 1, 256), "rows", silu, False, 256)
    alone = norm.Shape(5, 28, 28, 64, "none", relu, True)
    for kind, given in (
        ("forward", ("x", "code")),
        ("backward", ("x", "code", "dy")),
        ("tangent", ("x", "code", "t_x")),
        ("tangent_backward", ("x", "code", "dy", "t_x", "t_dy")),
    ):
        found.append(norm.describe("apply", kind, frozenset(("out", *given)), 32, alone))
    steps = ("w", "w_out", "b", "b_out")
    for forward, given in ((True, ("totals",)), (False, ("totals", *steps)), (False, steps)):
        found.append(norm.describe_total(forward, frozenset(("partials", *given)), 32, 64))
    return found
