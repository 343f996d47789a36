"""Convolutions of many tasks' images as products of tiles; no patch is ever stored.

T tasks, N images of a task, C/K in and out channels. Images lie channels last, [T, N, height,
width, channels]; weights [T, taps, C, K], taps in rows of the kernel, or [taps, C, K] for all tasks
(a stride of 0). Three products, of a task's own:
forward    z_p = sum_{i,c} x_{s p + i - padding, c} W_i         rows are pixels of z, sums over C
backward   dx_q = sum_{i: s p + i - padding = q} D_p W_i^T      rows are pixels of x, sums over K
outer      g_i = sum_p x_{s p + i - padding} D_p^T              rows are taps and channels
where s is the stride. Each takes two pairs at once, as tangents are of that form:
t_z = conv(t_x, W) + conv(x, eta Lam). Fewer than 16 channels are summed with the taps as one axis
(FOLD), so that nothing is padded 16-fold. With a stride, pixels of x that the same taps reach make
tiles of their own: those whose coordinates leave the same rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dots import dot

# Numbers that change from layer to layer: no kernel for each of their values
COUNTS = ("images", "height", "width", "out_height", "out_width")
STRIDES = ("w_task", "w2_task", "bias_task")


@triton.jit
def _source(row, height, width, channels, out_height, out_width, first_h, first_w, STEP):
    """Where the pixels of tile rows meet a kernel's first tap: coordinates, and place in memory."""
    image = row // (out_height * out_width)
    pixel = row - image * (out_height * out_width)
    h = pixel // out_width
    w = (pixel - h * out_width) * STEP + first_w
    h = h * STEP + first_h
    return h, w, ((image * height + h) * width + w).to(tl.int64) * channels


@triton.jit
def _convolved(
    acc, x, weight, h, w, at, row_ok, o, o_ok,
    height, width, channels, w_tap, w_in, w_out,
    tap_h, tap_w, taps_h, taps_w,  # the first tap, and how many each way
    BACKWARD: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """acc + the sum over taps and channels, for a tile of pixels and a block of out channels."""
    sign: tl.constexpr = -1 if BACKWARD else 1
    apart: tl.constexpr = STRIDE if BACKWARD else 1
    if FOLD:
        summed = taps_h * taps_w * channels
        for start in range(0, summed, BLOCK_C):
            k = start + tl.arange(0, BLOCK_C)
            tap = k // channels
            c = k - tap * channels
            i = tap // tl.maximum(taps_w, 1)  # the division may run ahead of the loop
            j = tap - i * taps_w
            source_h, source_w = h[:, None] + (sign * i)[None, :], w[:, None] + (sign * j)[None, :]
            ok = row_ok[:, None] & (k < summed)[None, :]
            ok = ok & (source_h >= 0) & (source_h < height) & (source_w >= 0) & (source_w < width)
            shift = sign * (i * width + j) * channels + c
            x_tile = tl.load(x + (at[:, None] + shift[None, :]), mask=ok, other=0.0)
            place = ((tap_h + apart * i) * KERNEL + tap_w + apart * j) * w_tap + c * w_in
            w_ok = (k < summed)[:, None] & o_ok[None, :]
            w_tile = tl.load(weight + (place[:, None] + (o * w_out)[None, :]), w_ok, 0.0)
            acc = dot(x_tile, w_tile, acc, PRECISION)
    else:
        blocks = tl.cdiv(channels, BLOCK_C)
        for block in range(taps_h * taps_w * blocks):
            tap = block // blocks
            i = tap // tl.maximum(taps_w, 1)  # the division may run ahead of the loop
            j = tap - i * taps_w
            c = (block - tap * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
            c_ok = c < channels
            source_h, source_w = h + sign * i, w + sign * j
            ok = row_ok & (source_h >= 0) & (source_h < height)
            ok = ok & (source_w >= 0) & (source_w < width)
            shift = sign * (i * width + j) * channels + c
            x_ok = ok[:, None] & c_ok[None, :]
            x_tile = tl.load(x + (at[:, None] + shift[None, :]), mask=x_ok, other=0.0)
            place = ((tap_h + apart * i) * KERNEL + tap_w + apart * j) * w_tap + c * w_in
            w_ok = c_ok[:, None] & o_ok[None, :]
            w_tile = tl.load(weight + (place[:, None] + (o * w_out)[None, :]), w_ok, 0.0)
            acc = dot(x_tile, w_tile, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES])
def conv_kernel(
    x, weight, x2, weight2,  # out = x weight + scale x2 weight2 + bias_scale bias; x may be absent
    bias, out,
    partials,  # [T, tiles, 2, K], of each tile its rows' mean and sum of squares about it; or None
    images, height, width, channels,  # of x
    out_height, out_width, out_channels,
    w_task, w2_task, bias_task,  # strides from task to task
    scale, bias_scale,
    BACKWARD: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of a task's pixels, forward or backward, and a block of out channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    o = program % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    program = program // blocks
    if BACKWARD and STRIDE > 1:
        # The tile's pixels have coordinates STRIDE apart; `rest` is what they leave.
        high, wide = tl.cdiv(out_height, STRIDE), tl.cdiv(out_width, STRIDE)
        tiles = tl.cdiv(images * high * wide, BLOCK_R)
        kind = program // tiles % (STRIDE * STRIDE)
        rest_h, rest_w = kind // STRIDE, kind % STRIDE
        task = (program // (tiles * STRIDE * STRIDE)).to(tl.int64)
        tap_h, tap_w = (rest_h + PADDING) % STRIDE, (rest_w + PADDING) % STRIDE
        taps_h, taps_w = (
            (KERNEL - tap_h + STRIDE - 1) // STRIDE,
            (KERNEL - tap_w + STRIDE - 1) // STRIDE,
        )
        first_h, first_w = (rest_h + PADDING) // STRIDE, (rest_w + PADDING) // STRIDE
    else:
        high, wide = out_height, out_width
        tiles = tl.cdiv(images * high * wide, BLOCK_R)
        task = (program // tiles).to(tl.int64)
        rest_h, rest_w, tap_h, tap_w = 0, 0, 0, 0
        taps_h, taps_w = KERNEL, KERNEL
        first_h = PADDING if BACKWARD else -PADDING
        first_w = first_h
    tile = program % tiles
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < images * high * wide
    step: tl.constexpr = 1 if BACKWARD else STRIDE
    h, w, at = _source(row, height, width, channels, high, wide, first_h, first_w, step)
    at += task * images * height * width * channels
    w_tap = channels * out_channels
    if BACKWARD:
        w_in, w_out = 1, channels
    else:
        w_in, w_out = out_channels, 1
    acc = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    if x2 is not None:
        acc = _convolved(
            acc, x2, weight2 + task * w2_task, h, w, at, row_ok, o, o_ok,
            height, width, channels, w_tap, w_in, w_out, tap_h, tap_w, taps_h, taps_w,
            BACKWARD, KERNEL, STRIDE, FOLD, PRECISION, BLOCK_C,
        )  # fmt: skip
        acc *= scale
    if x is not None:
        acc = _convolved(
            acc, x, weight + task * w_task, h, w, at, row_ok, o, o_ok,
            height, width, channels, w_tap, w_in, w_out, tap_h, tap_w, taps_h, taps_w,
            BACKWARD, KERNEL, STRIDE, FOLD, PRECISION, BLOCK_C,
        )  # fmt: skip
    if bias is not None:
        acc += bias_scale * tl.load(bias + task * bias_task + o, mask=o_ok, other=0.0)[None, :]
    if BACKWARD and STRIDE > 1:
        image = row // (high * wide)
        pixel = row - image * (high * wide)
        out_h = pixel // wide * STRIDE + rest_h
        out_w = pixel % wide * STRIDE + rest_w
        row_ok = row_ok & (out_h < out_height) & (out_w < out_width)
        row = (image * out_height + out_h) * out_width + out_w
    place = (task * images * out_height * out_width + row) * out_channels
    ok = row_ok[:, None] & o_ok[None, :]
    tl.store(out + (place[:, None] + o[None, :]), acc, mask=ok)
    if partials is not None:
        count = tl.minimum(images * high * wide - tile * BLOCK_R, BLOCK_R).to(tl.float32)
        mean = tl.sum(tl.where(ok, acc, 0.0), 0) / count
        apart = tl.where(ok, acc - mean[None, :], 0.0)
        rest = tl.sum(apart, 0) / count  # what the mean was off by, where it is large
        mean += rest
        squares = tl.sum(apart * apart, 0) - count * rest * rest
        partials += (task * tiles + tile) * 2 * out_channels + o
        tl.store(partials, mean, mask=o_ok)
        tl.store(partials + out_channels, squares, mask=o_ok)


@triton.jit
def _outer(
    acc, x, d, m, m_ok, tap, c, o, o_ok,
    images, height, width, channels, out_height, out_width, out_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + the sum over a task's pixels, for a block of taps' channels and one of out channels;
    `tap` is one tap, or one of each channel in the block."""
    i = tap // KERNEL
    j = tap - i * KERNEL
    shift = (i * width + j) * channels + c
    rows = images * out_height * out_width
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        row_ok = row < rows
        h, w, at = _source(
            row, height, width, channels, out_height, out_width, -PADDING, -PADDING, STRIDE
        )
        source_h, source_w = h[:, None] + i, w[:, None] + j
        ok = row_ok[:, None] & (source_h >= 0) & (source_h < height)
        ok = ok & (source_w >= 0) & (source_w < width) & m_ok[None, :]
        x_tile = tl.load(x + (at[:, None] + shift[None, :]), mask=ok, other=0.0)
        d_ok = row_ok[:, None] & o_ok[None, :]
        place = row.to(tl.int64) * out_channels
        d_tile = tl.load(d + (place[:, None] + o[None, :]), mask=d_ok, other=0.0)
        acc = dot(tl.trans(x_tile), d_tile, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES])
def outer_kernel(
    x, d, x2, d2,  # g = outer(x, d) + outer(x2, d2); the bias's are the sums of d over pixels
    base, bias, out, bias_out,  # out = base + scale g; base and bias may be absent
    images, height, width, channels,  # of x
    out_height, out_width, out_channels,
    w_task, bias_task,  # strides of base and bias from task to task
    scale, bias_scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of a task's weights, [taps * C] by [K]."""
    program = tl.program_id(0)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    o = program % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    program = program // blocks
    if FOLD:
        down = tl.cdiv(KERNEL * KERNEL * channels, BLOCK_M)
        block = program % down
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = m < KERNEL * KERNEL * channels
        tap = m // channels
        c = m - tap * channels
    else:
        across = tl.cdiv(channels, BLOCK_M)
        down = KERNEL * KERNEL * across
        block = program % down
        tap = block // across
        c = block % across * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = c < channels
        m = tap * channels + c
    task = (program // down).to(tl.int64)
    x_task = task * images * height * width * channels
    d_task = task * images * out_height * out_width * out_channels
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    acc = _outer(
        acc, x + x_task, d + d_task, m, m_ok, tap, c, o, o_ok,
        images, height, width, channels, out_height, out_width, out_channels,
        KERNEL, STRIDE, PADDING, PRECISION, BLOCK_R,
    )  # fmt: skip
    if x2 is not None:
        acc = _outer(
            acc, x2 + x_task, d2 + d_task, m, m_ok, tap, c, o, o_ok,
            images, height, width, channels, out_height, out_width, out_channels,
            KERNEL, STRIDE, PADDING, PRECISION, BLOCK_R,
        )  # fmt: skip
    acc *= scale
    ok = m_ok[:, None] & o_ok[None, :]
    place = m[:, None] * out_channels + o[None, :]
    if base is not None:
        acc += tl.load(base + task * w_task + place, mask=ok, other=0.0)
    size = KERNEL * KERNEL * channels * out_channels
    tl.store(out + task * size + place, acc, mask=ok)
    if bias_out is not None:
        if block == 0:
            rows = images * out_height * out_width
            total = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
            for start in range(0, rows, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)
                d_ok = (row < rows)[:, None] & o_ok[None, :]
                at = d_task + row.to(tl.int64) * out_channels
                total += tl.load(d + (at[:, None] + o[None, :]), mask=d_ok, other=0.0)
            found = bias_scale * tl.sum(total, 0)
            if bias is not None:
                found += tl.load(bias + task * bias_task + o, mask=o_ok, other=0.0)
            tl.store(bias_out + task * out_channels + o, found, mask=o_ok)
