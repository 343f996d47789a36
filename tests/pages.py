"""Pages of Markdown as a reader uses them: their Python runs, and their commands.

```python   runs, all blocks of a page in order and in one namespace
```output   what the block above it prints; "..." stands for anything
```console  lines "$ maml-fast ..." run, here in this process; what follows them is their output
```py       shown and not run: it must compile; with title="a file", an excerpt of that file
A comment right above a block of commands may say how the tests make them small,
    <!-- The tests run this with --iterations 3 --tasks 2 -->
whose options take the place of those given; with " | " between them, of each command its own.
"""

import contextlib
import doctest
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from maml_fast.cli import main

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = re.compile(r"<!-- The tests run this with (--[^>]*?) -->\s*$")
SHOWN_ONLY = ("make", "pip", "git", "python", "python3", "torchrun")  # commands not run here
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Block:
    """A fenced block."""

    language: str
    title: str  # of title="...": the file that it is an excerpt of
    text: str
    line: int  # of its first line of text
    smaller: list[list[str]]  # options for its commands, or for each
    before: str  # the text between the block above and this one


def blocks(text: str) -> list[Block]:
    """A page's fenced blocks, in order."""
    found, end = [], 0
    for match in FENCE.finditer(text):
        before = text[end : match.start()]
        end = match.end()
        smaller = SMALLER.search(before)
        title = re.search(r'title="([^"]*)"', match[2])
        found.append(
            Block(
                match[1],
                title[1] if title else "",
                match[3],
                text.count("\n", 0, match.start()) + 2,
                [shlex.split(part) for part in smaller[1].split(" | ")] if smaller else [[]],
                before,
            )
        )
    return found


def links(path: Path) -> list[str]:
    """Where a page links to, of what is beside it."""
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    return re.findall(r"\]\((?!http|#)([^)\s]+)\)", text)


def run(path: Path) -> str:
    """Run a page in the folder where this process is; AssertionError where it tells otherwise.

    Returns what its Python printed.
    """
    scope: dict[str, object] = {"__name__": "page"}
    printed, last = [], ""
    for block in blocks(path.read_text(encoding="utf-8")):
        where = f"{path.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.text
            code = compile(padded, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, scope)
            last = out.getvalue()
            printed.append(last)
        elif block.language == "py" and not block.title:
            compile(block.text, where, "exec")
        elif block.language == "output":
            assert not block.before.strip(), f"{where}: output without the code above it"
            check(block.text, last, where)
        elif block.language == "console":
            given = commands(block.text)
            options = block.smaller * len(given) if len(block.smaller) == 1 else block.smaller
            for (command, wanted), smaller in zip(given, options, strict=True):
                run_command(command, wanted, smaller, where)
    return "".join(printed)


def commands(text: str) -> list[tuple[str, str]]:
    """Commands and what they print, if the page says it."""
    found: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:].strip(), ""))
        else:
            command, wanted = found.pop()
            found.append((command, wanted + line))
    return found


def run_command(command: str, wanted: str, smaller: list[str], where: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if program != "maml-fast":
        assert program in SHOWN_ONLY, f"{where}: cannot run {program}"
        return
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(with_options(arguments, smaller))
    assert status == 0, f"{where}: {command} ended with {status}"
    if wanted:
        check(wanted, out.getvalue(), where)


def with_options(arguments: list[str], options: list[str]) -> list[str]:
    """Arguments, of which those options that are given anew are left out."""
    flags = {word for word in options if word.startswith("--")}
    kept, dropping = [], False
    for word in arguments:
        if word.startswith("--"):
            dropping = word in flags
        if not dropping:
            kept.append(word)
    return kept + options


def check(wanted: str, found: str, where: str) -> None:
    checker = doctest.OutputChecker()
    right = checker.check_output(wanted, found, ALIKE)
    assert right, f"{where}: wanted\n{wanted}\nbut found\n{found}"
