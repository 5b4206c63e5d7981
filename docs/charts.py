"""The chart of the README, drawn from the table in docs/benchmarks.md: `python docs/charts.py` writes it anew.

tests/test_docs.py checks that it is up to date.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SPEED = DOCS / "images" / "speed.svg"
SHADES = ("#2f6fde", "#8a8f98", "#a9adb5", "#c8cbd1")  # ours, and the others
BAR, GAP, LEFT, WIDTH = 16, 14, 230, 420  # pixels


def speed() -> str:
    """Bars an engine for each workload of "Where it stands"; within a workload the longest is the fastest."""
    table = (DOCS / "benchmarks.md").read_text().split("## Where it stands")[1].split("\n\n")[2]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    shapes, y = [], 10
    for workload, *cells in rows:
        shown = [(engine, cell, _value(cell)) for engine, cell in zip(head[1:], cells, strict=True) if cell != "-"]
        most = max(value for _, _, value in shown)
        middle = y + len(shown) * BAR / 2 + 4
        shapes.append(f'<text x="{LEFT - 12}" y="{middle:.0f}" text-anchor="end">{escape(workload)}</text>')
        for engine, cell, value in shown:
            width = WIDTH * value / most
            shade = SHADES[head.index(engine) - 1]
            shapes.append(f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR - 2}" fill="{shade}"/>')
            label = f"{engine} {cell}"
            shapes.append(f'<text x="{LEFT + width + 6:.0f}" y="{y + 11}" class="small">{escape(label)}</text>')
            y += BAR
        y += GAP
    style = "text{font:13px sans-serif;fill:#777}.small{font-size:11px}"
    size = f'width="{LEFT + WIDTH + 150}" height="{y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="tokens a second, by engine">',
            f"<style>{style}</style>",
            *shapes,
            "</svg>\n",
        ]
    )


def _value(cell: str) -> float:
    """Of "190", "28.4 (Q4_0)" or "1500-1840", of which it is the middle."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell.split("(")[0])]
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    SPEED.write_text(speed())
