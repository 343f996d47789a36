"""What a meta-step costs backend "cpu", and from it the layout and each layer's form of weights.

Layouts (csrc/lanes.h): "tasks_in_lanes", L tasks a tile, a row of each in a vector; and
"rows_in_lanes", one task a tile, L of its rows in a vector. A task's own numbers (its weights, the
rows of earlier steps) are vectors in the first and plain numbers in the second.

The unit is a cycle of one core that does two vector multiply-adds in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maml_fast.cost import LayerUse, once_cost

LAYOUTS = ("tasks_in_lanes", "rows_in_lanes")

STORE = 1.5  # cycles to begin, scale, add to and store one vector of a result
CACHE_BYTES = 512 << 10  # what a tile's weights may take before they come from further away
NEAR, FAR = 32.0, 10.0  # bytes a cycle from there, and from further away
TURN = 4.0  # cycles a vector to turn rows of numbers into rows of features
SUM = 3.0  # cycles a vector to sum its lanes
# A norm's cycles a vector: forward and backward together, and their tangents; and beside them a
# feature, a pass. Norms of a row's features make their gradients' sums in passes of their own.
NORM_OF_ROWS, NORM_OF_FEATURES, NORM_FEATURE = (12.0, 16.0), (16.0, 32.0), 10.0
FEW_COLUMNS = {1: 0.5, 2: 0.75}  # of the multiply-adds are done where a product has so few columns
TILE = 4000.0  # cycles of a tile beside its layers: data in and out, losses
# Threads that a few large tiles are assumed to run on. Not those there are: the same call gives the
# same bits on any number of them.
THREADS = 3


@dataclass(frozen=True)
class Machine:
    """Vectors of a dtype: L lanes of so many bytes together."""

    lanes: int
    vector_bytes: int


@dataclass(frozen=True)
class NormUse:
    """What a norm of flat rows goes through in one task's meta-step."""

    features: int
    rows: int
    query_rows: int
    inner_steps: int
    first_order: bool
    of_rows: bool  # its statistics are over rows, as a batch norm's


@dataclass(frozen=True)
class Choice:
    """A layout, each layer's form, and the cycles of one tile."""

    layout: str
    forms: tuple[str, ...]
    tile_cycles: float
    tile_tasks: int


def choose(
    uses: Sequence[LayerUse],
    tasks: int,
    fast_weights: str,
    machine: Machine,
    norms: Sequence[NormUse] = (),
    once: Sequence[LayerUse] = (),
) -> Choice:
    """The cheapest; `uses` are the linear layers that adapt, the first first, and `once` those
    below."""
    choices = [_in_layout(uses, fast_weights, machine, name, norms, once) for name in LAYOUTS]
    return min(choices, key=lambda choice: total_cycles(choice, tasks))


def choose_images(
    uses: Sequence[LayerUse], machine: Machine, once: Sequence[LayerUse] = ()
) -> Choice:
    """Where channels are in lanes: all weights are dense, one task is a tile."""
    cycles = TILE
    for use in once:
        cycles += once_cost(use).flops / (4 * machine.lanes)
    for use in uses:
        down = 0 if use.first else 1
        passes = use.inner_steps * (2 + down) * use.rows + (2 + down) * use.query_rows
        if not use.first_order:
            passes += use.inner_steps * (2 + 4 * down) * use.rows
        vectors = -(-use.out_features // machine.lanes)
        cycles += passes * use.in_features * vectors / 2
    return Choice("channels_in_lanes", ("dense",) * len(uses), cycles, 1)


def total_cycles(choice: Choice, tasks: int, threads: int = THREADS) -> float:
    """From start to end, on so many threads."""
    tiles = -(-tasks // choice.tile_tasks)
    return choice.tile_cycles * -(-tiles // threads)


def _in_layout(
    uses: Sequence[LayerUse],
    fast_weights: str,
    machine: Machine,
    layout: str,
    norms: Sequence[NormUse],
    once: Sequence[LayerUse],
) -> Choice:
    tasks = layout == "tasks_in_lanes"
    forms, cycles = [], TILE + sum(_norm(norm, machine, tasks) for norm in norms)
    cycles += sum(LayerCycles(use, machine, tasks).once() for use in once)
    for use in uses:
        layer = LayerCycles(use, machine, tasks)
        costs = {"factored": layer.factored(), "dense": layer.dense()}
        form = fast_weights if use.factors else "dense"
        if form == "auto":
            form = min(costs, key=lambda f: costs[f])
        forms.append(form)
        cycles += costs[form]
    return Choice(layout, tuple(forms), cycles, machine.lanes if layout == "tasks_in_lanes" else 1)


def _norm(use: NormUse, machine: Machine, tasks: bool) -> float:
    """The cycles of one norm in a tile's whole meta-step."""
    rows, queries = (n if tasks else -(-n // machine.lanes) for n in (use.rows, use.query_rows))
    once, tangents = NORM_OF_ROWS if use.of_rows else NORM_OF_FEATURES
    cycles = (rows * use.inner_steps + queries) * once + (use.inner_steps + 1) * 2 * NORM_FEATURE
    if not use.first_order:
        cycles += use.inner_steps * (rows * tangents + 2 * NORM_FEATURE)
    return cycles * use.features


class LayerCycles:
    """The cycles of one layer in a tile's whole meta-step, in either form."""

    def __init__(self, use: LayerUse, machine: Machine, tasks: bool) -> None:
        self.use, self.machine, self.tasks = use, machine, tasks
        lanes = machine.lanes
        self.rows = use.rows if tasks else -(-use.rows // lanes)  # in vectors
        self.query_rows = use.query_rows if tasks else -(-use.query_rows // lanes)
        self.unit = 1 if tasks else lanes  # terms of a product that a column of rows stands for

    def product(self, rows: float, columns: float, terms: float, streamed: float = 0) -> float:
        """A product of vectors, `streamed` of them read from a task's weights."""
        use, machine = self.use, self.machine
        near = use.area * (use.inner_steps + 2) * machine.vector_bytes < CACHE_BYTES
        stream = streamed * machine.vector_bytes / (NEAR if near else FAR)
        arithmetic = rows * columns * terms / 2 / FEW_COLUMNS.get(int(columns), 1.0)
        return max(arithmetic, stream) + rows * columns * STORE

    def shared(self, columns: int) -> float:
        """With the weights of all tasks, forward; backward costs the same."""
        use = self.use
        return self.product(use.out_features, columns, use.in_features)

    def own(self, columns: int) -> float:
        """With a task's own weights."""
        use = self.use
        weights = use.area / (1 if self.tasks else self.machine.lanes)
        return self.product(use.out_features, columns, use.in_features, weights)

    def outer(self, columns: int) -> float:
        """A task's own weights from so many columns of rows."""
        use = self.use
        if self.tasks:
            return self.product(use.out_features, use.in_features, columns, 2 * use.area)
        return self.summed(columns)

    def once(self) -> float:
        """Forward, and if it learns, back."""
        use, n, m = self.use, self.rows, self.query_rows
        cycles = self.shared(n) + self.shared(m)
        if not use.learns:
            return cycles
        n = 0 if use.first_order or not use.inner_steps else n
        down = 0 if use.first else self.shared(n) + self.shared(m)
        return cycles + down + self.summed(n + m)

    def dense(self) -> float:
        use, passes = self.use, 1 if self.use.first else 2
        cycles = self.shared(self.rows) * passes if use.inner_steps else 0.0
        cycles += self.own(self.rows) * passes * max(0, use.inner_steps - 1)
        cycles += self.own(self.query_rows) * passes
        cycles += self.outer(self.rows) * use.inner_steps + self.outer(self.query_rows)
        if not use.first_order:
            each = self.own(self.rows) * (1 if use.first else 4)
            each += self.outer(self.rows) * passes
            cycles += each * use.inner_steps
        summed = use.area * (SUM if self.tasks else 1 / self.machine.lanes)
        return cycles + summed

    def through(self, rank: float, columns: int) -> float:
        """By way of `rank` rows of other steps, Gram block and all."""
        use, rank = self.use, rank * self.unit
        gram = self.product(rank, columns, use.in_features)
        return gram + self.product(use.out_features, columns, rank)

    def summed(self, columns: float) -> float:
        """Numbers from so many columns of rows: sums over lanes, or rows turned into features."""
        use, lanes = self.use, self.machine.lanes
        if use.in_features < 4 * lanes:
            return use.area * (columns / 2 + SUM)
        vectors = -(-use.in_features // lanes)
        turned = TURN * use.in_features * columns
        return turned + self.product(use.out_features, vectors, columns * lanes)

    def factored(self) -> float:
        use, n, m, steps = self.use, self.rows, self.query_rows, self.use.inner_steps
        second = not use.first_order
        if use.first:
            cycles = self.shared(n) * min(1, steps) + self.shared(m)
            cycles += self.product(n * self.unit, n + m, use.in_features)  # Gram blocks
            cycles += self.product(m * self.unit, n, use.in_features)
            applied = steps - 1 + second * max(0, steps - 1)
            cycles += applied * self.product(use.out_features, n, n * self.unit)
            cycles += self.product(use.out_features, m, n * self.unit)
            cycles += second * steps * self.product(use.out_features, n, m * self.unit)
            return cycles + self.summed(m + second * n)
        cycles = 2 * (self.shared(n) * steps + self.shared(m))
        cycles += sum(2 * self.through(k * n, n) for k in range(1, steps))
        cycles += 2 * self.through(steps * n, m)
        for k in range(steps if second else 0):
            cycles += 2 * self.shared(n) + 2 * self.through(k * n, n)
            cycles += 2 * self.through(m + 2 * (steps - 1 - k) * n, n)
        return cycles + self.summed(m + second * 2 * steps * n)
