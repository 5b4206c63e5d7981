"""Charts of README and pages, drawn from tables in docs/benchmarks.md: `python docs/charts.py` writes them anew.

tests/test_docs.py checks that they are up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
SHADES = ("#2f6fde", "#8a8f98", "#a9adb5", "#c8cbd1")  # ours, and the others
BAR, GAP, WIDTH = 16, 14, 420  # pixels


class Bar(NamedTuple):
    """shade: which of SHADES. label: with the value as the table has it."""

    value: float
    label: str
    shade: int


def speed() -> str:
    """Tokens a second of each engine, by workload: the table of "Where it stands"."""
    head, *rows = _table("## Where it stands")
    groups = [
        (workload, [Bar(_value(cell), f"{engine} {cell}", n) for n, engine, cell in _cells(head, cells)])
        for workload, *cells in rows
    ]
    return _bars(groups, "tokens a second, by engine", left=230)


def gpu() -> str:
    """Tokens a second on one GPU beside what its memory and multipliers allow: the table of "One GPU"."""
    _, *rows = _table("## One GPU")
    head = ["", "tokens/s", "would be the card's limit"]
    groups = [
        (
            workload.split("(")[0].replace("`", "").strip(),
            [Bar(_value(cell), f"{cell} {told}", n) for n, told, cell in _cells(head, cells[:2])],
        )
        for workload, *cells in rows
        if cells[1] != "-"
    ]
    return _bars(groups, "output tokens a second on one H100, beside the floor of its bytes", left=330)


CHARTS = {IMAGES / "speed.svg": speed, IMAGES / "gpu.svg": gpu}


def _table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without the line under its head."""
    lines = (DOCS / "benchmarks.md").read_text().split(heading)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")]
    end = next((n for n, line in enumerate(lines[start:]) if not line.startswith("|")), len(rows))
    return [rows[0], *rows[2:end]]


def _cells(head: Sequence[str], cells: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(number, column, cell) of the cells that have a value."""
    for number, (column, cell) in enumerate(zip(head[1:], cells, strict=False)):
        if cell != "-":
            yield number, column, cell


def _bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, left: int) -> str:
    """A group of bars for each name; the longest of a group has the full width."""
    shapes, y = [], 10
    for name, bars in groups:
        most = max(bar.value for bar in bars)
        middle = y + len(bars) * BAR / 2 + 4
        shapes.append(f'<text x="{left - 12}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>')
        for bar in bars:
            width = WIDTH * bar.value / most
            shapes.append(
                f'<rect x="{left}" y="{y}" width="{width:.0f}" height="{BAR - 2}" fill="{SHADES[bar.shade]}"/>'
            )
            shapes.append(f'<text x="{left + width + 6:.0f}" y="{y + 11}" class="small">{escape(bar.label)}</text>')
            y += BAR
        y += GAP
    style = "text{font:13px sans-serif;fill:#777}.small{font-size:11px}"
    size = f'width="{left + WIDTH + 150}" height="{y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">',
            f"<style>{style}</style>",
            *shapes,
            "</svg>\n",
        ]
    )


def _value(cell: str) -> float:
    """Of "190", "20,251", "28.4 (Q4_0)" or "1500-1840", of which it is the middle."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell.split("(")[0].replace(",", ""))]
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    for path, draw in CHARTS.items():
        path.write_text(draw())
