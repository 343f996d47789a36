"""What the Triton kernels are expected to cost: worked out, not measured.

The fused kernel by its tiles: counts of machine instructions, read off the code that Triton 3.7
makes for sm_90, and the time a chain of dependent ones takes. The layer kernels by operations,
bytes and launches. Numbers below marked * are guesses of what a GPU reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maml_fast.cost import LayerUse, cost_of

CALL = 170  # instructions of a warp around the tiles of a layer in one pass
TILE = 5.0  # and for each number of a thread's in a tile of the result
VECTOR = 300  # of a layer with one feature on either side, in one pass
ITERATION = 50  # around the products of a tile
PRODUCT = 118  # and in them, for 16 rows, 16 features summed and 32 of the result
OUTER_TILE, OUTER = 100, 9.0  # of a tile of a weight's gradient, and for each number of a thread's
STALL = 3.0  # * cycles that a lone warp takes for an instruction
ISSUE = 4  # instructions a cycle of a multiprocessor
WARPS = 8  # at 255 registers a thread that a multiprocessor holds
FLOPS, SMALL_FLOPS = 60e12, 15e12  # * a second, of large products and of small ones
LARGE_ROWS = 256  # * from which on a product is large
BYTES = 3e12  # * a second
LAUNCH = 3e-6  # * seconds of a small kernel in a graph
CACHE_SHARE = 0.7  # * of the L2 cache that rows of activations may fill
FEWEST = 4  # * multiprocessors to a task at most
PASSES = 2.5  # * times that rows of activations go to memory and back in a pass


def fused_seconds(
    uses: Sequence[LayerUse], tasks: int, tiles: Any, multiprocessors: int, clock: float
) -> float:
    """Of a meta-step: the larger of what all programs issue and what one waits for.

    tiles: a `kernels.fused_program.Tiles`.
    """
    warps = tiles.num_warps
    instructions = sum(_instructions(use, tiles) for use in uses)
    resident = max(1, WARPS // warps) * multiprocessors
    issued = tasks * instructions * warps / (ISSUE * multiprocessors)
    waited = math.ceil(tasks / resident) * instructions * STALL
    return max(issued, waited) / clock


def _instructions(use: LayerUse, tiles: Any) -> float:
    """Of one warp, for one layer of one task's meta-step."""
    steps, warps = use.inner_steps, tiles.num_warps
    down = 0 if use.first else 1  # products with the layer's weights on the way back
    second_order = 0 if use.first_order else steps
    if 1 in (use.in_features, use.out_features):
        return VECTOR * ((steps + 1) * (2 + down) + second_order * (2 + 2 * down))

    def tiles_of(features: int, rows: int) -> int:
        return math.ceil(features / tiles.outer) * math.ceil(rows / tiles.rows)

    threads = 32 * warps
    units = tiles.rows / 16 * tiles.inner / 16 * tiles.outer / 32 / warps
    iteration = ITERATION + PRODUCT * units

    def products(rows: int, count: int) -> float:
        """Passes with `count` products each."""
        into = math.ceil(use.in_features / tiles.inner) * tiles_of(use.out_features, rows)
        back = math.ceil(use.out_features / tiles.inner) * tiles_of(use.in_features, rows)
        found = tiles_of(use.out_features, rows) + down * tiles_of(use.in_features, rows)
        each = TILE * tiles.rows * tiles.outer / threads
        return CALL * (1 + down) + found * each + count * iteration * (into + down * back)

    outer_tiles = math.ceil(use.out_features / tiles.tall) * math.ceil(
        use.in_features / tiles.outer
    )
    outer = CALL + outer_tiles * (OUTER_TILE + OUTER * tiles.tall * tiles.outer / threads)
    total = steps * products(use.rows, 1) + products(use.query_rows, 1) + (steps + 1) * outer
    return total + second_order * (products(use.rows, 1 + down) + (1 + 0.45 * down) * outer)


def layers_seconds(
    uses: Sequence[LayerUse],
    forms: Sequence[str],
    numbers: Sequence[int],
    passes: int,
    tasks: int,
) -> float:
    """Of a meta-step by layer kernels.

    numbers: of a task's rows, before and behind each layer, norm and pool. passes: over all.
    """
    seconds = sum(tasks * device_seconds(use, form) for use, form in zip(uses, forms, strict=True))
    for moved in numbers:
        seconds += passes * (2 * LAUNCH + tasks * PASSES * moved * 4 / BYTES)
    return seconds


def wave(numbers: Sequence[int], multiprocessors: int, cache_bytes: int) -> int:
    """How many tasks of a network of images to take at a time: what a layer leaves should still be
    in the L2 cache when the next one reads it, and enough multiprocessors have a tile of a small
    image."""
    cached = int(CACHE_SHARE * cache_bytes) // (4 * max(numbers))
    return max(cached, multiprocessors // FEWEST)


def device_seconds(use: LayerUse, form: str) -> float:
    """Of one task's linear layer among many. Of many rows, a task's own product is a large one."""
    cost = cost_of(use, form, 4)
    share = min(1.0, use.rows / LARGE_ROWS) if form == "dense" else 0.0
    small = SMALL_FLOPS + share * (FLOPS - SMALL_FLOPS)
    return cost.shared_flops / FLOPS + cost.small_flops / small + cost.weight_bytes / BYTES


def choose_form(use: LayerUse, fast_weights: str) -> str:
    """The form of a layer's fast weights, "factored" or "dense", for the layer kernels."""
    if not use.factors:
        return "dense"
    if fast_weights != "auto":
        return fast_weights
    if use.in_features <= 4 or use.out_features <= 8:
        # A Gram block of so thin a layer costs many times the layer.
        return "dense"
    forms = ("factored", "dense")
    return min(forms, key=lambda form: device_seconds(use, form))
