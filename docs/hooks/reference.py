"""A line "::: maml_fast.MAML" of a page becomes that object's signature and docstring.

The docstrings are plain text for reading in an editor: paragraphs, entries "name: what it is" with
their further lines indented, sections such as "Args:", and indented formulas.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

from mkdocs.exceptions import PluginError

LINE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (.*)$")
LISTED = re.compile(r"^(\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*): (.*)$")  # in a section
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Parameters):$")
LONG = 88


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Called by mkdocs with the page's text. Raises PluginError for a name that there is not."""

    def described(found: re.Match[str]) -> str:
        try:
            return describe(found[1])
        except (AttributeError, ModuleNotFoundError) as error:
            raise PluginError(f"{page.file.src_uri}: {found[0]}: {error}") from None

    return LINE.sub(described, markdown)


def describe(name: str) -> str:
    """Markdown of an object, named with its module: a heading, the signature, the docstring."""
    thing = find(name)
    short = ".".join(part for part in name.split(".") if part != "maml_fast")
    text = f"### {short} {{ #{name} }}\n\n```py\n{signature(short, thing)}\n```\n\n"
    return text + as_markdown(inspect.getdoc(thing) or "")


def find(name: str) -> Any:
    """The object of that name; a function goes before the module that it is named like."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


def signature(name: str, thing: Any) -> str:
    """As it is called, an argument a line where it is long."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    arguments = [written(one) for one in found.parameters.values() if one.name != "self"]
    starred = [one for one in found.parameters.values() if one.kind is one.KEYWORD_ONLY]
    if starred and not any(one.kind is one.VAR_POSITIONAL for one in found.parameters.values()):
        arguments.insert(-len(starred) or len(arguments), "*")
    whole = f"{name}({', '.join(arguments)})"
    if len(whole) > LONG:
        whole = f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    returns = found.return_annotation
    if inspect.isclass(thing) or returns is inspect.Signature.empty:
        return whole
    return f"{whole} -> {type_name(returns)}"


def written(argument: inspect.Parameter) -> str:
    """One argument, as in a definition."""
    stars = {argument.VAR_POSITIONAL: "*", argument.VAR_KEYWORD: "**"}.get(argument.kind, "")
    text = stars + argument.name
    annotated = argument.annotation is not argument.empty
    if annotated:
        text += f": {type_name(argument.annotation)}"
    if argument.default is argument.empty:
        return text
    default = re.sub(r"^(?:Posix|Windows)(?=Path)", "", repr(argument.default))
    if default.startswith("<"):  # a function, or a mark of no use to a reader
        default = "..."
    return f"{text} = {default}" if annotated else f"{text}={default}"


def type_name(annotation: Any) -> str:
    """As it was written, where that is known."""
    if isinstance(annotation, str):
        return annotation.strip("'\"")
    if inspect.isclass(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def as_markdown(doc: str, entries: re.Pattern[str] = ENTRY) -> str:
    """A docstring in Markdown."""
    lines, out, i = doc.splitlines(), [], 0
    while i < len(lines):
        line = lines[i]
        indented = i + 1
        while indented < len(lines) and (not lines[indented] or lines[indented][0] == " "):
            indented += 1
        block = textwrap.dedent("\n".join(lines[i + 1 : indented]))
        if SECTION.match(line):
            out += ["", f"**{line}**", "", as_markdown(block, LISTED), ""]
            i = indented
        elif entry := entries.match(line):
            first, _, rest = block.partition("\n\n")  # after a gap comes something else
            words = " ".join([entry[2], *first.split("\n")])
            out += ["", f"`{entry[1]}`", f":   {plain(words.strip())}", ""]
            out += [as_markdown(rest, entries), ""]
            i = indented
        elif line.startswith("    "):  # a formula, or an example
            out += ["", "```text"]
            while i < len(lines) and (not lines[i] or lines[i][0] == " "):
                out.append(lines[i][4:])
                i += 1
            out += ["```", ""]
        else:
            out.append(plain(line))
            i += 1
    return "\n".join(out)


def plain(line: str) -> str:
    """Signs that Markdown would take for its own, outside of code, as themselves."""
    parts = line.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_$\[])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "`".join(parts)
