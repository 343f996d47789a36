"""Small runs on images, and what they wrote."""

import json

from maml_fast.config_images import FolderConfig, OmniglotConfig
from tests.pictures import make_archive, make_folder


def folder_run(tmp_path):
    """A small run, validated every second iteration."""
    return FolderConfig(
        data=(make_folder(tmp_path / "images", classes=9),),
        iterations=6,
        ways=3,
        tasks=2,
        query_shots=2,
        inner_lr=0.5,
        inner_steps=1,
        evaluation_steps=2,
        image_size=16,
        filters=4,
        validate_every=2,
        validation_tasks=4,
        backend="reference",
        seed=3,
        threads=1,
        log_every=3,
        checkpoint_every=4,
        output=tmp_path / "run",
    )


def omniglot_run(tmp_path):
    """A smaller one on two archives."""
    return OmniglotConfig(
        data=(
            make_archive(tmp_path / "one.zip", {"Greek": 4, "Latin": 3}),
            make_archive(tmp_path / "two.zip", {"Korean": 3}),
        ),
        iterations=2,
        ways=3,
        tasks=2,
        validate_every=2,
        validation_tasks=2,
        model="fc",
        backend="reference",
        threads=1,
        output=tmp_path / "omniglot",
    )


def read_history(config):
    text = (config.output / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
