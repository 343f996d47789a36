"""The networks of the MAML paper, as plain torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def sinusoid_mlp(
    hidden: Sequence[int] = (40, 40),
    activation: str = "relu",
    *,
    seed: int = 0,
    std: float = 0.01,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """The regression network of Finn et al. 2017, section 5.1: 1-40-40-1 with ReLU.

    Weights are drawn as by TensorFlow's `truncated_normal`, from a normal distribution of mean 0
    and standard deviation `std` cut off at two standard deviations; biases are 0.

    Args:
        hidden: sizes of the hidden layers.
        activation: one of `ACTIVATIONS`.
        seed: of a generator of its own; the same seed gives the same bits on every device.
        std: standard deviation of the normal distribution before it is cut off.

    Returns:
        A module from [..., 1] to [..., 1].

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """
    if any(not isinstance(size, int) or size < 1 for size in hidden):
        raise ValueError(f"hidden is {tuple(hidden)}; wanted are sizes of at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; wanted is one of {list(ACTIVATIONS)}")
    sizes = [1, *hidden, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        if layers:
            layers.append(ACTIVATIONS[activation]())
        # Without torch's own initialisation, which would draw from the global generator.
        layers.append(nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype))
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std, generator=generator)
    return model.to(device)
