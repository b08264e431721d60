"""Log-log plots of growth as one SVG, as `evaluate/figures.py` draws: no plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SIDE, GAP, COLUMNS = 200.0, 58.0, 4
COLOUR = "#0072b2"


def growth_plots(found: Sequence[Mapping[str, Any]]) -> str:
    """Return one small plot each: points, and the line of the fitted exponent through their middle."""
    rows = math.ceil(len(found) / COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + 12, rows * (SIDE + GAP) + 12
    parts = [
        _plot(one, GAP + index % COLUMNS * (SIDE + GAP), 28 + index // COLUMNS * (SIDE + GAP))
        for index, one in enumerate(found)
    ]
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        'font-family="sans-serif" font-size="11" aria-label="Time against size, both logarithmic" '
        f'xmlns="http://www.w3.org/2000/svg"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _plot(one: Mapping[str, Any], left: float, top: float) -> str:
    sizes, values = one["sizes"], one["values"]
    xs, ys = [math.log10(size) for size in sizes], [math.log10(value) for value in values]
    middle = (sum(xs) / len(xs), sum(ys) / len(ys))
    fitted = [middle[1] + one["exponent"] * (x - middle[0]) for x in (xs[0], xs[-1])]
    low, high = min(*ys, *fitted) - 0.1, max(*ys, *fitted) + 0.1
    span = xs[-1] - xs[0]

    def x(value: float) -> float:
        return float(left + 8 + (value - xs[0]) / span * (SIDE - 16))

    def y(value: float) -> float:
        return float(top + SIDE - 30 - (value - low) / (high - low) * (SIDE - 30))

    dots = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="{COLOUR}"/>' for a, b in zip(xs, ys, strict=True)
    )
    ends = ((xs[0], sizes[0], "start"), (xs[-1], sizes[-1], "end"))
    under = "".join(
        f'<text x="{x(at):.1f}" y="{top + SIDE - 14:.1f}" text-anchor="{anchor}">{size:,}</text>'
        for at, size, anchor in ends
    )
    beside = "".join(
        f'<text x="{left - 5:.1f}" y="{y(at) + 4:.1f}" text-anchor="end">{10**at:.3g}</text>'
        for at in (min(ys), max(ys))
    )
    return (
        f'<text x="{left:.1f}" y="{top - 8:.1f}" font-weight="600">{escape(one["name"])}, {one["unit"]}: '
        f"{one['exponent']:.2f}</text>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{SIDE:g}" height="{SIDE - 30:g}" fill="none" stroke="#bbb"/>'
        f'<line x1="{x(xs[0]):.1f}" y1="{y(fitted[0]):.1f}" x2="{x(xs[-1]):.1f}" y2="{y(fitted[1]):.1f}" '
        f'stroke="#d55e00" stroke-dasharray="4 3"/>{dots}{under}{beside}'
    )
