"""The configuration of a run: the paper's defaults, limits, and its way through JSON."""

import json
import math
from pathlib import Path
from typing import get_args

import pytest

from maml_fast import plan
from maml_fast.config import Backend, ConfigError
from maml_fast.config_sinusoid import Activation, SinusoidConfig
from maml_fast.models import ACTIVATIONS


def test_the_defaults_are_the_papers():
    config = SinusoidConfig()
    assert (config.tasks, config.shots, config.query_shots) == (25, 10, 10)
    assert (config.inner_steps, config.inner_lr, config.meta_lr) == (1, 0.01, 1e-3)
    assert (config.iterations, config.hidden, config.activation) == (70_000, (40, 40), "relu")
    assert not config.first_order
    assert not config.learn_inner_lr


def test_choices_are_all_that_there_are():
    assert get_args(Activation) == tuple(ACTIVATIONS)
    assert set(get_args(Backend)) == set(plan.BACKENDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", -1),
        ("tasks", 0),
        ("shots", 0),
        ("query_shots", 1.0),
        ("inner_steps", 0),
        ("inner_lr", math.nan),
        ("inner_lr", -0.1),
        ("inner_lr", "0.1"),
        ("meta_lr", math.inf),
        ("meta_lr", 0.0),
        ("clip_gradient", -1.0),
        ("clip_gradient", math.nan),
        ("clip_norm", -0.1),
        ("clip_norm", math.inf),
        ("clip_norm", True),
        ("on_nonfinite", "ignore"),
        ("tensorboard", "yes"),
        ("quiet", 1),
        ("hidden", ()),
        ("hidden", (40, 0)),
        ("hidden", 40),
        ("activation", "swish"),
        ("backend", "fast"),
        ("device", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("threads", 0),
        ("first_order", 1),
        ("learn_inner_lr", "yes"),
        ("checkpoint_every", 0),
        ("log_every", True),
        ("output", "runs"),
    ],
)
def test_nonsense_is_refused_by_the_fields_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} is .*wanted|^{field} is 0; wanted"):
        SinusoidConfig(**{field: value})


def test_a_configuration_goes_through_json_and_back():
    config = SinusoidConfig(iterations=7, hidden=(6, 5), threads=1, output=Path("a/b"))
    values = json.loads(json.dumps(config.to_dict()))
    assert SinusoidConfig.from_run(values, "here") == config
    with pytest.raises(ConfigError, match=r"^here: unknown key 'shot'"):
        SinusoidConfig.from_run(values | {"shot": 1}, "here")
    with pytest.raises(ConfigError, match=r"^here: tasks is '3'; wanted is a whole number"):
        SinusoidConfig.from_run(values | {"tasks": "3"}, "here")


def test_a_checkpoint_that_names_no_kind_is_a_sinusoids():
    values = SinusoidConfig(iterations=7).to_dict()
    assert values.pop("kind") == "sinusoid"
    del values["clip_gradient"]  # which came later
    assert SinusoidConfig.from_run(values, "here") == SinusoidConfig(iterations=7)
    with pytest.raises(ConfigError, match=r"^here: a run of kind 'omniglot'; wanted is 'sinusoid'"):
        SinusoidConfig.from_run(values | {"kind": "omniglot"}, "here")
