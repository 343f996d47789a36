"""What the Triton kernels are expected to cost: worked out, not measured.

The fused kernel by its tiles: counts of machine instructions, read off the code that Triton 3.7
makes for sm_90, and the time a chain of dependent ones takes. The layer kernels by operations,
bytes and launches. Numbers below marked * are guesses of what a GPU reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maml_fast.cost import Cost, LayerUse, cost_of

ITERATION = 55  # instructions of a warp around the products of one tile
PRODUCT = 115  # and in them, for 16 rows, 16 features summed and 32 of the result
CALL = 300  # around the tiles of one layer in one pass
STALL = 3.5  # * cycles that a lone warp takes for an instruction
ISSUE = 4  # instructions a cycle of a multiprocessor
WARPS = 8  # at 255 registers a thread that a multiprocessor holds
FLOPS, SMALL_FLOPS = 60e12, 15e12  # * a second, of large products and of small ones
BYTES = 3e12  # * a second
LAUNCH = 3e-6  # * seconds of a small kernel in a graph
PASSES = 2.5  # * times that rows of activations go to memory and back in a pass


def fused_seconds(
    uses: Sequence[LayerUse], tasks: int, tiles: Any, multiprocessors: int, clock: float
) -> float:
    """Of a meta-step: the larger of what all programs issue and what one waits for.

    tiles: a `kernels.fused_program.Tiles`.
    """
    warps = tiles.num_warps
    units = tiles.rows / 16 * tiles.inner / 16 * tiles.outer / 32
    iteration = ITERATION + PRODUCT * units / warps  # of one warp
    instructions = 0.0
    for use in uses:
        support, query = (math.ceil(n / tiles.rows) for n in (use.rows, use.query_rows))
        by_rows = math.ceil(use.in_features / tiles.inner) * math.ceil(
            use.out_features / tiles.outer
        )
        by_columns = math.ceil(use.out_features / tiles.inner) * math.ceil(
            use.in_features / tiles.outer
        )
        steps = use.inner_steps
        passes = 2 if use.first else 3  # forward, backward, outer product
        tangents = 2 if use.first else 6
        counts = (steps * support + query) * passes
        counts += 0 if use.first_order else steps * support * tangents
        instructions += counts * (by_rows + by_columns) / 2 * iteration
        calls = (steps + 1) * passes + (0 if use.first_order else steps * passes)
        instructions += calls * CALL
    resident = max(1, WARPS // warps) * multiprocessors
    issued = tasks * instructions * warps / (ISSUE * multiprocessors)
    waited = math.ceil(tasks / resident) * instructions * STALL
    return max(issued, waited) / clock


def layers_seconds(uses: Sequence[LayerUse], forms: Sequence[str], tasks: int) -> float:
    """Of a meta-step by layer kernels."""
    seconds = 0.0
    for use, form in zip(uses, forms, strict=True):
        seconds += tasks * device_seconds(cost_of(use, form, 4))
        passes = 2 * (use.inner_steps + 1) + (0 if use.first_order else 2 * use.inner_steps)
        rows = max(use.rows, use.query_rows) * (use.in_features + use.out_features)
        seconds += passes * (3 * LAUNCH + tasks * PASSES * rows * 4 / BYTES)
    return seconds


def device_seconds(cost: Cost) -> float:
    """Of one task's linear layer among many."""
    return cost.shared_flops / FLOPS + cost.small_flops / SMALL_FLOPS + cost.weight_bytes / BYTES


def choose_form(use: LayerUse, fast_weights: str) -> str:
    """The form of a layer's fast weights, "factored" or "dense", for the layer kernels."""
    if fast_weights != "auto":
        return fast_weights
    if use.in_features <= 4 or use.out_features <= 8:
        # A Gram block of so thin a layer costs many times the layer.
        return "dense"
    forms = ("factored", "dense")
    return min(forms, key=lambda form: device_seconds(cost_of(use, form, 4)))
