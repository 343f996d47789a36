"""Sums of what programs left, in a fixed order: the same bits each time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows", "columns"), do_not_specialize_on_alignment=("x", "out"))
def sum_rows(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [columns] = the sum over rows of x [rows, columns], ROWS at a time."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = x + row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    tl.store(out + column, total, mask=column < columns)
