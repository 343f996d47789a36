"""All implementations there are: our backends as maml_fast lists them, then the peers.

Its "reference" is left out: that is the autograd loop, which is measured as a peer.
"""

from __future__ import annotations

from functools import lru_cache

from benchmarks.implementation import Implementation
from benchmarks.ours import OnOneThread, OurBackend, ValueAndGrad
from benchmarks.peers import PEERS
from maml_fast.plan import BACKENDS


@lru_cache(maxsize=1)
def implementations() -> tuple[Implementation, ...]:
    """Every implementation, ours first."""
    ours = (OurBackend(name) for name in BACKENDS if name not in ("auto", "reference"))
    return (*ours, OnOneThread("cpu"), ValueAndGrad("cpu"), *PEERS)


def implementation(name: str) -> Implementation:
    """The implementation of that name."""
    return next(one for one in implementations() if one.name == name)
