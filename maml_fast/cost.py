"""What a layer's fast weights cost in each form: FLOPs, bytes, and which form to take."""

from __future__ import annotations

from dataclasses import dataclass

# The cost model's machine. One task's dense weights, or its Gram blocks, are multiplied at these
# shares of the speed of one large product over all tasks' rows, and a byte of per-task weights
# costs as much as this many FLOPs of the large product. Fitted to eager torch on two AVX-512 cores:
# over 60 cases of 16 to 256 features, 1 to 40 rows, 1 and 5 steps, the form chosen was on average
# 0.3% slower than the better one.
DENSE_SHARE = 0.2
GRAM_SHARE = 0.07
FLOPS_PER_BYTE = 4.0


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of per-task weights of one task's whole meta-step in one layer."""

    shared_flops: int  # in large products over all tasks' rows
    small_flops: int  # in products of one task's matrices
    small_share: float  # of the large product's speed that those reach
    weight_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.shared_flops + self.small_flops

    @property
    def time(self) -> float:
        """In FLOPs of the large product."""
        small = self.small_flops / self.small_share
        return self.shared_flops + small + self.weight_bytes * FLOPS_PER_BYTE


@dataclass(frozen=True)
class LayerUse:
    """What a linear layer goes through in one task's meta-step.

    Of a convolution, a row is a position of its result: in_features are kernel^2 * C, and rows the
    positions of all images.
    """

    in_features: int
    out_features: int
    rows: int
    query_rows: int
    inner_steps: int
    first_order: bool
    first: bool  # the first layer that adapts: its input is the data, and no cotangent leaves it
    factors: bool = True  # whether its fast weights can be factored; a convolution's are dense
    learns: bool = True  # whether it has a gradient

    @property
    def area(self) -> int:
        return self.in_features * self.out_features


def choose_form(use: LayerUse, fast_weights: str, itemsize: int) -> tuple[str, Cost]:
    """The form of a layer's fast weights, "factored" or "dense", and its cost."""
    costs = {"factored": factored_cost(use), "dense": dense_cost(use, itemsize)}
    form = fast_weights if use.factors else "dense"
    if form == "auto":
        # A Gram block of so thin a layer costs many times the layer.
        thin = use.in_features <= 4 or use.out_features <= 8
        form = "dense" if thin else min(costs, key=lambda form: costs[form].time)
    return form, costs[form]


def cost_of(use: LayerUse, form: str, itemsize: int) -> Cost:
    """The cost of a layer in the form given."""
    return factored_cost(use) if form == "factored" else dense_cost(use, itemsize)


def dense_cost(use: LayerUse, itemsize: int) -> Cost:
    """Passes over rows with shared weights at step 0 and with a task's own from then on."""
    area, inner_steps = use.area, use.inner_steps
    down = 0 if use.first else 1
    passes = [use.rows] * inner_steps + [use.query_rows]
    shared = 2 * area * passes[0] * (1 + down)
    small = sum(2 * area * n * (1 + down) for n in passes[1:])
    small += sum(2 * area * n for n in passes)  # outer products: updates, and the adjoint's first
    # weights are read by each pass, written by each update; the adjoint's first write
    traffic = len(passes[1:]) * (1 + down) + 2 * inner_steps + 1
    if not use.first_order:
        small += inner_steps * 2 * area * use.rows * (4 * down + 2)
        traffic += inner_steps * (3 + 5 * down)
    return Cost(shared, small, DENSE_SHARE, traffic * area * itemsize)


def factored_cost(use: LayerUse) -> Cost:
    """Shared products over all rows, and Gram blocks: rank * (I + O) a row, in and out."""
    rows, query_rows, steps = use.rows, use.query_rows, use.inner_steps
    second_order = not use.first_order
    ends = use.in_features + use.out_features
    passes = [rows] * steps + [query_rows]  # pass k has rank k * rows
    if use.first:
        shared_rows = rows + query_rows + query_rows + second_order * rows
        small = 2 * (rows + query_rows) * rows * use.in_features if steps else 0
        small += sum(2 * n * k * rows * use.out_features for k, n in enumerate(passes))
        small += second_order * steps * 2 * rows * (rows + query_rows) * use.out_features
    else:
        shared_rows = 2 * sum(passes) + query_rows + second_order * 4 * steps * rows
        small = sum(4 * n * k * rows * ends for k, n in enumerate(passes))
        for k in range(steps if second_order else 0):
            adjoint = query_rows + 2 * (steps - 1 - k) * rows
            small += 4 * rows * (adjoint + k * rows) * ends
    return Cost(2 * use.area * shared_rows, small, GRAM_SHARE)


def once_cost(use: LayerUse) -> Cost:
    """Of a layer below all that adapts: forward, and if it learns, back."""
    passes = 3 - use.first if use.learns else 1
    reached = use.rows if use.inner_steps and not use.first_order else 0
    rows = use.rows + use.query_rows + (passes - 1) * (reached + use.query_rows)
    return Cost(2 * use.area * rows, 0, 1.0)


def still_cost(use: LayerUse) -> Cost:
    """Of a layer that learns and does not adapt: its products are shared by all tasks."""
    rows, second_order = use.rows, not use.first_order
    passes = use.inner_steps * rows * (2 + 4 * second_order) + 3 * use.query_rows
    return Cost(2 * use.area * passes, 0, 1.0)
