"""The configurations of image runs: the defaults of the paper, limits, and a way through JSON."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from maml_fast.config import ConfigError
from maml_fast.config_images import FolderConfig, OmniglotConfig


def test_the_defaults_are_the_papers():
    five, many = OmniglotConfig(), OmniglotConfig.recipe({"ways": 20, "shots": 5})
    assert (five.ways, five.shots, five.query_shots, five.tasks) == (5, 1, 1, 32)
    assert (five.inner_steps, five.evaluation_steps, five.inner_lr) == (1, 3, 2.0)
    assert (five.iterations, five.meta_lr, five.rotations) == (60_000, 1e-3, True)
    assert many == {"tasks": 16, "query_shots": 5, "inner_steps": 5, "evaluation_steps": 5}
    images = FolderConfig()
    assert (images.image_size, images.filters, images.tasks, images.query_shots) == (84, 32, 4, 15)
    assert (images.inner_steps, images.evaluation_steps, images.inner_lr) == (5, 10, 0.05)
    for kind, default in ((OmniglotConfig, five), (FolderConfig, images)):
        chosen = {name: getattr(default, name) for name in kind.recipe_for}
        for name, value in kind.recipe(chosen).items():
            assert getattr(default, name) == value
    five_shots = FolderConfig.recipe({"ways": 5, "shots": 5, "query_shots": 15})
    assert five_shots == {"tasks": 2, "inner_lr": 0.05, "clip_gradient": 50 / 75}


@pytest.mark.parametrize("query_shots", [1, 15])
def test_rates_and_limits_are_the_original_codes_in_another_convention(query_shots):
    """Rows' losses divided by the shots and added up, with the original's rate and limit."""
    generator = torch.Generator().manual_seed(0)
    ways, shots = 5, 2
    logits = torch.randn(ways * shots, ways, generator=generator, requires_grad=True)
    labels = torch.arange(ways).repeat_interleave(shots)
    summed = cross_entropy(logits, labels, reduction="none").sum() / shots
    original = 0.01 * torch.autograd.grad(summed, logits)[0]
    recipe = FolderConfig.recipe({"ways": ways, "shots": shots, "query_shots": query_shots})
    ours = recipe["inner_lr"] * torch.autograd.grad(cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(ours, original)
    # A query loss of the original's is as many times the mean as it has rows for each shot.
    assert recipe["clip_gradient"] * ways * query_shots / shots == pytest.approx(10)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (OmniglotConfig, "ways", 0),
        (OmniglotConfig, "model", "resnet"),
        (OmniglotConfig, "evaluation_steps", 0),
        (OmniglotConfig, "rotations", 1),
        (OmniglotConfig, "validation_classes", -1),
        (OmniglotConfig, "validation_tasks", 1),
        (OmniglotConfig, "validate_every", 0),
        (OmniglotConfig, "data", ("a.zip",)),
        (OmniglotConfig, "download", "here"),
        (OmniglotConfig, "alphabets_for_validation", "Greek"),
        (FolderConfig, "image_size", 0),
        (FolderConfig, "channels", 2),
        (FolderConfig, "filters", 0),
        (FolderConfig, "folders_for_validation", ("",)),
    ],
)
def test_nonsense_is_refused_by_the_fields_name(kind, field, value):
    with pytest.raises(ConfigError, match=rf"^{field} is .*; wanted"):
        kind(**{field: value})


@pytest.mark.parametrize(("kind", "default"), [(OmniglotConfig, 64), (FolderConfig, 32)])
def test_a_network_without_convolutions_has_no_filters(kind, default):
    assert kind(model="fc").filters == default  # which nothing reads
    with pytest.raises(ConfigError, match=r"^filters is 7, but the model fc has none; leave"):
        kind(model="fc", filters=7)


def test_held_out_classes_are_named_or_counted_not_both():
    with pytest.raises(ConfigError, match=r"^validation_classes is 3, .* \(Greek, Latin\)"):
        OmniglotConfig(validation_classes=3, alphabets_for_validation=("Greek", "Latin"))


@pytest.mark.parametrize(
    "config",
    [
        OmniglotConfig(data=(Path("a.zip"), Path("b")), alphabets_for_validation=("Greek",)),
        FolderConfig(data=(Path("images"),), validation_classes=7, threads=2),
    ],
)
def test_a_configuration_goes_through_json_and_back(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert values["kind"] == config.kind
    assert type(config).from_run(values, "here") == config
    with pytest.raises(ConfigError, match=r"^here: a run of kind 'sinusoid'; wanted is"):
        type(config).from_run(values | {"kind": "sinusoid"}, "here")
