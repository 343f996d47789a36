"""What the fused meta-step is launched with: the network as a table, scratch, tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from . import pointwise, reduce
from .fused import meta_step
from .launch import Launch
from .table import FIELDS

Chain = tuple[tuple[Any, ...], ...]  # an activation, as `pointwise` has it

REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 128, 32, 4


@dataclass(frozen=True)
class Layer:
    """A linear layer and the activation behind it.

    weight_at, bias_at: where their gradients begin among all gradients; -1 for one that does not
    adapt.
    """

    in_features: int
    out_features: int
    activation: Chain
    weight_at: int = -1
    bias_at: int = -1

    @property
    def weight_stride(self) -> int:
        return 1 if self.in_features == 1 else padded(self.in_features)


@dataclass(frozen=True)
class Tiles:
    """How products are cut: rows, features summed at a time, features of the result; and rows of a
    weight's gradient."""

    rows: int
    inner: int
    outer: int
    tall: int
    num_warps: int


@dataclass(frozen=True)
class Network:
    """A chain of layers, its loss, and all that one meta-step of it depends on but the data."""

    layers: tuple[Layer, ...]
    loss: str
    inner_steps: int
    rows: int
    query_rows: int
    gradient: bool
    second_order: bool
    learns_rates: bool
    gradient_numbers: int  # of all parameters that adapt

    @property
    def activations(self) -> tuple[Chain, ...]:
        """The different ones, in order of appearance."""
        return tuple(dict.fromkeys(layer.activation for layer in self.layers))

    @property
    def keeps_z(self) -> bool:
        return any(pointwise.keeps_input(chain) for chain in self.activations)

    @property
    def curved(self) -> bool:
        return any(pointwise.is_curved(chain) for chain in self.activations)

    @property
    def outputs(self) -> int:
        return self.layers[-1].out_features

    @property
    def widest(self) -> int:
        return max(max(layer.in_features, layer.out_features) for layer in self.layers)

    @property
    def theta_size(self) -> int:
        """Floats of one copy of the parameters."""
        return sum(
            padded(layer.out_features * layer.weight_stride) + padded(layer.out_features)
            for layer in self.layers
        )

    @property
    def _most_rows(self) -> int:
        return max(self.rows, self.query_rows)

    @property
    def node_size(self) -> int:
        """Floats of one copy of what the layers put out."""
        return self._most_rows * sum(padded(layer.out_features) for layer in self.layers)

    @property
    def input_size(self) -> int:
        return self._most_rows * padded(self.layers[0].in_features)

    @property
    def program_size(self) -> int:
        """Floats of scratch of one program; see the pointers in `fused.meta_step`."""
        steps = (self.inner_steps + 1) * (2 + self.keeps_z + self.curved)
        return (
            (self.inner_steps + 2) * self.theta_size
            + 2 * self.input_size
            + (steps + 2 + self.curved) * self.node_size
        )

    def table(self) -> Tensor:
        """int32 [L, FIELDS], as fused.py lists them."""
        activations = self.activations
        rows = []
        parameters = 0
        nodes = [0, *accumulate(self._most_rows * padded(a.out_features) for a in self.layers)]
        for i, layer in enumerate(self.layers):
            bias = parameters + padded(layer.out_features * layer.weight_stride)
            rows.append(
                (
                    layer.in_features,
                    layer.out_features,
                    layer.weight_stride,
                    padded(layer.in_features),
                    padded(layer.out_features),
                    parameters,
                    bias,
                    nodes[i - 1] if i else 0,
                    nodes[i],
                    activations.index(layer.activation),
                    layer.weight_at,
                    layer.bias_at,
                )
            )
            parameters = bias + padded(layer.out_features)
        assert len(rows[0]) == FIELDS.value
        return torch.tensor(rows, dtype=torch.int32)

    def scales(self) -> tuple[float, float]:
        """One over what a task's loss is the mean of."""
        features = 1 if self.loss == "cross_entropy" else self.outputs
        return 1 / (self.rows * features), 1 / (self.query_rows * features)


def padded(width: int) -> int:
    """Rows of so many features lie this far apart."""
    return -(-width // 16) * 16


def constants(network: Network, tiles: Tiles, precision: str) -> dict[str, Any]:
    """The arguments of the kernel that are part of its code."""
    return dict(
        LOSS=network.loss,
        ACTIVATIONS=network.activations,
        KEEPS_Z=network.keeps_z,
        CURVED=network.curved,
        GRADIENT=network.gradient,
        SECOND_ORDER=network.gradient and network.second_order,
        LEARNS=network.gradient and network.learns_rates,
        ROWS=tiles.rows,
        INNER=tiles.inner,
        OUTER=tiles.outer,
        ALL_ROWS=max(network.rows, network.query_rows) <= tiles.rows,
        ALL_OUTER=network.widest <= tiles.outer,
        TALL=tiles.tall,
        CLASSES=triton.next_power_of_2(padded(network.outputs)),
        PRECISION=precision,
    )


def launches(network: Network, tiles: Tiles, precision: str, name: str) -> list[Launch]:
    """The kernels that `run` launches, for checks of their code."""
    targets = "*i64" if network.loss == "cross_entropy" else "*fp32"
    signature = dict(
        support_x="*fp32", support_y=targets, query_x="*fp32", query_y=targets,
        layers="*i32", addresses="*i64", rates="*fp32", scratch="*fp32",
        task_losses="*fp32", support_losses="*fp32", query_outputs="*fp32",
        gradients="*fp32", rate_gradients="*fp32",
        T="i32", N="i32", M="i32", S="i32", L="i32", C="i32", P="i32",
        support_scale="fp32", query_scale="fp32",
        program_size="i32:16", theta_size="i32:16", node_size="i32:16", input_size="i32:16",
    )  # fmt: skip
    fused = Launch(
        f"fused {name}", meta_step, signature, constants(network, tiles, precision),
        tiles.num_warps,
    )  # fmt: skip
    sums = Launch(
        "sum_rows", reduce.sum_rows,
        dict(x="*fp32", out="*fp32", rows="i32", columns="i32"),
        dict(ROWS=REDUCE_ROWS, COLUMNS=REDUCE_COLUMNS), REDUCE_WARPS, num_stages=3,
    )  # fmt: skip
    return [fused, sums] if network.gradient else [fused]


@dataclass
class Buffers:
    """Where the results of a launch go, all on the data's device."""

    task_losses: Tensor  # [T]
    support_losses: Tensor  # [T, S]
    query_outputs: Tensor  # [T, M, C]
    gradients: Tensor  # [P], summed over tasks
    rate_gradients: Tensor  # [T, S, L, 2]


def run(
    network: Network,
    tiles: Tiles,
    precision: str,
    programs: int,
    table: Tensor,
    addresses: Tensor,
    rates: Tensor,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Buffers,
) -> None:
    """Fill `out` for the tasks of `batch`; all tensors are contiguous and on one device.

    table: `network.table()`; addresses: int64 [L, 2] of weights and biases, 0 for no bias; rates:
    [S + 1, L, 2] of weights and biases, 0 for no bias, and the last -1; programs: at most so many
    share the tasks, each with its scratch.
    """
    tasks = batch[0].shape[0]
    programs = min(programs, tasks)
    scratch = batch[0].new_empty(programs, network.program_size)
    numbers = network.gradient_numbers
    partials = batch[0].new_empty(programs, numbers)
    meta_step[(programs,)](
        *batch[:4], table, addresses, rates, scratch,
        out.task_losses, out.support_losses, out.query_outputs, partials, out.rate_gradients,
        tasks, network.rows, network.query_rows, network.inner_steps, len(network.layers),
        network.outputs, numbers, *network.scales(),
        network.program_size, network.theta_size, network.node_size, network.input_size,
        **constants(network, tiles, precision), num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    if network.gradient:
        reduce.sum_rows[(triton.cdiv(numbers, REDUCE_COLUMNS),)](
            partials, out.gradients, programs, numbers,
            ROWS=REDUCE_ROWS, COLUMNS=REDUCE_COLUMNS, num_warps=REDUCE_WARPS, num_stages=3,
        )  # fmt: skip
