"""The backends to be tried, and the instruction sets and layouts of the C++ one that are here."""

import os

from maml_fast import cpu_cost, cpu_features

ENGINES = list(cpu_features.engines()) or ["none"]
LAYOUTS = cpu_cost.LAYOUTS

FORMS = [
    ("reference", "auto"),
    ("functional", "auto"),
    ("torch", "factored"),
    ("torch", "dense"),
    ("cpu", "factored"),
    ("cpu", "dense"),
]


def tried(backends):
    """Those of the pairs (backend, fast weights) that MAML_FAST_TEST_BACKENDS names, all if it is
    not set: the sanitizers see only what is compiled with them."""
    names = os.environ.get("MAML_FAST_TEST_BACKENDS")
    return [pair for pair in backends if names is None or pair[0] in names.split(",")]
