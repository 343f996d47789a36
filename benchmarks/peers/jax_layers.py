"""torch's layers as JAX code writes them: images [n, H, W, C], convolutions [k, k, C, O], linear
weights [I, O].

Dimensions: n rows, I/O in/out features, C channels, H/W height and width, k kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torch import Tensor, nn

Layer = Callable[[Mapping[str, Any], Any], Any]  # its parameters by name, and what goes in
TO_JAX = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of weights: linear, convolution
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def weights(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A parameter of torch in JAX's layout."""
    array = tensor.detach().cpu().numpy()
    return np.ascontiguousarray(array.transpose(TO_JAX.get(array.ndim)))


def torch_layout(array: Any) -> np.ndarray[Any, Any]:
    """A parameter or its gradient back in torch's layout."""
    found = np.array(array)
    return np.ascontiguousarray(found.transpose(TO_TORCH.get(found.ndim)))


def images_last(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Data for JAX: of images [T, n, C, H, W] the channels go last, class numbers become int32."""
    array = tensor.detach().cpu().numpy()
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    return np.ascontiguousarray(np.moveaxis(array, 2, -1)) if array.ndim == 5 else array


def network(model: nn.Sequential) -> Callable[[Mapping[str, Any], Any], Any]:
    """The model as a function of its parameters by torch's names, in JAX's layout, and a task's
    rows.

    Raises:
        TypeError: it has a layer that is not written here.
    """
    layers = [(f"{name}.", _layer(name, layer)) for name, layer in model.named_children()]

    def predict(theta: Mapping[str, Any], x: Any) -> Any:
        for prefix, apply in layers:
            own = {
                name.removeprefix(prefix): value
                for name, value in theta.items()
                if name.startswith(prefix)
            }
            x = apply(own, x)
        return x

    return predict


def _layer(name: str, layer: nn.Module) -> Layer:
    if type(layer) not in _LAYERS:
        wanted = ", ".join(kind.__name__ for kind in _LAYERS)
        raise TypeError(f"layer {name} is {type(layer).__name__}; written for JAX are {wanted}")
    return _LAYERS[type(layer)](layer)


def _linear(layer: nn.Linear) -> Layer:
    return lambda own, x: x @ own["weight"] + own["bias"]


def _conv(layer: nn.Conv2d) -> Layer:
    around = [(int(edge), int(edge)) for edge in layer.padding]

    def apply(own: Mapping[str, Any], x: Any) -> Any:
        z = lax.conv_general_dilated(
            x,
            own["weight"],
            layer.stride,
            around,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return z + own["bias"]

    return apply


def _batch_norm(layer: nn.Module) -> Layer:
    """By the statistics of these rows."""
    epsilon = layer.eps
    fixed = {
        name: weights(value) for name, value in layer.named_parameters() if not value.requires_grad
    }

    def apply(own: Mapping[str, Any], x: Any) -> Any:
        both = {**fixed, **own}
        over = tuple(range(x.ndim - 1))
        centred = x - x.mean(over)
        scale = lax.rsqrt(jnp.mean(centred**2, over) + epsilon)
        return centred * (scale * both["weight"]) + both["bias"]

    return apply


def _max_pool(layer: nn.MaxPool2d) -> Layer:
    window = (1, layer.kernel_size, layer.kernel_size, 1)
    return lambda own, x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _flatten(layer: nn.Flatten) -> Layer:
    """In torch's order, so that the next layer's weights are the same."""

    def apply(own: Mapping[str, Any], x: Any) -> Any:
        return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)

    return apply


_LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda layer: lambda own, x: jax.nn.relu(x),
    nn.Tanh: lambda layer: lambda own, x: jnp.tanh(x),
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: lambda layer: lambda own, x: x.mean((1, 2), keepdims=True),
    nn.Flatten: _flatten,
}
