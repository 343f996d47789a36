"""The networks of the MAML and CAVIA papers, as plain torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

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
    model = _mlp([1, *hidden, 1], activation, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std, generator=generator)
    return model.to(device)


class ContextInput(nn.Module):
    """Puts a context of `size` numbers behind each row: [..., K] becomes [..., K + size].

    The context is what adapts to a task in CAVIA (Zintgraf et al. 2019): a parameter that starts
    at 0 and does not require grad, so that it is in `inner_params` but not meta-learned.

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """

    def __init__(
        self,
        size: int = 5,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        _check_sizes(size=size)
        zeros = torch.zeros(size, dtype=dtype, device=device)
        self.context = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.context.expand(x.shape[:-1] + self.context.shape)
        return torch.cat((x, rows), dim=-1)


CONTEXT = ("*context",)  # `inner_params` of a network that begins with a ContextInput


def cavia_sinusoid(
    context_size: int = 5,
    hidden: Sequence[int] = (40, 40),
    activation: str = "relu",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """The regression network of Zintgraf et al. 2019 (CAVIA), section 4.1: 1+5-40-40-1 with ReLU.

    The input and a context that starts at 0 go through one layer together, drawn like the others
    as the paper's code draws them, which is torch's way: weights and biases uniform between
    -1/sqrt(K) and 1/sqrt(K), K the layer's inputs. Give `MAML` `inner_params=models.CONTEXT`.

    Args:
        context_size: numbers of the context.
        hidden, activation, seed: as of `sinusoid_mlp`.

    Returns:
        A module from [..., 1] to [..., 1].

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """
    _check_sizes(context_size=context_size)
    model = _mlp([1 + context_size, *hidden, 1], activation, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    context = ContextInput(context_size, dtype=dtype, device=_drawn_on(device))
    return nn.Sequential(context, *model).to(device)


def omniglot_conv4(
    ways: int = 5,
    filters: int = 64,
    *,
    pooling: bool = False,
    scale: bool = False,
    channels: int = 1,
    image_size: int = 28,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """The convolutional Omniglot network of Finn et al. 2017, after Vinyals et al. 2016.

    Four times: 3x3 convolution, batch norm of the task's own rows, ReLU. Convolutions have stride 2
    and the mean over positions comes last; with `pooling`, stride 1 and 2x2 max pooling, and the
    positions are flattened, as Vinyals et al. have it. Convolutions are drawn from Glorot's uniform
    distribution and the last layer from a normal of standard deviation 1 (Glorot's with `pooling`),
    as in the paper's code; biases are 0.

    Args:
        ways: classes.
        filters: channels of each convolution.
        scale: whether gamma of batch norm is learned too; in the paper it is beta alone.
        channels, image_size: of the images, which are square.
        seed: of a generator of its own; the same seed gives the same bits on every device.

    Returns:
        A module from [rows, channels, image_size, image_size] to [rows, ways].

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """
    _check_sizes(ways=ways, filters=filters, channels=channels, image_size=image_size)
    kinds: dict[str, Any] = {"dtype": dtype, "device": _drawn_on(device)}
    layers: list[nn.Module] = []
    size = image_size
    for inputs in (channels, filters, filters, filters):
        stride = 1 if pooling else 2
        conv = nn.utils.skip_init(nn.Conv2d, inputs, filters, 3, stride=stride, padding=1, **kinds)
        layers += [conv, _batch_norm(nn.BatchNorm2d, filters, scale, kinds), nn.ReLU()]
        if pooling:
            layers.append(nn.MaxPool2d(2))
        size = size // 2 if pooling else (size + 1) // 2
    if size < 1:
        raise ValueError(f"image_size is {image_size}; four poolings want at least 16")
    layers += [nn.Flatten()] if pooling else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    features = filters * size * size if pooling else filters
    layers.append(nn.utils.skip_init(nn.Linear, features, ways, **kinds))
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for module in model:
        if isinstance(module, nn.Conv2d) or (pooling and isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, generator=generator)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model.to(device)


def miniimagenet_conv4(
    ways: int = 5,
    filters: int = 32,
    *,
    scale: bool = False,
    channels: int = 3,
    image_size: int = 84,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """The miniImageNet network of Finn et al. 2017, after Ravi and Larochelle 2017: the pooled form
    of `omniglot_conv4`, whose arguments it shares, with 32 filters on colour images of 84x84.
    """
    return omniglot_conv4(
        ways,
        filters,
        pooling=True,
        scale=scale,
        channels=channels,
        image_size=image_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


def omniglot_mlp(
    ways: int = 5,
    hidden: Sequence[int] = (256, 128, 64, 64),
    *,
    scale: bool = False,
    channels: int = 1,
    image_size: int = 28,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """The fully connected Omniglot network of Finn et al. 2017, after Santoro et al. 2016.

    Hidden layers of 256, 128, 64 and 64, each with batch norm of the task's own rows and ReLU.
    Weights are drawn as those of `sinusoid_mlp`, from a truncated normal of standard deviation
    0.01; biases are 0. Arguments, result and errors are those of `omniglot_conv4`.
    """
    _check_sizes(ways=ways, channels=channels, image_size=image_size)
    _check_hidden(hidden)
    kinds: dict[str, Any] = {"dtype": dtype, "device": _drawn_on(device)}
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([channels * image_size**2, *hidden]):
        layers.append(nn.utils.skip_init(nn.Linear, inputs, outputs, **kinds))
        layers += [_batch_norm(nn.BatchNorm1d, outputs, scale, kinds), nn.ReLU()]
    inputs = hidden[-1] if hidden else channels * image_size**2
    layers.append(nn.utils.skip_init(nn.Linear, inputs, ways, **kinds))
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, 0.0, 0.01, -0.02, 0.02, generator=generator)
            nn.init.zeros_(module.bias)
    return model.to(device)


def _mlp(
    sizes: Sequence[int], activation: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Sequential:
    """Linear layers of these sizes, not yet drawn, with activations between them."""
    _check_hidden(sizes[1:-1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; wanted is one of {list(ACTIVATIONS)}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        if layers:
            layers.append(ACTIVATIONS[activation]())
        # Without torch's own initialisation, which would draw from the global generator.
        layers.append(
            nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype, device=_drawn_on(device))
        )
    return nn.Sequential(*layers)


def _drawn_on(device: torch.device | str) -> torch.device:
    """Weights are drawn on the CPU and then moved, but nothing is drawn for a model without memory,
    of device "meta"."""
    return torch.device("meta" if torch.device(device).type == "meta" else "cpu")


def _batch_norm(
    kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d],
    features: int,
    scale: bool,
    kinds: dict[str, Any],
) -> nn.Module:
    """Batch norm as the paper's code has it: beta, gamma fixed at 1 unless `scale`, epsilon 0.001.

    Without any gamma, torch cannot differentiate batch norm twice.
    """
    norm = kind(features, eps=1e-3, track_running_stats=False, **kinds)
    if not scale:
        norm.weight.requires_grad_(False)
    return norm


def _check_hidden(hidden: Sequence[int]) -> None:
    if any(not isinstance(size, int) or size < 1 for size in hidden):
        raise ValueError(f"hidden is {tuple(hidden)}; wanted are sizes of at least 1")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}; wanted is a whole number of at least 1")
