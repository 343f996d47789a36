"""Fast, exact MAML meta-steps for many tasks at once."""

from importlib.metadata import version

from maml_fast import inner, outer, presets
from maml_fast.check import CheckReport, check
from maml_fast.errors import (
    MemoryWarning,
    NonFiniteError,
    NonFiniteWarning,
    UnavailableBackendError,
    UnsupportedModelError,
)
from maml_fast.maml import MAML
from maml_fast.plan import Plan
from maml_fast.profile import profile
from maml_fast.profiled import Profile
from maml_fast.rates import PositiveRate
from maml_fast.results import AdaptedModels, MetaStepResult, Trajectory

__version__ = version("maml_fast")

__all__ = [
    "MAML",
    "AdaptedModels",
    "CheckReport",
    "MemoryWarning",
    "MetaStepResult",
    "NonFiniteError",
    "NonFiniteWarning",
    "Plan",
    "PositiveRate",
    "Profile",
    "Trajectory",
    "UnavailableBackendError",
    "UnsupportedModelError",
    "check",
    "inner",
    "outer",
    "presets",
    "profile",
]
