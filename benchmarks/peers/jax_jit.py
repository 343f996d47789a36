"""All tasks at once with `jax.jit(value_and_grad(vmap))`, in float32, from torch's parameters.

The weights are kept [I, O], as JAX code does; the classes' log-probabilities are picked by a
one-hot product, which XLA fuses, rather than by a gather. The inner steps are unrolled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.problem import Problem


class JaxJit(Implementation):
    name = "jax"
    title = "jax.jit(vmap(grad))"
    waits = True
    turn = 1
    seconds_a_pass = 4.0

    def cannot(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed"
        try:
            found = _device(problem.episodes.support_x.device)
        except Exception as error:  # one that does not fit this machine's other libraries
            return f"jax does not start: {type(error).__name__}: {error}"
        return None if found else "this jax sees no GPU (install jax[cuda13])"

    def release(self) -> None:
        if "jax" not in sys.modules:
            return
        from jax.extend import backend

        backend.clear_backends()  # it gives back nothing otherwise, and its peak never falls

    def prepare(self, problem: Problem) -> MetaStep:
        import jax
        import numpy as np

        jax.config.update(
            "jax_default_matmul_precision", "highest"
        )  # float32 products, as torch does them
        place = _device(problem.episodes.support_x.device)

        def share(tensor: Tensor) -> Any:
            array = tensor.detach().cpu().numpy()
            return jax.device_put(
                array.astype(np.int32) if array.dtype == np.int64 else array, place
            )

        layers = [layer for layer in problem.model if isinstance(layer, nn.Linear)]
        theta = [(share(layer.weight.T.contiguous()), share(layer.bias)) for layer in layers]
        episodes = [share(tensor) for tensor in problem.episodes]
        step = (
            jax.jit(jax.value_and_grad(_meta_loss(problem.case))).lower(theta, *episodes).compile()
        )

        def run() -> Any:
            return jax.block_until_ready(step(theta, *episodes))

        def read(result: Any) -> tuple[float, Gradient]:
            loss, steps = result
            names = [
                name
                for name, module in problem.model.named_children()
                if isinstance(module, nn.Linear)
            ]
            gradient = {}
            for name, (weight, bias) in zip(names, steps, strict=True):
                gradient[f"{name}.weight"] = torch.from_numpy(np.array(weight).T)
                gradient[f"{name}.bias"] = torch.from_numpy(np.array(bias))
            return float(loss), gradient

        return MetaStep(run, read)


def _device(device: torch.device) -> Any:
    """jax's device of the same kind, or None."""
    # Others use this GPU's memory too; jax would take most of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    try:
        return jax.devices("cpu" if device.type == "cpu" else "gpu")[0]
    except RuntimeError:
        return None


def _meta_loss(case: Case) -> Any:
    import jax
    import jax.numpy as jnp

    activation = {nn.ReLU: jax.nn.relu, nn.Tanh: jnp.tanh}[case.network.activation]
    rate = case.network.inner_lr

    def predict(theta: Any, x: Any) -> Any:
        for weight, bias in theta[:-1]:
            x = activation(x @ weight + bias)
        weight, bias = theta[-1]
        return x @ weight + bias

    def mse(prediction: Any, y: Any) -> Any:
        return jnp.mean((prediction - y) ** 2)

    def cross_entropy(prediction: Any, y: Any) -> Any:
        picked = jax.nn.one_hot(y, prediction.shape[-1]) * jax.nn.log_softmax(prediction)
        return -jnp.mean(jnp.sum(picked, axis=-1))

    loss = {"mse": mse, "cross_entropy": cross_entropy}[case.network.loss]

    def loss_of(theta: Any, x: Any, y: Any) -> Any:
        return loss(predict(theta, x), y)

    def task_loss(theta: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(case.S):
            steps = jax.grad(loss_of)(theta, support_x, support_y)
            theta = jax.tree.map(lambda value, step: value - rate * step, theta, steps)
        return loss_of(theta, query_x, query_y)

    batched = jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))
    return lambda theta, *episodes: jnp.mean(batched(theta, *episodes))
