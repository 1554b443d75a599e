"""A picture of a trace: each span a bar on a common axis of time, below the span that it is part of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_ROW, _LEFT, _WIDTH, _RIGHT = 30, 250, 640, 70
_COLOURS = {
    "dstack.queued": "#9aa5b1",
    "dstack.provisioning": "#d9a441",
    "dstack.pulling": "#7a6fb0",
    "dstack.running": "#3d8b5f",
}
_FAILED, _OTHER = "#b5473c", "#4a7fb5"


class Bar(NamedTuple):
    """One span: its name, its begin and end in seconds, how deep it is, and whether it is an error."""

    name: str
    begin: float
    end: float
    depth: int
    is_error: bool


def draw(bars: Sequence[Bar]) -> str:
    """Return the picture of some spans as an SVG."""
    start, end = min(bar.begin for bar in bars), max(bar.end for bar in bars)
    scale, height = _WIDTH / max(end - start, 0.001), _ROW * len(bars) + 40
    step = next(each for each in (1, 2, 5, 10, 30, 60, 600) if (end - start) / each <= 12)
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for second in range(0, int(end - start) + 1, step):
        x = _LEFT + second * scale
        parts.append(f'<line x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{height - 28}" stroke="#e3e6ea"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle" fill="#667">{second} s</text>'
        )
    for number, bar in enumerate(bars):
        y, x, long = 12 + number * _ROW, _LEFT + (bar.begin - start) * scale, (bar.end - bar.begin) * scale
        colour = _FAILED if bar.is_error else _COLOURS.get(bar.name, _OTHER)
        text = f"{bar.end - bar.begin:.1f} s" + (" (error)" if bar.is_error else "")
        parts += [
            f'<text x="{12 + 14 * bar.depth}" y="{y + 15}" fill="#222">{escape(bar.name)}</text>',
            f'<rect x="{x:.1f}" y="{y}" width="{max(long, 2):.1f}" height="20" rx="3" fill="{colour}"/>',
        ]
        # Beside its bar, on the side that has room.
        at, anchor = (x + long + 6, "start") if x + long < _LEFT + _WIDTH - 40 else (x + long - 6, "end")
        fill = "#222" if anchor == "start" else "white"
        if anchor == "end" and long < 90:
            at, fill = x - 6, "#222"
        parts.append(f'<text x="{at:.1f}" y="{y + 15}" text-anchor="{anchor}" fill="{fill}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])
