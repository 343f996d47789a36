"""Fast, exact MAML meta-steps for many tasks at once."""

from importlib.metadata import version

from maml_fast.check import CheckReport, check
from maml_fast.errors import NonFiniteError, UnavailableBackendError, UnsupportedModelError
from maml_fast.maml import MAML, AdaptedModels, MetaStepResult
from maml_fast.plan import Plan

__version__ = version("maml_fast")

__all__ = [
    "MAML",
    "AdaptedModels",
    "CheckReport",
    "MetaStepResult",
    "NonFiniteError",
    "Plan",
    "UnavailableBackendError",
    "UnsupportedModelError",
    "check",
]
