"""Normalisation, activation and 2x2 max pool of many tasks' images in one pass over them.

T tasks, N images of a task, P pixels of an image, C channels. x [T, N, P, C] lies channels last:
    xhat = r (x - m(x))    z = gamma xhat + beta    y = pool(f(z)),    r = 1 / sqrt(var(x) + eps)
where m is the mean over a channel's pixels in all images (NORM "batch"), or over the pixels and
channels of a group in one image ("rows"); without a norm z = x. P(v) = v - m(v) - xhat m(v xhat):
    dx = r P(u), u = gamma dz                    t_xhat = r P(t_x),  t_r = -r^2 m(t_x xhat)
    t_z = gamma t_xhat + t_gamma xhat + t_beta   t_u = gamma t_dz + t_gamma dz
    t_dx = t_r P(u) + r (t_u - m(t_u) - t_xhat m(u xhat) - xhat m(t_u xhat + u t_xhat))
dz comes from dy back through pool and f, and neither z nor dz is ever stored: they are found again
from x. Three kernels: `sum_kernel` leaves two sums of each of a task's parts, `total_kernel` (in
`reduce.py`) adds up the parts, and `apply_kernel` runs the pass.

pass                the two sums
forward             the mean of x, and the squares about it
backward            dz, dz xhat                  by channel: the gradients of beta and gamma
tangent             t_x, t_x xhat
tangent_backward    t_dz, t_dz xhat + dz t_xhat  by channel: their tangents
By group (BY_GROUP) u stands for dz. In batch norm m(u) is gamma times the mean of dz.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_tiles import (
    affine,
    group_of,
    kept_of,
    normal,
    pulled,
    scaled,
    t_normal,
    t_scaled,
    two,
    weighted,
)
from .pointwise import slope, value

# Numbers that change from layer to layer: no kernel for each of their values
COUNTS = ("tasks", "images", "height", "width")
NUMBERS = (*COUNTS, "splits", "split", "groups", "group_size", "gamma_task", "beta_task")


@triton.jit(do_not_specialize=list(NUMBERS))
def sum_kernel(
    x, t_x, dy, t_dy, code, gamma, beta, lam, lam_b,
    stats, t_stats,  # [2, T, size]: mean and r; the means of t_x and t_x xhat
    partials,  # [T, splits, 2, C], or by group [T, 1, 2, N * groups]
    tasks, images, height, width, channels, groups, group_size,
    splits, split,  # parts of a task's pixels, and pixels of each
    gamma_task, beta_task, rate, rate_b,
    PASS: tl.constexpr, NORM: tl.constexpr, OPS: tl.constexpr, POOL: tl.constexpr,
    BY_GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of a block of channels, or of a group of channels in one image."""
    program = tl.program_id(0)
    size = images * groups if NORM == "rows" else channels
    if BY_GROUP:
        of_task = program % (images * groups)
        task = (program // (images * groups)).to(tl.int64)
        begin = of_task // groups * (height * width)
        end = begin + height * width
        c_begin = of_task % groups * group_size
        c_end = c_begin + group_size
    else:
        blocks = tl.cdiv(channels, COLS)
        of_task = program // blocks % splits
        task = (program // (blocks * splits)).to(tl.int64)
        begin = of_task * split
        end = tl.minimum(begin + split, images * height * width)
        c_begin = program % blocks * COLS
        c_end = tl.minimum(c_begin + COLS, channels)
    first, second = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    if PASS == "forward":
        for start in range(begin, end, ROWS):
            for c_start in range(c_begin, c_end, COLS):
                row, c = start + tl.arange(0, ROWS), c_start + tl.arange(0, COLS)
                ok = (row < end)[:, None] & (c < c_end)[None, :]
                place = ((task * images * height * width + row) * channels)[:, None] + c[None, :]
                first += tl.load(x + place, mask=ok, other=0.0)
        count = ((end - begin) * (c_end - c_begin if BY_GROUP else 1)).to(tl.float32)
        third = tl.zeros([ROWS, COLS], tl.float32)
        mean = tl.sum(first, 0) / count
        if BY_GROUP:
            mean = tl.sum(mean, 0)
        for start in range(begin, end, ROWS):
            for c_start in range(c_begin, c_end, COLS):
                row, c = start + tl.arange(0, ROWS), c_start + tl.arange(0, COLS)
                ok = (row < end)[:, None] & (c < c_end)[None, :]
                place = ((task * images * height * width + row) * channels)[:, None] + c[None, :]
                apart = tl.load(x + place, mask=ok, other=0.0)
                if BY_GROUP:
                    apart -= mean
                else:
                    apart -= mean[None, :]
                apart = tl.where(ok, apart, 0.0)
                third += apart
                second += apart * apart
        rest = tl.sum(third, 0) / count  # of the mean, that its own rounding left
        if BY_GROUP:
            rest = tl.sum(rest, 0)
        mean += rest
    else:
        for start in range(begin, end, ROWS):
            for c_start in range(c_begin, c_end, COLS):
                row, c = start + tl.arange(0, ROWS), c_start + tl.arange(0, COLS)
                row_ok, c_ok = row < end, c < c_end
                if PASS == "tangent":
                    ok = row_ok[:, None] & c_ok[None, :]
                    place = (task * images * height * width + row) * channels
                    image = row // (height * width)
                    group, group_ok = group_of(image, row_ok, c, c_ok, groups, group_size, NORM)
                    x_tile = tl.load(x + (place[:, None] + c[None, :]), mask=ok, other=0.0)
                    xhat, _ = normal(x_tile, x, stats, task, tasks, size, group, group_ok, NORM)
                    v = tl.load(t_x + (place[:, None] + c[None, :]), mask=ok, other=0.0)
                    first += v
                    second += v * xhat
                else:
                    xhat, _, dz, t_xhat, t_dz = pulled(
                        x, t_x, dy, t_dy, code, gamma, beta, lam, lam_b, stats, t_stats,
                        task, row, row_ok, c, c_ok, tasks, images, height, width, channels, size,
                        groups, group_size, gamma_task, beta_task, rate, rate_b,
                        PASS == "tangent_backward", NORM, OPS, POOL,
                    )  # fmt: skip
                    u, t_u = dz, t_dz
                    if BY_GROUP:
                        u, t_u = weighted(
                            dz, t_dz, gamma, lam, task, gamma_task, channels, c, c_ok, rate
                        )
                    # Padding columns have an xhat, but no cotangent.
                    if PASS == "backward":
                        first += u
                        second += u * xhat
                    else:
                        first += t_u
                        second += t_u * xhat + u * t_xhat
        mean = tl.sum(first, 0)
        if BY_GROUP:
            mean = tl.sum(mean, 0)
    total = tl.sum(second, 0)
    if BY_GROUP:
        partials += task * 2 * images * groups + of_task
        tl.store(partials, mean)
        tl.store(partials + images * groups, tl.sum(total, 0))
    else:
        c = c_begin + tl.arange(0, COLS)
        partials += (task * splits + of_task) * 2 * channels + c
        tl.store(partials, mean, mask=c < c_end)
        tl.store(partials + channels, total, mask=c < c_end)


@triton.jit(do_not_specialize=list(NUMBERS))
def apply_kernel(
    x, t_x, dy, t_dy, code,  # code [T, N, P / 4, C]: which of four was the largest
    gamma, beta, lam, lam_b,  # [T, C] or [C]; the adjoints [T, C]
    stats, t_stats, sums, t_sums,  # [2, T, size], of the four passes
    out,
    tasks, images, height, width, channels, groups, group_size,
    gamma_task, beta_task, rate, rate_b,
    PASS: tl.constexpr, NORM: tl.constexpr, OPS: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of a task's pixels, and a block of channels."""
    program = tl.program_id(0)
    size = images * groups if NORM == "rows" else channels
    blocks = tl.cdiv(channels, COLS)
    c = program % blocks * COLS + tl.arange(0, COLS)
    c_ok = c < channels
    program = program // blocks
    down: tl.constexpr = POOL and (PASS == "forward" or PASS == "tangent")
    if down:
        high, wide = height // 2, width // 2
    else:
        high, wide = height, width
    rows = images * high * wide
    tiles = tl.cdiv(rows, ROWS)
    task = (program // tiles).to(tl.int64)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    ok = row_ok[:, None] & c_ok[None, :]
    image = row // (high * wide)
    group, group_ok = group_of(image, row_ok, c, c_ok, groups, group_size, NORM)
    to = ((task * rows + row) * channels)[:, None] + c[None, :]
    if PASS == "forward" or PASS == "tangent":
        x += task * images * height * width * channels
        pixel = row
        if POOL:
            h = (row - image * (high * wide)) // wide
            w = row - (image * high + h) * wide
            pixel = (image * height + 2 * h) * width + 2 * w
        at = (pixel.to(tl.int64) * channels)[:, None] + c[None, :]
    if PASS == "forward":
        best = tl.zeros([ROWS, COLS], tl.float32)
        largest = tl.zeros([ROWS, COLS], tl.int32)
        for i in tl.static_range(4 if POOL else 1):
            shift = (i // 2 * width + i % 2) * channels
            x_tile = tl.load(x + (at + shift), mask=ok, other=0.0)
            xhat, _ = normal(x_tile, x, stats, task, tasks, size, group, group_ok, NORM)
            y = value(scaled(xhat, gamma, beta, task, gamma_task, beta_task, c, c_ok), OPS)
            if i == 0:
                best = y
            else:
                better = (y > best) | (y != y)  # as torch has it: NaN is the largest
                best = tl.where(better, y, best)
                largest = tl.where(better, i, largest)
        tl.store(out + to, best, mask=ok)
        if POOL and code is not None:
            tl.store(code + to, largest.to(tl.int8), mask=ok)
    elif PASS == "tangent":
        if POOL:
            i = tl.load(code + to, mask=ok, other=0).to(tl.int32)
            at += (i // 2 * width + i % 2) * channels
        x_tile = tl.load(x + at, mask=ok, other=0.0)
        xhat, r = normal(x_tile, x, stats, task, tasks, size, group, group_ok, NORM)
        t_xhat = tl.zeros_like(x_tile)
        if t_x is not None:
            t_x += task * images * height * width * channels
            t_tile = tl.load(t_x + at, mask=ok, other=0.0)
            t_xhat = t_normal(t_tile, xhat, r, t_stats, task, tasks, size, group, group_ok, NORM)
        t_y = t_scaled(
            t_xhat, xhat, gamma, lam, lam_b, task, gamma_task, channels, c, c_ok, rate, rate_b
        )
        if len(OPS) > 0:
            z = scaled(xhat, gamma, beta, task, gamma_task, beta_task, c, c_ok)
            t_y *= slope(kept_of(z, OPS), OPS)
        tl.store(out + to, t_y, mask=ok)
    else:
        TANGENT: tl.constexpr = PASS == "tangent_backward"
        xhat, r, dz, t_xhat, t_dz = pulled(
            x, t_x, dy, t_dy, code, gamma, beta, lam, lam_b, stats, t_stats,
            task, row, row_ok, c, c_ok, tasks, images, height, width, channels, size, groups,
            group_size, gamma_task, beta_task, rate, rate_b, TANGENT, NORM, OPS, POOL,
        )  # fmt: skip
        found = t_dz if TANGENT else dz
        if NORM != "none":
            u, t_u = weighted(dz, t_dz, gamma, lam, task, gamma_task, channels, c, c_ok, rate)
            mean, mean_x = two(sums, task, tasks, size, group, group_ok)
            t_mean, t_mean_x = mean, mean_x
            if TANGENT:
                t_mean, t_mean_x = two(t_sums, task, tasks, size, group, group_ok)
            if NORM == "batch":  # sums of dz by channel, of which u's and t_u's are multiples
                share = 1.0 / rows.to(tl.float32)
                own = share
                if gamma is not None:
                    own = affine(gamma, task, gamma_task, c, c_ok) * share
                t_mean, t_mean_x = own * t_mean, own * t_mean_x
                if TANGENT and lam is not None:
                    more = rate * affine(lam, task, channels, c, c_ok) * share
                    t_mean += more * mean
                    t_mean_x += more * mean_x
                mean, mean_x = own * mean, own * mean_x
            projected = u - mean - xhat * mean_x
            if TANGENT:
                found = t_u - t_mean - t_xhat * mean_x - xhat * t_mean_x
                if t_x is not None:  # t_r, less one r
                    found -= r * two(t_stats, task, tasks, size, group, group_ok)[1] * projected
            else:
                found = projected
            found *= r
        tl.store(out + to, found, mask=ok)
