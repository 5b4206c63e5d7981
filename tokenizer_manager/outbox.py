"""What one lagging client has not taken yet. Chunks of one sample that wait are merged into one."""

from __future__ import annotations

import msgspec

from vibe_sgl_lite.runtime.messages import Chunk

MERGE_AT = 16  # waiting chunks of one sample before they are merged, so that each byte is copied a few times at most

_decoder = msgspec.msgpack.Decoder(Chunk)
_encoder = msgspec.msgpack.Encoder()


class _Entry:
    __slots__ = ("frames", "since")

    def __init__(self, frame: bytes, since: float) -> None:
        self.frames = [frame]
        self.since = since


class Outbox:
    """Frames in order of arrival, except that a chunk joins the earlier ones of its sample. Times are monotonic.

    num_bytes: all that waits; chunk_bytes: chunks alone, which is what a client can be behind with.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.chunk_bytes = 0
        self._entries: dict[object, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def age(self, now: float) -> float:
        """Seconds that the oldest frame has waited; 0 when none does."""
        return now - next(iter(self._entries.values())).since if self._entries else 0.0

    def add(self, frame: bytes, now: float) -> None:
        self._entries[object()] = _Entry(frame, now)  # a key of its own
        self.num_bytes += len(frame)

    def add_chunk(self, uid: int, payload: bytes, now: float) -> None:
        """`payload`: an encoded `Chunk` of sample `uid`."""
        entry = self._entries.get(uid)
        self._count_chunk(len(payload))
        if entry is None:
            self._entries[uid] = _Entry(payload, now)
            return
        entry.frames.append(payload)
        if len(entry.frames) >= MERGE_AT:
            self._merge(entry)

    def first(self) -> bytes:
        """The frame to send next; it stays until `pop`. A chunk that grows meanwhile is the longer one next time."""
        entry = next(iter(self._entries.values()))
        if len(entry.frames) > 1:
            self._merge(entry)
        return entry.frames[0]

    def pop(self) -> None:
        key = next(iter(self._entries))
        size = sum(map(len, self._entries.pop(key).frames))
        if isinstance(key, int):
            self._count_chunk(-size)
        else:
            self.num_bytes -= size

    def _count_chunk(self, size: int) -> None:
        self.num_bytes += size
        self.chunk_bytes += size

    def _merge(self, entry: _Entry) -> None:
        merged = merge_chunks(entry.frames)
        self._count_chunk(len(merged) - sum(map(len, entry.frames)))
        entry.frames = [merged]


def merge_chunks(payloads: list[bytes]) -> bytes:
    """One encoded chunk for several consecutive ones of a sample."""
    chunks = [_decoder.decode(payload) for payload in payloads]
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    prompt_logprobs = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
    return _encoder.encode(
        Chunk(
            rid=chunks[0].rid,
            index=chunks[0].index,
            first=chunks[0].first,
            token_ids=b"".join(chunk.token_ids for chunk in chunks),
            text="".join(chunk.text for chunk in chunks),
            finish=chunks[-1].finish,
            usage=chunks[-1].usage,
            logprobs=tuple(entry for part in logprobs for entry in part) if logprobs else None,
            prompt_logprobs=tuple(entry for part in prompt_logprobs for entry in part) if prompt_logprobs else None,
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=tuple(raw for chunk in chunks for raw in chunk.tool_calls),
            pooled=chunks[-1].pooled,
            weight_versions=tuple(change for chunk in chunks for change in chunk.weight_versions),
        )
    )
