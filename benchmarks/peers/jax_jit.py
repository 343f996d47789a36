"""All tasks at once with `jax.jit(value_and_grad(vmap))`, in float32, from torch's parameters.

Layouts are those of JAX code (see `jax_layers`); the classes' log-probabilities are picked by a
one-hot product, which XLA fuses, rather than by a gather. The inner steps are unrolled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch

from benchmarks.implementation import Gradient, Implementation, MetaStep
from benchmarks.problem import Problem, adapting


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

        from benchmarks.peers import jax_layers

        jax.config.update(
            "jax_default_matmul_precision", "highest"
        )  # float32 products, as torch does them
        place = _device(problem.episodes.support_x.device)
        theta = {
            name: jax.device_put(jax_layers.weights(value), place)
            for name, value in adapting(problem.model).items()
        }
        episodes = [
            jax.device_put(jax_layers.images_last(tensor), place) for tensor in problem.episodes
        ]
        step = jax.jit(jax.value_and_grad(_meta_loss(problem))).lower(theta, *episodes).compile()

        def run() -> Any:
            return jax.block_until_ready(step(theta, *episodes))

        def read(result: Any) -> tuple[float, Gradient]:
            loss, gradient = result
            return float(loss), {
                name: torch.from_numpy(jax_layers.torch_layout(value))
                for name, value in gradient.items()
            }

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


def _meta_loss(problem: Problem) -> Any:
    import jax
    import jax.numpy as jnp

    from benchmarks.peers import jax_layers

    case = problem.case
    rate = case.network.inner_lr
    predict = jax_layers.network(problem.model)

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
