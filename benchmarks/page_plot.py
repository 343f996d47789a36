"""The pictures of the benchmark page, as SVG: plain text, the same for the same results."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from benchmarks.results import Results, Row

OURS, PEER, INK, GRID = "#1f5fa8", "#8a8a8a", "#222222", "#e4e4e4"
LEFT, RIGHT, TOP, STEP = 210, 24, 44, 24
WIDTH = 860
TITLES = {
    "speed": "How many times as fast as the fastest peer: ours blue, peers grey, a line a case",
    "peak": "Part of the peak, of as many threads each, that ours reach where they run a plan",
}


def pictures(results: Results) -> dict[str, str]:
    """By the names of TITLES."""
    return {"speed": speed(results), "peak": peak(results)}


def speed(results: Results) -> str:
    """A point an implementation, on a logarithmic axis."""
    lines = []
    for case in results.cases:
        peer = results.best(case, ours=False)
        timed = [row for row in results.of_case(case) if row.times and row.precision == "highest"]
        if peer is not None:
            lines.append((case, [(peer.median / row.median, row) for row in timed]))
    values = [value for _, points in lines for value, _ in points]
    low = 10 ** math.floor(math.log10(min(values, default=1.0)))
    high = 10 ** math.ceil(math.log10(max(values, default=10.0)))
    span = math.log10(high / low) or 1.0

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(value / low) / span

    body, y = [], TOP
    for case, points in lines:
        body.append(_text(LEFT - 8, y + 4, case, anchor="end"))
        body.append(_rule(LEFT, y, WIDTH - RIGHT, y))
        for value, row in sorted(points, key=lambda point: point[1].ours):
            colour = OURS if row.ours else PEER
            tip = html.escape(f"{row.title}: {value:.3g}x")
            body.append(
                f'<circle cx="{at(value):.1f}" cy="{y}" r="4.5" fill="{colour}" '
                f'fill-opacity="0.8"><title>{tip}</title></circle>'
            )
        y += STEP
    ticks = [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    axis = [_tick(at(value), y, f"{value:g}x", strong=value == 1) for value in ticks]
    return _svg(TITLES["speed"], y, [*axis, *body])


def peak(results: Results) -> str:
    """Bars from zero."""
    found: list[tuple[str, Row]] = []
    for case in results.cases:
        planned = [
            row
            for row in results.of_case(case)
            if row.ours and row.times and row.share is not None and row.precision == "highest"
        ]
        found += [(case, row) for row in sorted(planned, key=lambda row: row.title)]
    most = max([1.0, *(row.share or 0.0 for _, row in found)])

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT - 190) * value / most

    body, y = [], TOP
    previous = ""
    for case, row in found:
        share = row.share or 0.0
        if case != previous:
            y += 0 if not previous else 8
            body.append(_text(LEFT - 8, y + 4, case, anchor="end"))
        previous = case
        width = at(share) - LEFT
        body.append(
            f'<rect x="{LEFT}" y="{y - 7}" width="{width:.1f}" height="12" fill="{OURS}" '
            'fill-opacity="0.8"/>'
        )
        title = row.title.removeprefix("maml_fast ")
        body.append(_text(at(share) + 6, y + 4, f"{share:.0%} {title}"))
        y += 17
    axis = [_tick(at(value / 4), y + 6, f"{value / 4:.0%}") for value in range(int(most * 4) + 1)]
    return _svg(TITLES["peak"], y + 6, [*axis, *body])


def _svg(title: str, bottom: float, body: Sequence[str]) -> str:
    height = bottom + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        'font-family="sans-serif" font-size="12" role="img">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff" rx="6"/>'
    parts = [head, f"<title>{html.escape(title)}</title>", ground, *body, "</svg>"]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:g}" fill="{INK}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str = GRID) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}" stroke="{colour}"/>'


def _tick(x: float, bottom: float, label: str, strong: bool = False) -> str:
    rule = _rule(x, TOP - 16, x, bottom - 8, INK if strong else GRID)
    return rule + _text(x, bottom + 8, label, anchor="middle")
