"""Launches of the attend kernel: what it sums, how its work is cut, and its outputs.

T tasks, N support rows, M query rows, S inner steps; F features of queries and keys, O of values.
`kernels/attend_kernel.py` says what is computed, and how chunks of keys lie in memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton

from .attend_kernel import COUNTS, STEPS, attend_kernel
from .launch import Launch

if TYPE_CHECKING:
    from torch import Tensor

PASSES = ("forward", "backward", "tangent", "tangent_backward")
POINTERS = ("base", "bias", "kept", "t_z", "dx", "add", "out", "extra", "rates")
SEGMENTS = ("m_query", "m_key", "m_value", "a_query", "a_key", "a_value")


@dataclass(frozen=True)
class Config:
    """How the work is cut: rows, keys, and features of q and of v at a time."""

    rows: int
    keys: int
    features: int
    width: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Sizes:
    """T, rows, F, O, and the most keys that a sum has."""

    tasks: int
    rows: int
    features: int
    width: int
    keys: int


def default_config(sizes: Sizes) -> Config:
    """Tiles that fit the registers, as compiled for sm_90; nothing was timed yet.

    Widths that are no multiples of 16 take more registers: an address for each number.
    """
    if not sizes.keys:  # no products: a tile of any shape
        width = min(256, triton.next_power_of_2(sizes.width))
        return Config(2048 // width, 16, 16, width, 4, 1)
    aligned = sizes.features % 16 == 0 and sizes.width % 16 == 0
    width = max(16, triton.next_power_of_2(sizes.width))
    keys = 16 if sizes.keys <= 16 else 32
    if sizes.rows <= 16:
        width = min(width, 256 if aligned else 64)
        return Config(16, keys, 16 if width == 256 else 32, width, 4, 2)
    if sizes.rows <= 32:
        if aligned and width >= 128:
            return Config(32, keys, 32, 128, 8, 2)
        return Config(32, keys if aligned else 16, 32, min(width, 64), 4, 2)
    if aligned:
        return Config(64, keys, 16, min(width, 128), 8, 2)
    return Config(64, 16, 16, min(width, 64), 8, 2)


@dataclass(frozen=True)
class Segment:
    """One of the two sums: rows of this task, and the keys and values of its chunks."""

    query: Tensor  # [T, rows, F]; where `key` is None, the Gram block itself
    key: Tensor | None
    value: Tensor
    keys: int


@dataclass(frozen=True)
class Terms:
    """All that is summed before the activation, for [T, rows, O] numbers."""

    base: Tensor | None
    bias: Tensor | None = None  # [O]
    moved: Segment | None = None
    adjoint: Segment | None = None
    rates: Tensor | None = None  # [2, S] of weight and bias; None: 1, and the bias stands still
    step: int = 0
    first: int = 0
    step_rows: int = 0  # N
    query_rows: int = 0  # M
    support_keys: int = 0  # S N; 0 where the adjoint has no chunks before the query's
    gram_stride: int = 0

    @property
    def is_base(self) -> bool:
        """Whether there is nothing to add."""
        return self.bias is None and self.moved is None and self.adjoint is None


@functools.lru_cache(maxsize=1024)
def describe(
    kind: str,
    ops: tuple[Any, ...],
    given: frozenset[str],
    sizes: Sizes,
    precision: str,
    config: Config | None = None,
) -> Launch:
    """The launch of one pass; `given` are the names of the tensors that there are."""
    assert kind in PASSES
    cut = config or default_config(sizes)
    constants: dict[str, Any] = {name: None for name in (*POINTERS, *SEGMENTS) if name not in given}
    constants |= dict(PASS=kind, OPS=ops, PRECISION=precision)
    constants |= dict(BLOCK_R=cut.rows, BLOCK_K=cut.keys, BLOCK_F=cut.features, BLOCK_O=cut.width)
    signature = {name: "*fp32" for name in (*POINTERS, *SEGMENTS) if name in given}
    signature |= dict.fromkeys((*COUNTS, *STEPS), "i32")
    for name, size in (("features", sizes.features), ("width", sizes.width)):
        if size == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if size % 16 else "i32:16"
    signature |= dict.fromkeys(constants, "constexpr")
    grid = sizes.tasks * triton.cdiv(sizes.rows, cut.rows) * triton.cdiv(sizes.width, cut.width)
    sums = "+".join(name for name in SEGMENTS if name in given and not name.endswith("value"))
    others = "+".join(name for name in POINTERS if name in given and name not in ("out", "rates"))
    activation = "+".join(op[0] for op in ops)
    shape = f"{sizes.rows}x{sizes.keys}x{sizes.features}x{sizes.width}"
    name = f"attend {kind} [{sums}] [{others}] [{activation}] {shape} {precision}"
    return Launch(name, attend_kernel, signature, constants, cut.warps, cut.stages, (grid,))


def attend(
    kind: str,
    terms: Terms,
    ops: tuple[Any, ...],
    out: Tensor,
    precision: str,
    *,
    kept: Tensor | None = None,
    t_z: Tensor | None = None,
    dx: Tensor | None = None,
    add: Tensor | None = None,
    extra: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write one pass's result to `out`, [T, rows, O], and what stood before the activation to
    `extra`. All tensors are contiguous but Gram blocks, whose rows are `gram_stride` apart."""
    tasks, rows, width = out.shape
    moved, adjoint = terms.moved, terms.adjoint
    features = 1
    if moved is None and adjoint is None:
        tasks, rows = 1, tasks * rows
    tensors = dict(base=terms.base, bias=terms.bias, kept=kept, t_z=t_z, dx=dx, add=add)
    tensors |= dict(out=out, extra=extra, rates=terms.rates)
    for mark, segment in (("m", moved), ("a", adjoint)):
        if segment is not None:
            tensors[f"{mark}_query"], tensors[f"{mark}_key"] = segment.query, segment.key
            tensors[f"{mark}_value"] = segment.value
            if segment.key is not None:
                features = segment.query.shape[-1]
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    m_keys, a_keys = (0 if s is None else s.keys for s in (moved, adjoint))
    sizes = Sizes(tasks, rows, features, width, max(m_keys, a_keys))
    launch = describe(kind, ops, frozenset(given), sizes, precision, config)
    counts = dict(
        tasks=tasks,
        rows=rows,
        step_rows=terms.step_rows,
        query_rows=terms.query_rows,
        support_keys=terms.support_keys,
        gram_stride=terms.gram_stride,
        rate_stride=0 if terms.rates is None else terms.rates.stride(0),
        m_keys=m_keys,
        a_keys=a_keys,
        first=terms.first,
        step=terms.step,
        features=features,
        width=width,
    )
    arguments = {**launch.constants, **given, **counts}
    launch.kernel[launch.grid](
        **arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
