"""What the norm kernels find of a tile of pixels; the formulas are in `norm_kernel.py`.

T tasks, N images of a task, P pixels of an image, C channels; x [T, N, P, C] lies channels last.
Tiles are [ROWS, COLS] of pixels and channels; `group` says which statistics their numbers have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import curve, is_curved, keeps_input, slope, value


@triton.jit
def affine(x, task, stride, c, c_ok):
    """A channel's number of this task: [1, COLS]"""
    return tl.load(x + task * stride + c, mask=c_ok, other=0.0)[None, :]


@triton.jit
def two(x, task, tasks, size, group, group_ok):
    """The two numbers of each statistic, from [2, T, size]"""
    at = x + task * size + group
    second = at + tasks.to(tl.int64) * size
    return tl.load(at, mask=group_ok, other=0.0), tl.load(second, mask=group_ok, other=0.0)


@triton.jit
def group_of(image, row_ok, c, c_ok, groups, group_size, NORM: tl.constexpr):
    """Which statistics belong to the numbers of a tile, and where: [1 or ROWS, COLS]"""
    if NORM == "rows":
        found = image[:, None] * groups + (c // group_size)[None, :]
        return found, row_ok[:, None] & c_ok[None, :]
    else:
        return c[None, :], c_ok[None, :]


@triton.jit
def normal(x_tile, x, stats, task, tasks, size, group, group_ok, NORM: tl.constexpr):
    """xhat and r"""
    if NORM == "none":
        return x_tile, x_tile
    else:
        mean, r = two(stats, task, tasks, size, group, group_ok)
        return (x_tile - mean) * r, r


@triton.jit
def t_normal(t_tile, xhat, r, t_stats, task, tasks, size, group, group_ok, NORM: tl.constexpr):
    """t_xhat"""
    if NORM == "none":
        return t_tile
    else:
        mean, mean_x = two(t_stats, task, tasks, size, group, group_ok)
        return r * (t_tile - mean - xhat * mean_x)


@triton.jit
def scaled(xhat, gamma, beta, task, gamma_task, beta_task, c, c_ok):
    """z"""
    z = xhat
    if gamma is not None:
        z *= affine(gamma, task, gamma_task, c, c_ok)
    if beta is not None:
        z += affine(beta, task, beta_task, c, c_ok)
    return z


@triton.jit
def t_scaled(
    t_xhat, xhat, gamma, lam, lam_b, task, gamma_task, channels, c, c_ok, rate, rate_b
):  # fmt: skip
    """t_z, in the direction of the adjoint times the rates"""
    t_z = t_xhat
    if gamma is not None:
        t_z *= affine(gamma, task, gamma_task, c, c_ok)
    if lam is not None:
        t_z += rate * affine(lam, task, channels, c, c_ok) * xhat
    if lam_b is not None:
        t_z += rate_b * affine(lam_b, task, channels, c, c_ok)
    return t_z


@triton.jit
def kept_of(z, OPS: tl.constexpr):
    """What f' and f'' are found from"""
    if keeps_input(OPS):
        return z
    else:
        return value(z, OPS)


@triton.jit
def unpooled(dy, code, task, images, image, h, w, height, width, channels, c, ok, POOL):
    """The cotangent behind f: of pooled images, at the pixel that was the largest."""
    if POOL:
        high, wide = height // 2, width // 2
        inside = ok & ((h < 2 * high) & (w < 2 * wide))[:, None]
        pixel = (image * high + h // 2) * wide + w // 2
        at = (task * images * high * wide + pixel) * channels
        place = at[:, None] + c[None, :]
        own = (h % 2 * 2 + w % 2)[:, None]
        hit = inside & (tl.load(code + place, mask=inside, other=0) == own)
        return tl.load(dy + place, mask=hit, other=0.0)
    else:
        at = (task * images * height * width + (image * height + h) * width + w) * channels
        return tl.load(dy + (at[:, None] + c[None, :]), mask=ok, other=0.0)


@triton.jit
def pulled(
    x, t_x, dy, t_dy, code, gamma, beta, lam, lam_b, stats, t_stats,
    task, row, row_ok, c, c_ok, tasks, images, height, width, channels, size, groups, group_size,
    gamma_task, beta_task, rate, rate_b,
    TANGENT: tl.constexpr, NORM: tl.constexpr, OPS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """xhat, r, dz, t_xhat and t_dz of a tile of pixels; the last two only of the tangent."""
    image = row // (height * width)
    pixel = row - image * (height * width)
    h = pixel // width
    w = pixel - h * width
    ok = row_ok[:, None] & c_ok[None, :]
    place = ((task * images * height * width + row) * channels)[:, None] + c[None, :]
    group, group_ok = group_of(image, row_ok, c, c_ok, groups, group_size, NORM)
    x_tile = tl.load(x + place, mask=ok, other=0.0)
    xhat, r = normal(x_tile, x, stats, task, tasks, size, group, group_ok, NORM)
    back = unpooled(dy, code, task, images, image, h, w, height, width, channels, c, ok, POOL)
    dz, t_xhat, t_dz = back, tl.zeros_like(x_tile), tl.zeros_like(x_tile)
    kept = x_tile
    if len(OPS) > 0:
        kept = kept_of(scaled(xhat, gamma, beta, task, gamma_task, beta_task, c, c_ok), OPS)
        dz = slope(kept, OPS) * back
    if TANGENT:
        if t_x is not None:
            t_tile = tl.load(t_x + place, mask=ok, other=0.0)
            t_xhat = t_normal(t_tile, xhat, r, t_stats, task, tasks, size, group, group_ok, NORM)
        t_dz = unpooled(t_dy, code, task, images, image, h, w, height, width, channels, c, ok, POOL)
        if len(OPS) > 0:
            t_dz *= slope(kept, OPS)
            if is_curved(OPS):
                t_z = t_scaled(
                    t_xhat, xhat, gamma, lam, lam_b, task, gamma_task, channels, c, c_ok,
                    rate, rate_b,
                )  # fmt: skip
                t_dz += curve(kept, OPS) * t_z * back
    # Nothing comes from behind the last pixel, whatever f does there.
    return xhat, r, tl.where(ok, dz, 0.0), t_xhat, tl.where(ok, t_dz, 0.0)


@triton.jit
def weighted(dz, t_dz, gamma, lam, task, gamma_task, channels, c, c_ok, rate):
    """u and t_u"""
    u, t_u = dz, t_dz
    if gamma is not None:
        weight = affine(gamma, task, gamma_task, c, c_ok)
        u, t_u = weight * dz, weight * t_dz
    if lam is not None:
        t_u += rate * affine(lam, task, channels, c, c_ok) * dz
    return u, t_u
