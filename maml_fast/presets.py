"""The MAML family by the papers' names: a few options each, any of which can be given anew.

`options` are those of `MAML`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from maml_fast.inner import SGD
from maml_fast.maml import MAML
from maml_fast.options import check_count, matching
from maml_fast.outer import Implicit, Reptile
from maml_fast.rates import PositiveRate

# Antoniou et al. 2019: what steps but the last keep of the loss, in the end, times the steps
LEAST_SHARE = 0.03


def fomaml(model: nn.Module, **options: Any) -> MAML:
    """First-order MAML (Finn et al. 2017)."""
    return MAML(model, **{"first_order": True, **options})


def anil(model: nn.Module, head: Sequence[str], **options: Any) -> MAML:
    """Almost no inner loop (Raghu et al. 2020): the head alone adapts.

    head: names or patterns of its parameters, as in ["fc.*"].
    """
    return MAML(model, **{"inner_params": head, **options})


def boil(model: nn.Module, head: Sequence[str], **options: Any) -> MAML:
    """Body only update in inner loop (Oh et al. 2021): all but the head adapts.

    head: names or patterns of its parameters. Raises ValueError if nothing is left.
    """
    named = dict(model.named_parameters())
    still = matching("head", head, named) or []
    body = [name for name, p in named.items() if name not in still and p.requires_grad]
    if not body:
        raise ValueError(
            f"head has {list(head)}, which are all parameters, and nothing would adapt"
        )
    return MAML(model, **{"inner_params": body, **options})


def meta_sgd(
    model: nn.Module, inner_lr: float = 0.01, positive: bool = False, **options: Any
) -> MAML:
    """Meta-SGD (Li et al. 2017): a learned rate for every number of every parameter.

    inner_lr: where the rates begin; positive: they are learned as logarithms.
    """
    chosen = matching("inner_params", options.get("inner_params"), dict(model.named_parameters()))
    rates: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if p.requires_grad if chosen is None else name in chosen:
            rate = torch.full((1, *p.shape), inner_lr, dtype=p.dtype, device=p.device)
            rates[name] = PositiveRate(rate) if positive else nn.Parameter(rate)
    return MAML(model, **{"inner_lr": rates, **options})


def mamlpp(
    model: nn.Module,
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    norms: Sequence[str] = (),
    **options: Any,
) -> MAML:
    """MAML++ (Antoniou et al. 2019): a learned rate for each layer's parameters and step, norms
    with gamma and beta of each step, losses of all steps; see `mamlpp_epoch` for what changes as
    training goes on.

    inner_lr: where the rates begin; norms: names or patterns of the norms' parameters.
    """
    by_step = matching("norms", norms or None, dict(model.named_parameters())) or []
    rates = {
        name: nn.Parameter(torch.full((inner_steps,), inner_lr, dtype=p.dtype, device=p.device))
        for name, p in model.named_parameters()
        if p.requires_grad and name not in by_step
    }
    weights = multi_step_weights(inner_steps, 0, 1) if inner_steps else None
    defaults = {"inner_lr": rates, "inner_steps": inner_steps, "step_weights": weights}
    if norms:
        defaults["step_params"] = list(norms)
    return MAML(model, **{**defaults, **options})


def mamlpp_epoch(
    maml: MAML, epoch: int, multi_step_epochs: int = 15, first_order_epochs: int = 0
) -> None:
    """Set what MAML++ changes from epoch to epoch: the weights of the steps' losses, and whether
    gradients are first-order, as in the first epochs.

    epoch: from 0; multi_step_epochs: until the last step's loss is nearly all;
    first_order_epochs: how many begin with first-order gradients (50 in the paper).
    """
    check_count("epoch", epoch, least=0)
    maml.step_weights = multi_step_weights(maml.inner_steps, epoch, multi_step_epochs)
    maml.first_order = epoch < first_order_epochs


def multi_step_weights(inner_steps: int, epoch: int, epochs: int) -> list[float]:
    """MAML++'s weights of the query losses behind each inner step, [inner_steps + 1]: alike at
    epoch 0, then the last one's grows until the others keep 0.03 / inner_steps."""
    check_count("inner_steps", inner_steps, least=1)
    check_count("epoch", epoch, least=0)
    check_count("epochs", epochs, least=1)
    alike = 1 / inner_steps
    least = LEAST_SHARE * alike
    earlier = max(alike * (1 - epoch / epochs), least) if inner_steps > 1 else 0.0
    return [0.0, *[earlier] * (inner_steps - 1), 1 - earlier * (inner_steps - 1)]


def cavia(model: nn.Module, context: Sequence[str] = ("context",), **options: Any) -> MAML:
    """CAVIA (Zintgraf et al. 2019): parameters that enter the network as inputs, the context, adapt
    alone, from the same values in each task.

    context: names or patterns; with requires_grad=False, as in the paper, they begin at what they
    are, 0 there, and are not learned.
    """
    return MAML(model, **{"inner_params": context, **options})


def reptile(model: nn.Module, **options: Any) -> MAML:
    """Reptile (Nichol et al. 2018): the meta-gradient is the way back from where the task led."""
    return MAML(model, **{"meta_gradient": Reptile(), **options})


def imaml(
    model: nn.Module,
    strength: float = 2.0,
    iterations: int = 5,
    tolerance: float = 1e-6,
    **options: Any,
) -> MAML:
    """iMAML (Rajeswaran et al. 2019): the implicit meta-gradient of the support loss's minimum with
    a proximal term.

    strength: of the proximal term, lambda there; iterations, tolerance: of conjugate gradients.
    """
    defaults = {
        "meta_gradient": Implicit(iterations, tolerance),
        "inner_optimizer": SGD(proximal=strength),
    }
    return MAML(model, **{**defaults, **options})
