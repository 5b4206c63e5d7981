"""What enters and leaves the prefix cache, told to routers that send a request where its prefix is (`--kv-events`).

The form is vLLM's, three frames on a PUB socket: the topic `kv@HOST:PORT@MODEL`; an 8-byte big-endian sequence number,
whose gaps tell of lost messages; and msgpack `[time, [events], 0]`, where an event is a map tagged by `type`. A block
is a page. Its hash is a number that is never used again while this process lives, for routers take it for a name.

Prefixes under a cache salt, and those with an adapter, are not told: no router could send anything there.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import zmq

from vibe_sgl_lite.runtime.messages import unpack_ids
from vibe_sgl_lite.runtime.transport.channels import bind_ipc, new_socket
from vibe_sgl_lite.scheduler.radix_cache import RadixNode

# What is kept for --kv-events-replay; fewer messages than a socket queues for one peer (HIGH_WATER_MARK).
MOST_KEPT, MOST_KEPT_BYTES = 8192, 64 << 20
END = (-1).to_bytes(8, "big", signed=True)  # the number behind the last message that is repeated
MEDIUM = "GPU"  # vLLM's word for the memory that steps read


class BlockStored(msgspec.Struct, tag=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str = MEDIUM


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[int]
    medium: str = MEDIUM


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared


class KvEvents:
    """Gathers what the radix cache tells (`RadixCache.watchers`) until `take`."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._numbers = itertools.count(1)
        self._hashes: dict[int, int] = {}  # by page, of those that were told
        self._events: list[Event] = []

    def stored(self, node: RadixNode) -> None:
        """`node` is new below its parent."""
        above = node.parent.pages if node.parent is not None else None
        if node.cache_salt != "" or (above and above[-1] not in self._hashes):  # the latter: weights came back to it
            return
        hashes = [next(self._numbers) for _ in node.pages]
        self._hashes.update(zip(node.pages, hashes, strict=True))
        parent = self._hashes[above[-1]] if above else None
        self._events.append(BlockStored(hashes, parent, unpack_ids(node.key), self._page_size))

    def removed(self, pages: Iterable[int]) -> None:
        hashes = [self._hashes.pop(page) for page in pages if page in self._hashes]
        if hashes:
            self._events.append(BlockRemoved(hashes))

    def cleared(self) -> None:
        self._hashes.clear()
        self._events.append(AllBlocksCleared())

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class KvEventPublisher:
    """Sends what `events` has gathered. A slow subscriber loses messages, and never holds the scheduler up.

    replay: a ROUTER where subscribers ask for what they missed, at the address of that name; to be polled.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        replay_address: str | None,
        topic: str,
        events: KvEvents,
    ) -> None:
        self._socket = new_socket(context, zmq.PUB)
        bind_ipc(self._socket, address)
        self.replay = None if replay_address is None else new_socket(context, zmq.ROUTER)
        if self.replay is not None and replay_address is not None:
            bind_ipc(self.replay, replay_address)
        self._topic = topic.encode()
        self._events = events
        self._sequence = 0
        self._past: deque[tuple[int, bytes]] = deque()
        self._past_bytes = 0

    def flush(self) -> None:
        """Send what is new, and answer who missed something."""
        events = self._events.take()
        if events:
            payload = msgspec.msgpack.encode([time.time(), events, 0])
            self._socket.send_multipart([self._topic, self._number(self._sequence), payload])
            if self.replay is not None:
                self._keep(payload)
            self._sequence += 1
        if self.replay is not None and self.replay.poll(0):
            self._repeat(self.replay)

    def _keep(self, payload: bytes) -> None:
        self._past.append((self._sequence, payload))
        self._past_bytes += len(payload)
        while len(self._past) > MOST_KEPT or self._past_bytes > MOST_KEPT_BYTES:
            self._past_bytes -= len(self._past.popleft()[1])

    def _repeat(self, replay: zmq.Socket[bytes]) -> None:
        """One request: who, an empty frame, the first number. A ROUTER drops what its peer does not take."""
        who, *frames = replay.recv_multipart(zmq.NOBLOCK)
        if len(frames) != 2 or len(frames[1]) != len(END):
            return
        first = int.from_bytes(frames[1], "big")
        for number, payload in self._past:
            if number >= first:
                replay.send_multipart([who, b"", self._topic, self._number(number), payload])
        replay.send_multipart([who, b"", b"", END, b""])

    @staticmethod
    def _number(sequence: int) -> bytes:
        return sequence.to_bytes(len(END), "big")
