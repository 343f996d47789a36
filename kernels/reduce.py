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


@triton.jit(do_not_specialize=["tasks", "size", "splits", "split", "count", "w_task", "b_task"])
def total_kernel(
    partials, totals,  # [T, splits, 2, size], [2, T, size]
    w, w_out, b, b_out,  # w_out = w + scale times the second sum, b_out = b + scale_b the first
    tasks, size, splits, split,
    count,  # numbers of a statistic
    w_task, b_task, scale, scale_b,
    factor,  # of the totals
    eps,
    FORWARD: tl.constexpr,  # totals are the mean and r
    COLS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The two sums of a task's parts (see `norm_kernel.py`), for a block of its statistics."""
    program = tl.program_id(0)
    blocks = tl.cdiv(size, COLS)
    task = (program // blocks).to(tl.int64)
    c = program % blocks * COLS + tl.arange(0, COLS)
    c_ok = c < size
    partials += task * splits * 2 * size
    first, second = tl.zeros([SPLITS, COLS], tl.float32), tl.zeros([SPLITS, COLS], tl.float32)
    if FORWARD:
        base = tl.load(partials + c, mask=c_ok, other=0.0)
    for start in range(0, splits, SPLITS):
        i = start + tl.arange(0, SPLITS)
        ok = (i < splits)[:, None] & c_ok[None, :]
        at = partials + (i * 2 * size)[:, None] + c[None, :]
        v = tl.load(at, mask=ok, other=0.0)
        if FORWARD:  # the mean of a part, less the first's, times the part's numbers
            v = tl.where(ok, v - base[None, :], 0.0)
            v *= tl.minimum(count - i * split, split).to(tl.float32)[:, None]
        first += v
        second += tl.load(at + size, mask=ok, other=0.0)
    a = tl.sum(first, 0)
    if FORWARD:
        a = base + a / count.to(tl.float32)
        for start in range(0, splits, SPLITS):
            i = start + tl.arange(0, SPLITS)
            ok = (i < splits)[:, None] & c_ok[None, :]
            at = partials + (i * 2 * size)[:, None] + c[None, :]
            apart = tl.where(ok, tl.load(at, mask=ok, other=0.0) - a[None, :], 0.0)
            second += apart * apart * tl.minimum(count - i * split, split).to(tl.float32)[:, None]
        variance = tl.sum(second, 0) / count.to(tl.float32)
        q = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    else:
        q = tl.sum(second, 0)
        if w_out is not None:
            found = scale * q
            if w is not None:
                found += tl.load(w + task * w_task + c, mask=c_ok, other=0.0)
            tl.store(w_out + task * size + c, found, mask=c_ok)
        if b_out is not None:
            found = scale_b * a
            if b is not None:
                found += tl.load(b + task * b_task + c, mask=c_ok, other=0.0)
            tl.store(b_out + task * size + c, found, mask=c_ok)
        a *= factor
        q *= factor
    if totals is not None:
        at = totals + task * size + c
        tl.store(at, a, mask=c_ok)
        tl.store(at + tasks.to(tl.int64) * size, q, mask=c_ok)
