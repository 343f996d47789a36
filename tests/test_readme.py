"""The README's Python code runs, in order, as a new user would paste it."""

import re
from pathlib import Path

import torch

from tests.pictures import make_archive

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs(capsys, tmp_path, monkeypatch):
    make_archive(tmp_path / "images_background.zip", {"Greek": 6, "Korean": 1}, drawings=2)
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    printed = capsys.readouterr().out
    assert "backend cpu" in printed
    assert "against the float64 reference" in printed


def test_what_it_links_to_exists():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text()):
        assert (README.parent / target.split("#")[0]).exists(), target
