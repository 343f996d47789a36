"""Formulas of a page as MathML, which browsers draw by themselves: no script, no font to fetch."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex leaves of $...$ and $$...$$
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL | re.MULTILINE
)


def on_page_content(content: str, page: Any, **context: Any) -> str:
    """Called by mkdocs with the page's HTML.

    Raises PluginError for a formula that is not understood.
    """
    where = page.file.src_uri

    def drawn(found: re.Match[str]) -> str:
        kind, latex = found[1], html.unescape(found[2]).strip()
        display = "block" if kind == "div" else "inline"
        mathml = convert(latex, display=display)
        if "\\" in mathml or re.search(r"&(?!#?\w+;)", mathml):
            raise PluginError(f"{where}: no MathML for the formula {latex!r}")
        return f'<div class="formula">{mathml}</div>' if kind == "div" else mathml

    return FORMULA.sub(drawn, content)
