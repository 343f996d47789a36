"""All implementations there are: our backends as maml_fast lists them, then the peers.

Its "reference" is left out: that is the autograd loop, which is measured as a peer.
"""

from __future__ import annotations

from functools import lru_cache

from benchmarks.implementation import Implementation
from benchmarks.ours import AtPrecision, OnOneThread, OurBackend, ValueAndGrad
from benchmarks.peers import PEERS
from maml_fast.plan import BACKENDS


@lru_cache(maxsize=1)
def implementations() -> tuple[Implementation, ...]:
    """Every implementation, ours first."""
    ours = (OurBackend(name) for name in BACKENDS if name not in ("auto", "reference"))
    return (
        *ours,
        OnOneThread("cpu"),
        ValueAndGrad("cpu", "cpu"),
        ValueAndGrad("triton", "cuda"),
        AtPrecision("triton", "high"),
        AtPrecision("triton", "medium"),
        *PEERS,
    )


def names(device: str) -> list[str]:
    """Of the implementations to measure on a device. Backends that cannot run there are among them,
    to say why, but not their variants.
    """
    return [one.name for one in implementations() if one.device in (None, device)]


def implementation(name: str) -> Implementation:
    """The implementation of that name."""
    return next(one for one in implementations() if one.name == name)
