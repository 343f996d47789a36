"""Meta-steps of maml_fast and its peers, same data, same run: `python -m benchmarks`."""

import importlib.util
from pathlib import Path

import maml_fast

if not importlib.util.find_spec("maml_fast.kernels"):  # a checkout that is not installed
    maml_fast.__path__.append(str(Path(__file__).parents[1]))
