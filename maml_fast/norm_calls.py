"""Norms as MAML wants them, whoever calls them: modules, or functions in a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from maml_fast.errors import UnsupportedModelError
from maml_fast.ops.norm import RUNNING_CALL

_BY_F = ("input", "running_mean", "running_var", "weight", "bias")
_BY_TORCH = ("input", "weight", "bias", "running_mean", "running_var")
_REST = ("momentum", "eps", "cudnn_enabled")
# Each function's arguments by position
ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: (*_BY_F, "training", *_REST),
    torch.batch_norm: (*_BY_TORCH, "training", *_REST),
    F.instance_norm: (*_BY_F, "use_input_stats", *_REST),
    torch.instance_norm: (*_BY_TORCH, "use_input_stats", *_REST),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    torch.group_norm: ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
}


class OwnStatistics(TorchFunctionMode):
    """While it is entered, norms take the statistics of their rows, and update no running ones.

    A norm with a beta alone gets a gamma of ones, without which torch cannot differentiate it
    twice. Raises UnsupportedModelError at a norm that would read running statistics.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ARGUMENTS:
            return func(*args, **kwargs)
        named = {**dict(zip(ARGUMENTS[func], args, strict=False)), **kwargs}
        if named.get("running_mean") is not None:
            own = named.get("training", named.get("use_input_stats", func is F.instance_norm))
            if not own:
                flag = ARGUMENTS[func][5]
                raise UnsupportedModelError(
                    f"a call of {func.__name__}: {RUNNING_CALL.format(flag)}"
                )
            named["running_mean"] = named["running_var"] = None
        weight, bias = named.get("weight"), named.get("bias")
        if weight is None and isinstance(bias, Tensor):
            named["weight"] = torch.ones(bias.shape, dtype=bias.dtype, device=bias.device)
        return func(**named)
