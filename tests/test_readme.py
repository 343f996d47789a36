"""The README's Python code and commands run, in order, as a new user would paste them."""

from tests.pages import ROOT, blocks, links, run
from tests.pictures import make_archive

README = ROOT / "README.md"


def test_the_code_runs(tmp_path, monkeypatch):
    make_archive(tmp_path / "images_background.zip", {"Greek": 6, "Korean": 1}, drawings=2)
    monkeypatch.chdir(tmp_path)
    assert sum(block.language == "python" for block in blocks(README.read_text())) >= 3
    printed = run(README)
    assert "backend cpu" in printed
    assert "against the float64 reference" in printed


def test_what_it_links_to_exists():
    targets = links(README)
    assert len(targets) > 10
    for target in targets:
        assert (README.parent / target.split("#")[0]).exists(), target
