"""The whole meta-step of a small network in one launch: a program takes task after task.

    for k in 0 .. S     forward, loss, backward at theta_k; a step writes theta_{k+1} = theta_k -
                        eta D^T A, the query (k = S) writes Lam = D^T A
    for k in S-1 .. 0   Lam = Lam - H_k (eta Lam), from the tangents of forward and backward
    the program's sum of meta-gradients += Lam

A program's state lies in scratch memory of its own (fused_program.py says where) and stays in the
caches; registers hold one tile of a product at a time. Depth, widths, rows and steps are numbers in
memory, so one compiled kernel serves every network of these activations and this loss, and its code
does not grow with them. What a routine stored, other threads read in the next: each ends with a
barrier. Loops over scratch are not pipelined (num_stages=1): a prefetch would read what is not yet
written.

Dimensions: T tasks, N support rows, M query rows, S inner steps, L linear layers, I/O in and out
features of a layer, C of the network. A [n, I] a layer's input, Z [n, O] its output, Y = f(Z),
D [n, O] the cotangent of Z, dY that of Y, t_x the tangent of x, Lam the adjoint of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear import backward, forward, tangent, tangent_backward
from .network_loss import loss_pass, loss_tangent, put_outputs
from .table import FIELDS, add_gradients, copy_parameters, copy_rows, place, zero
from .weights import descend, pull_back, put_rate_gradients

# Numbers that differ from network to network, and tensors that may begin anywhere, as parts of
# others do, must not make kernels of their own.
NUMBERS = ("T", "N", "M", "S", "L", "C", "P", "support_scale", "query_scale")
ANYWHERE = (
    "support_x", "support_y", "query_x", "query_y", "layers", "addresses", "rates",
    "task_losses", "support_losses", "query_outputs", "gradients", "rate_gradients",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ANYWHERE)
def meta_step(
    support_x, support_y, query_x, query_y,  # [T, N, I0], [T, N, C] or classes [T, N]; and M
    layers,  # int32 [L, FIELDS]
    addresses,  # int64 [L, 2] of weight [O, I] and bias [O]; 0: none
    rates,  # [S + 1, L, 2] of weight and bias; the last -1
    scratch,  # [programs, program_size]
    task_losses, support_losses, query_outputs,  # [T], [T, S], [T, M, C]
    gradients,  # [programs, P]
    rate_gradients,  # [T, S, L, 2]
    T, N, M, S, L, C, P,
    support_scale, query_scale,  # of the loss: one over rows, or over rows and features
    program_size, theta_size, node_size, input_size,  # floats: of a program's scratch, of a copy of
    # the parameters, of the activations, of the data in it
    LOSS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,  # the different ones, each a chain as `pointwise` has it
    KEEPS_Z: tl.constexpr,
    CURVED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
    LEARNS: tl.constexpr,  # rates
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr,  # of a tile; whether a task has no more
    INNER: tl.constexpr,  # features summed at a time
    OUTER: tl.constexpr, ALL_OUTER: tl.constexpr,  # of a tile; whether no layer has more
    TALL: tl.constexpr,  # rows of a tile of weights
    CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    theta = scratch + program.to(tl.int64) * program_size
    lam = theta + (S + 1) * theta_size
    inputs = lam + theta_size  # support, query
    steps = inputs + 2 * input_size  # of each: Y, D, Z if kept, dY if curved
    kept: tl.constexpr = 2 + KEEPS_Z + CURVED
    tangents = steps + (S + 1) * kept * node_size  # t_Y, t_D, t_Z if curved
    gradients += program.to(tl.int64) * P
    copy_parameters(layers, addresses, theta, L, TALL, OUTER, ALL_OUTER)
    if GRADIENT:
        zero(gradients, P)
    programs = tl.num_programs(0)
    for turn in tl.range(0, tl.cdiv(T - program, programs), num_stages=1):
        t = program.to(tl.int64) + turn * programs
        width, stride = tl.load(layers), place(layers + 3)
        copy_rows(
            support_x + t * N * width, inputs, N, width, stride, ROWS, ALL_ROWS, OUTER, ALL_OUTER
        )
        copy_rows(
            query_x + t * M * width, inputs + input_size, M, width, stride,
            ROWS, ALL_ROWS, OUTER, ALL_OUTER,
        )  # fmt: skip
        tl.debug_barrier()
        for k in tl.range(0, S + 1, num_stages=1):
            n, x = N, inputs
            if k == S:
                n, x = M, inputs + input_size
            weights, y = theta + k * theta_size, steps + k * kept * node_size
            d, z = y + node_size, y + 2 * node_size
            dy = z + KEEPS_Z * node_size
            for l in tl.range(0, L, num_stages=1):
                forward(
                    layers + l * FIELDS, l == 0, weights, x, y, z, n,
                    ACTIVATIONS, KEEPS_Z, ROWS, ALL_ROWS, INNER, OUTER, ALL_OUTER, PRECISION,
                )  # fmt: skip
            last = layers + (L - 1) * FIELDS
            if k < S:
                loss = loss_pass(
                    last, support_y, t * N, y, d, z, dy, n, C, support_scale,
                    LOSS, ACTIVATIONS, CURVED, ROWS, ALL_ROWS, CLASSES,
                )  # fmt: skip
                tl.store(support_losses + t * S + k, loss)
            else:
                loss = loss_pass(
                    last, query_y, t * M, y, d, z, dy, n, C, query_scale,
                    LOSS, ACTIVATIONS, CURVED, ROWS, ALL_ROWS, CLASSES,
                )  # fmt: skip
                tl.store(task_losses + t, loss)
                put_outputs(last, y, query_outputs + t * M * C, n, C, ROWS, ALL_ROWS, CLASSES)
            if GRADIENT or k < S:
                for j in tl.range(0, L - 1, num_stages=1):
                    backward(
                        layers + (L - 1 - j) * FIELDS, weights, y, d, z, dy, n,
                        ACTIVATIONS, CURVED, ROWS, ALL_ROWS, INNER, OUTER, ALL_OUTER, PRECISION,
                    )  # fmt: skip
                for l in tl.range(0, L, num_stages=1):
                    target = weights + theta_size
                    if k == S:
                        target = lam
                    descend(
                        layers + l * FIELDS, l == 0, rates + (k * L + l) * 2, k < S,
                        weights, target, x, y, d, n,
                        ROWS, ALL_ROWS, TALL, OUTER, ALL_OUTER, PRECISION,
                    )  # fmt: skip
                tl.debug_barrier()
        if GRADIENT:
            if SECOND_ORDER or LEARNS:
                for j in tl.range(0, S, num_stages=1):
                    k = S - 1 - j
                    weights, y = theta + k * theta_size, steps + k * kept * node_size
                    d, z = y + node_size, y + 2 * node_size
                    dy = z + KEEPS_Z * node_size
                    t_y, t_d = tangents, tangents + node_size
                    t_z = t_d + node_size
                    if LEARNS:
                        for l in tl.range(0, L, num_stages=1):
                            put_rate_gradients(
                                layers + l * FIELDS, l == 0,
                                rate_gradients + ((t * S + k) * L + l) * 2,
                                lam, inputs, y, d, N,
                                ROWS, ALL_ROWS, TALL, OUTER, ALL_OUTER, PRECISION,
                            )  # fmt: skip
                    if SECOND_ORDER:
                        for l in tl.range(0, L, num_stages=1):
                            tangent(
                                layers + l * FIELDS, l == 0, rates + (k * L + l) * 2,
                                weights, lam, inputs, y, z, t_y, t_z, N,
                                ACTIVATIONS, CURVED,
                                ROWS, ALL_ROWS, INNER, OUTER, ALL_OUTER, PRECISION,
                            )  # fmt: skip
                        loss_tangent(
                            layers + (L - 1) * FIELDS, support_y, t * N, y, z, dy, t_y, t_z, t_d,
                            N, C, support_scale, LOSS, ACTIVATIONS, CURVED, ROWS, ALL_ROWS, CLASSES,
                        )  # fmt: skip
                        for i in tl.range(0, L - 1, num_stages=1):
                            l = L - 1 - i
                            tangent_backward(
                                layers + l * FIELDS, rates + (k * L + l) * 2, weights, lam,
                                y, d, z, dy, t_z, t_d, N,
                                ACTIVATIONS, CURVED,
                                ROWS, ALL_ROWS, INNER, OUTER, ALL_OUTER, PRECISION,
                            )  # fmt: skip
                        for l in tl.range(0, L, num_stages=1):
                            pull_back(
                                layers + l * FIELDS, l == 0, lam, inputs, y, d, t_y, t_d, N,
                                ROWS, ALL_ROWS, TALL, OUTER, ALL_OUTER, PRECISION,
                            )  # fmt: skip
                        tl.debug_barrier()
            for l in tl.range(0, L, num_stages=1):
                add_gradients(layers + l * FIELDS, lam, gradients, TALL, OUTER, ALL_OUTER)
            tl.debug_barrier()
