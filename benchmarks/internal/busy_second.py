r"""A picture of one busy second, from a scheduler trace: every step as it ran, and what lies between two.

    python benchmarks/gpu_offline.py --model-path qwen3-0.6b --load-format dummy --trace trace
    python benchmarks/internal/busy_second.py trace docs/images/gpu-second.svg

The second begins with the first request of the last time that 200 or more came together. A step ends when its result
reaches the scheduler, and took what the rank measured; the height of its bar is its rows, of 256.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/busy_second.py` finds the packages

from vibe_sgl_lite.runtime.messages import StepResult  # noqa: E402
from vibe_sgl_lite.scheduler.core import Scheduler  # noqa: E402
from vibe_sgl_lite.scheduler.tools.trace import read_trace  # noqa: E402

TOGETHER, LINES, WIDTH, HEIGHT, ROWS = 200, 5, 1000, 44, 256
DECODE, CHUNK = "#2f6fde", "#e08a2e"


class Ran(NamedTuple):
    """Seconds since the burst's first request; chunk: prompt tokens."""

    begin: float
    end: float
    rows: int
    chunk: int


def last_burst(path: Path) -> list[Ran]:
    config, events = read_trace(path)
    core, burst, arrived, first = Scheduler(config), list[Ran](), 0, 0.0
    ran: list[Ran] = []
    for event in events:
        step = core.oldest_step
        if event.call == "add":
            if not core.client_requests:
                arrived, first, ran = 0, float(event.args[1]), []  # type: ignore[arg-type]
            arrived += 1
        getattr(core, event.call)(*event.args)
        result = event.args[0]
        if event.call == "complete" and step is not None and isinstance(result, StepResult):
            end, chunk = float(event.args[1]) - first, sum(part.count for part in step.chunks)  # type: ignore[arg-type]
            ran.append(Ran(end - result.total_s, end, len(step.decode) + len(step.chunks), chunk))
            if arrived >= TOGETHER:
                burst = ran
    return [step for step in burst if step.begin < 1.0]


def draw(steps: list[Ran]) -> str:
    line_s, gap = 1.0 / LINES, HEIGHT + 26
    shapes = []
    for step in steps:
        for line in range(int(step.begin / line_s), min(LINES - 1, int(step.end / line_s)) + 1):
            begin, end = max(step.begin - line * line_s, 0.0), min(step.end - line * line_s, line_s)
            if end > begin:
                x, width = 40 + begin / line_s * WIDTH, (end - begin) / line_s * WIDTH
                height = 6 + (HEIGHT - 6) * step.rows / ROWS
                color = CHUNK if step.chunk else DECODE
                shapes.append(
                    f'<rect x="{x:.2f}" y="{line * gap + 20 + HEIGHT - height:.1f}" width="{width:.2f}" '
                    f'height="{height:.1f}" fill="{color}" stroke="#fff" stroke-width=".4"/>'
                )
    for line in range(LINES):
        label = f"{line * line_s * 1e3:.0f} ms"
        shapes.append(f'<text x="0" y="{line * gap + 16 + HEIGHT}">{label}</text>')
    idle = sum(max(0.0, late.begin - early.end) for early, late in pairwise(steps))
    chunks = sum(step.end - step.begin for step in steps if step.chunk)
    told = (
        f"{len(steps)} steps; with chunks of prompts (orange) {chunks * 1e3:.0f} ms; before the first "
        f"{max(0.0, steps[0].begin) * 1e3:.1f} ms; between two of them {idle * 1e3:.1f} ms in all"
    )
    shapes.append(f'<text x="40" y="{LINES * gap + 14}">{told}</text>')
    size = f'width="{WIDTH + 60}" height="{LINES * gap + 24}"'
    style = "<style>text{font:11px sans-serif;fill:#777}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="one busy second of a GPU">'
    return "\n".join([head, style, *shapes, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    options.picture.write_text(draw(last_burst(options.trace)))


if __name__ == "__main__":
    main()
