"""Bar charts as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

WIDTH, CHART_HEIGHT, BAR_HEIGHT, LABEL_WIDTH = 640, 30, 18, 110
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2")


def bars(title: str, charts: Mapping[str, Mapping[str, float]]) -> str:
    """One chart below the other: {title of the chart: {name of the bar: value, not negative}}."""
    parts = [f'<text x="10" y="24" font-size="16">{escape(title)}</text>']
    y = 40
    for chart, values in charts.items():
        y += CHART_HEIGHT
        parts.append(f'<text x="10" y="{y - 8}" font-size="13" font-weight="bold">{escape(chart)}</text>')
        largest = max(values.values(), default=0.0) or 1.0
        for index, (name, value) in enumerate(values.items()):
            length = (WIDTH - LABEL_WIDTH - 120) * value / largest
            colour = COLOURS[index % len(COLOURS)]
            parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
            parts.append(
                f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT - 4}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{y + 12}">{value:.4g}</text>')
            y += BAR_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
