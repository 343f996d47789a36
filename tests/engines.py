"""The instruction sets and layouts of the C++ backend that can be tried here."""

from maml_fast import cpu_cost, cpu_features

ENGINES = list(cpu_features.engines()) or ["none"]
LAYOUTS = cpu_cost.LAYOUTS
