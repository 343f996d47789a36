"""Small products of one task's rows with its earlier rows, and the activation behind them.

A factored layer's correction is attention without softmax, block-diagonal over tasks:
    out_i = base_i + bias + sum_j ((q_i . k_j) scale_j + shift_j) v_j
T tasks, N support rows, M query rows, S inner steps; q, k have F features, v and out have O. The
Gram block q k^T stays in registers. There are two sums; either may be absent, or both, and then
only the activation is left:

moved      the steps taken: keys of chunks 0, 1, ..; scale -eta of a chunk's step
adjoint    rows of Lam = sum_j sign_j left_j^T right_j: its chunks are step 0 .. S-1 of the support,
           the query, and step 0 .. S-1 again. Only the query's sign is +. Before step k is pulled
           back, steps k+1 .. S-1 and the query count; `first` is (k+1) N.
A chunk is [T, N, features] ([T, M, features] the query's), and chunks lie one behind the other: a
tensor written by one layer is the next one's input and its key, and nothing is copied.

forward            y = f(z)                       extra: z
backward           D = f' dX of the layer before   extra: dX
tangent            t_y = f' t_z                    extra: t_z
tangent_backward   t_D = f' t_dX + f'' t_z dX      added to what `add` has, if given
where z, dX, t_z, t_dX are out_i above, and f' and f'' are found from `kept`: y, or z.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dots import dot
from .pointwise import curve, slope, value

# Numbers that change from layer to layer, and from step to step: no kernel for each of their values
COUNTS = ("tasks", "rows", "step_rows", "query_rows", "support_keys", "gram_stride", "rate_stride")
STEPS = ("m_keys", "a_keys", "first", "step")


@triton.jit
def _gram(query, key, at, row_ok, source, key_ok, features, PRECISION, BLOCK_F: tl.constexpr):
    """q k^T of a tile of rows and a block of keys; `at` and `source` are their places in memory."""
    gram = tl.zeros([at.shape[0], source.shape[0]], tl.float32)
    for start in range(0, features, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        f_ok = f < features
        q_ok, k_ok = row_ok[:, None] & f_ok[None, :], f_ok[:, None] & key_ok[None, :]
        q = tl.load(query + (at[:, None] * features + f[None, :]), mask=q_ok, other=0.0)
        k = tl.load(key + (source[None, :] * features + f[:, None]), mask=k_ok, other=0.0)
        gram = dot(q, k, gram, PRECISION)
    return gram


@triton.jit(do_not_specialize=[*COUNTS, *STEPS])
def attend_kernel(
    base, bias, kept, t_z, dx, add, out, extra,  # [T, rows, O]; bias [O]
    rates,  # of weight and bias, [2, >= S]
    m_query, m_key, m_value,  # rows [T, rows, F], or without keys their Gram block [T, rows, N]
    a_query, a_key, a_value,  # the same, or a Gram block [T, rows, keys]
    tasks, rows, step_rows, query_rows, support_keys, gram_stride,
    m_keys, a_keys, first, rate_stride, step,
    features, width,  # F, O
    PASS: tl.constexpr, OPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of one task's rows, and one block of O."""
    program = tl.program_id(0)
    blocks, tiles = tl.cdiv(width, BLOCK_O), tl.cdiv(rows, BLOCK_R)
    tile = program // blocks
    task = (tile // tiles).to(tl.int64)
    row = tile % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    o = program % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    row_ok, o_ok = row < rows, o < width
    at = task * rows + row
    acc = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    if m_query is not None:
        for start in range(0, m_keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            key_ok = j < m_keys
            chunk = j // step_rows
            within = j - chunk * step_rows
            source = (chunk * tasks + task) * step_rows + within
            if m_key is None:
                ok = row_ok[:, None] & key_ok[None, :]
                gram = tl.load(m_query + (at[:, None] * gram_stride + within[None, :]), ok, 0.0)
            else:
                gram = _gram(
                    m_query, m_key, at, row_ok, source, key_ok, features, PRECISION, BLOCK_F
                )
            gram = gram * -tl.load(rates + chunk, key_ok, 0.0)[None, :]
            if PASS == "forward":
                gram -= tl.load(rates + (rate_stride + chunk), key_ok, 0.0)[None, :]
            v_ok = key_ok[:, None] & o_ok[None, :]
            v = tl.load(m_value + (source[:, None] * width + o[None, :]), mask=v_ok, other=0.0)
            acc = dot(gram, v, acc, PRECISION)
    if a_query is not None:
        query_end = support_keys + query_rows
        for start in range(0, a_keys, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            key_ok = j < a_keys
            j += first
            j = tl.where(j < query_end, j, j + first)
            queried = (j >= support_keys) & (j < query_end)
            begin = tl.where(queried, support_keys, tl.where(j < support_keys, 0, query_end))
            length = tl.where(queried, query_rows, step_rows)
            chunk = (j - begin) // length
            within = j - begin - chunk * length
            source = (begin + chunk.to(tl.int64) * length) * tasks + task * length + within
            if a_key is None:
                ok = row_ok[:, None] & key_ok[None, :]
                gram = tl.load(a_query + (at[:, None] * gram_stride + j[None, :]), ok, 0.0)
            else:
                gram = _gram(
                    a_query, a_key, at, row_ok, source, key_ok, features, PRECISION, BLOCK_F
                )
            sign = tl.where(queried, 1.0, -1.0)
            if rates is None:
                gram *= sign[None, :]
            else:
                gram *= (sign * tl.load(rates + step))[None, :]
                if PASS == "tangent":
                    shift = sign * tl.load(rates + (rate_stride + step))
                    if a_key is not None:  # rows beside -t_A move the weight alone
                        shift = tl.where(j < query_end, shift, 0.0)
                    gram += shift[None, :]
            v_ok = key_ok[:, None] & o_ok[None, :]
            v = tl.load(a_value + (source[:, None] * width + o[None, :]), mask=v_ok, other=0.0)
            acc = dot(gram, v, acc, PRECISION)
    place = at[:, None] * width + o[None, :]
    ok = row_ok[:, None] & o_ok[None, :]
    if base is not None:
        acc += tl.load(base + place, mask=ok, other=0.0)
    if bias is not None:
        acc += tl.load(bias + o, mask=o_ok, other=0.0)[None, :]
    if extra is not None:
        tl.store(extra + place, acc, mask=ok)
    if PASS == "forward":
        acc = value(acc, OPS)
    elif kept is not None:
        known = tl.load(kept + place, mask=ok, other=0.0)
        acc *= slope(known, OPS)
        if dx is not None:
            bent = tl.load(t_z + place, mask=ok, other=0.0)
            acc += curve(known, OPS) * bent * tl.load(dx + place, mask=ok, other=0.0)
    if add is not None:
        acc += tl.load(add + place, mask=ok, other=0.0)
    tl.store(out + place, acc, mask=ok)
