"""`vibe-sgl-lite top`: what a running engine does, in the terminal, until Ctrl-C.

The same as the page of the HTTP server: queue, rows of the batch, pages, radix tree, speed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vibe_sgl_lite.runtime.client.client import Client
from vibe_sgl_lite.runtime.errors import VibeError

CLEAR, HOME, REST = "\x1b[2J", "\x1b[H", "\x1b[J"
CELLS = " ░▒█"  # free, cached, cached and in use, one request's


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("vibe-sgl-lite top", description=__doc__)
    parser.add_argument("--address", help="as the daemon's ready line shows it (default: the daemon called 'default')")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print one look, and leave")
    args = parser.parse_args(argv)
    if not 0.1 <= args.interval <= 3600:
        parser.error(f"--interval {args.interval}: must be 0.1 to 3600 seconds")
    try:
        with Client(args.address) as client:
            _watch(client, args.interval, args.once)
    except VibeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _watch(client: Client, interval: float, once: bool) -> None:
    if not once:
        sys.stdout.write(CLEAR)
    tokens, looked_at = None, 0.0
    while True:
        view = client.watch()
        now = time.monotonic()
        total = view["stats"]["completion_tokens_total"]
        rate = 0.0 if tokens is None else (total - tokens) / (now - looked_at)
        tokens, looked_at = total, now
        size = shutil.get_terminal_size()
        lines = [line[: size.columns] for line in render(client.model.name, view, rate)]
        if once:
            sys.stdout.write("\n".join(lines) + "\n")
            return
        sys.stdout.write(HOME + "\x1b[K\n".join(lines[: size.lines - 1]) + REST)
        sys.stdout.flush()
        time.sleep(interval)


def render(model: str, view: dict[str, Any], rate: float) -> Iterator[str]:
    """Lines of one look. view: scheduler/snapshot.py. rate: generated tokens a second."""
    stats = view["stats"]
    prompt = stats["prompt_tokens_total"]
    hits = 100 * stats["cached_tokens_total"] / prompt if prompt else 0.0
    pages = stats["kv_pages_total"]
    yield (
        f"{model}: {rate:.0f} tokens/s, {stats['num_running']} running, {stats['num_waiting']} waiting, "
        f"{hits:.0f} % of prompt tokens cached, {stats['steps_total']} steps"
    )
    held = pages - stats["kv_pages_free"] - stats["kv_pages_evictable"]
    yield f"pages: {held} of {pages} in use, {stats['kv_pages_cached']} cached, {stats['kv_pages_free']} free"
    page_map = view["page_map"].rstrip("0")
    if page_map:
        yield "[" + "".join(CELLS[int(cell)] for cell in page_map) + "]"
    yield ""
    yield f"{'request':20} {'phase':8} {'prompt':>7} {'cached':>7} {'generated':>9} {'limit':>7}"
    for row in [*view["rows"], *view["waiting"]]:
        name = row["rid"][:16] + (f"/{row['index']}" if row["index"] else "")
        limit = row["limit"] - row["prompt"]
        yield (f"{name:20} {row['phase']:8} {row['prompt']:7} {row['cached']:7} {row['generated']:9} {limit:7}")
    yield ""
    yield f"radix tree: {len(view['nodes'])} nodes shown"
    yield from _tree(view["nodes"])


def _tree(nodes: list[dict[str, Any]]) -> Iterator[str]:
    children: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        children.setdefault(node["parent"], []).append(place)
    stack = [(place, 0) for place in reversed(children.get(-1, []))]
    while stack:
        place, depth = stack.pop()
        node = nodes[place]
        users = f", {node['users']} running" if node["users"] else ""
        yield f"{'  ' * depth}{node['tokens']} tokens{users}"
        stack += [(child, depth + 1) for child in reversed(children.get(place, []))]
