"""What a person sees of a scheduler at one moment: queue, running rows, pages, the radix tree. Changes nothing.

Everything is bounded, so that looking ten times a second costs little, whatever is cached.
"""

from __future__ import annotations

from array import array

import msgspec

from vibe_sgl_lite.scheduler.radix_cache import TOKEN_BYTES, RadixNode
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.state import SchedulerState

MAX_ROWS = 64
MAX_WAITING = 32
MAX_NODES = 200  # shown
MAX_WALKED = 2000  # looked at for the page map
MAX_CELLS = 1024
HEAD_TOKENS = 24
FREE, CACHED, SHARED, OWN = range(4)  # a page: nobody's, in the tree, in the tree and in use, one request's


class Row(msgspec.Struct):
    """A request that waits or runs. phase: waiting, prefill or decode. Numbers are tokens; limit: prompt and output."""

    rid: str
    index: int
    phase: str
    prompt: int
    generated: int
    computed: int
    cached: int
    limit: int


class Node(msgspec.Struct):
    """A node of the radix tree. parent: its place in the list, -1 below a root. head: its first token ids.
    users: requests that run on it or below."""

    parent: int
    tokens: int
    users: int
    head: list[int]


class Snapshot(msgspec.Struct):
    """page_map: a digit a cell (FREE to OWN); a cell is `cell_pages` pages and shows the highest of them."""

    rows: list[Row]
    waiting: list[Row]
    page_map: str
    cell_pages: int
    nodes: list[Node]
    stats: dict[str, int | float | str | bool]


def take(state: SchedulerState, stats: dict[str, int | float | str | bool]) -> Snapshot:
    running = [*state.decoding, *state.ending.values(), *state.prefilling.values()]
    phases = dict.fromkeys(state.prefilling, "prefill")
    rows = [_row(request, phases.get(request.uid, "decode")) for request in running[:MAX_ROWS]]
    waiting = state.waiting.snapshot()[:MAX_WAITING]
    nodes = _walk(state)
    page_map, cell_pages = _page_map(state, nodes, running)
    return Snapshot(rows, [_row(request, "waiting") for request in waiting], page_map, cell_pages, _tree(nodes), stats)


def _row(request: Request, phase: str) -> Row:
    return Row(
        request.rid,
        request.index,
        phase,
        request.num_prompt_tokens,
        request.num_generated,
        request.num_computed_tokens,
        max(0, request.cached_tokens),
        request.kv_limit + 1,
    )


def _walk(state: SchedulerState) -> list[RadixNode]:
    nodes = []
    for node in state.memory.cache.nodes():
        nodes.append(node)
        if len(nodes) == MAX_WALKED:
            break
    return nodes


def _tree(nodes: list[RadixNode]) -> list[Node]:
    shown = nodes[:MAX_NODES]
    places = {id(node): place for place, node in enumerate(shown)}
    tree = []
    for node in shown:
        head = array("i")
        head.frombytes(node.key[: HEAD_TOKENS * TOKEN_BYTES])
        tree.append(Node(places.get(id(node.parent), -1), len(node.key) // TOKEN_BYTES, node.locks, head.tolist()))
    return tree


def _page_map(state: SchedulerState, nodes: list[RadixNode], running: list[Request]) -> tuple[str, int]:
    import numpy as np  # a third of what the scheduler's process imports, and only for who watches

    count = state.memory.num_pages
    pages = np.zeros(count, dtype=np.uint8)
    for node in nodes:
        pages[np.frombuffer(node.pages, dtype=np.int32)] = SHARED if node.locks else CACHED
    for request in running:
        own = request.pages[request.num_shared_pages :]
        if own:
            pages[np.frombuffer(own, dtype=np.int32)] = OWN
    cell = -(-count // MAX_CELLS)
    padded = np.zeros(-(-count // cell) * cell, dtype=np.uint8)
    padded[:count] = pages
    cells = padded.reshape(-1, cell).max(axis=1) + ord("0")
    return cells.tobytes().decode("ascii"), cell
