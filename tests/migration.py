"""The code of docs/migration: each page's pairs of blocks, run as they stand and compared.

A page is in Markdown. Its Python blocks have titles: "setup", before the first section, is run for
each pair anew; in a section, the block titled with the peer's name leaves its meta-gradients in
`theirs`, the one titled "maml_fast" leaves its own in `ours`, both {name: tensor}.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PAGES = Path(__file__).parent.parent / "docs" / "migration"
COMMON = "index.md"
TOLERANCE = 1e-9  # of the largest number of a tensor, in float64; the pages say so
BLOCK = re.compile(r"^(## .+)$|^```python(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
TITLE = re.compile(r' title="([^"]+)"')


class Block(NamedTuple):
    section: str
    title: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The page's Python code. Raises ValueError for a block without a title."""
    found, section = [], ""
    for heading, options, code in BLOCK.findall(page.read_text()):
        if heading:
            section = heading.removeprefix("## ")
            continue
        title = TITLE.fullmatch(options)
        if title is None:
            raise ValueError(f"{page.name}, section '{section}': a Python block without a title")
        found.append(Block(section, title[1], code))
    return found


def pairs(page: Path) -> dict[str, list[Block]]:
    """What is run for each section that compares. Raises ValueError for other code."""
    setup, rest = [], {}
    for block in blocks(page):
        if block.title == "setup" and not block.section:
            setup.append(block)
        else:
            rest.setdefault(block.section, []).append(block)
    for section, two in rest.items():
        titles = [block.title for block in two]
        if len(titles) != 2 or titles[1] != "maml_fast" or titles[0] in ("setup", "maml_fast"):
            raise ValueError(
                f"{page.name}, section '{section}' has blocks {titles}; wanted are the peer's and "
                "then 'maml_fast'"
            )
    shared = [] if page.name == COMMON else blocks(PAGES / COMMON)
    return {section: [*shared, *setup, *two] for section, two in rest.items()}


def run(page: Path, section: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The peer's meta-gradients and ours, as the section's code leaves them."""
    scope: dict[str, object] = {"__name__": "migration"}
    with warnings.catch_warnings():
        if page.stem == "learn2learn":  # its imports of gym and torchvision
            warnings.simplefilter("ignore")
        for block in pairs(page)[section]:
            place = f"{page.name}, {section or 'setup'}, {block.title}"
            exec(compile(block.code, place, "exec", dont_inherit=True), scope)
    return scope["theirs"], scope["ours"]


def errors(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, of its largest number."""
    if theirs.keys() != ours.keys() or not theirs:
        raise ValueError(f"theirs has {sorted(theirs)}, ours has {sorted(ours)}")
    found = {}
    for name, wanted in theirs.items():
        if wanted.shape != ours[name].shape or wanted.dtype != torch.float64:
            raise ValueError(f"{name} is {wanted.dtype} {wanted.shape}, ours {ours[name].shape}")
        if not wanted.abs().max() > 1e-6:
            raise ValueError(f"{name} is all but 0 there, and nothing would be compared")
        found[name] = float((wanted - ours[name]).abs().max() / wanted.abs().max())
    return found


def main(page: Path) -> None:
    """Print {section: {tensor: error}} as JSON."""
    print(json.dumps({section: errors(*run(page, section)) for section in pairs(page)}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
