"""Curves over the steps of a run: as blocks for a terminal, and as small SVG pictures for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
Points = Sequence[tuple[int, float]]


def means(points: Points, most: int) -> list[tuple[int, float]]:
    """At most that many points of a curve, each the mean of its share of neighbours, at the last one's step."""
    count = min(most, len(points))
    shares = (points[len(points) * i // count : len(points) * (i + 1) // count] for i in range(count))
    return [(share[-1][0], sum(value for _, value in share) / len(share)) for share in shares]


def sparkline(points: Points, width: int = 32) -> str:
    """A curve as at most `width` blocks."""
    values = [value for _, value in means(points, width)]
    low, span = min(values), max(values) - min(values)
    return "".join(_BLOCKS[round((value - low) / span * 7) if span else 0] for value in values)


def chart(
    points: Points, name: str, *, recent: int = 1, mark: int | None = None, width: int = 480, height: int = 120
) -> str:
    """A curve by step as an SVG picture; where `recent` is above 1 it is pale, and over it the mean of so many points.

    mark is a step to draw a line at. Words and axes take the colour of the text around the picture, so that it suits
    light and dark pages. Empty where there are not two points.
    """
    if len(points) < 2:
        return ""
    points = means(points, 120)
    first, last = points[0][0], points[-1][0]
    low, high = min(value for _, value in points), max(value for _, value in points)
    left, top, right, bottom = 56, 10, width - 10, height - 22
    steps, span = (last - first) or 1, (high - low) or 1
    lines = ""
    for width_of_mean, opacity in dict.fromkeys([(1, 0.35 if recent > 1 else 1), (recent, 1)]):
        # The loss of one step is mostly that of its random timesteps.
        shares = [[value for _, value in points[max(0, i + 1 - width_of_mean) : i + 1]] for i in range(len(points))]
        places = " ".join(
            f"{left + (step - first) / steps * (right - left):.1f},"
            f"{bottom - (sum(share) / len(share) - low) / span * (bottom - top):.1f}"
            for (step, _), share in zip(points, shares)
        )
        lines += f'<polyline points="{places}" fill="none" stroke="#3b82f6" stroke-width="2" opacity="{opacity}"/>'
    if mark is not None and first <= mark <= last:
        x = left + (mark - first) / steps * (right - left)
        lines += f'<path d="M{x:.1f} {top}V{bottom}" stroke="#16a34a" stroke-width="2" stroke-dasharray="4 3"/>'
    labels = (
        (left - 6, top + 4, "end", f"{high:.3g}"),
        (left - 6, bottom + 4, "end", f"{low:.3g}"),
        (left, height - 6, "start", f"step {first}"),
        (right, height - 6, "end", f"step {last}"),
    )
    words = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in labels)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(name)} from step {first} to {last}" style="max-width:100%;display:block">'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="currentColor" stroke-opacity="0.35"/>'
        f'{lines}<g fill="currentColor" font-size="11" font-family="sans-serif">{words}</g></svg>'
    )
