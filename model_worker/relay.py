"""Carries the scheduler's frames from rank 0 to the ranks of the other nodes, over a Gloo group of these alone.

Each frame is one broadcast, or two where it is long. All members take part in the same order, so no two of them can
wait for each other; rank 0 sends an empty frame when it has had nothing to send for a while, so that nobody waits long.
"""

import torch
import torch.distributed as dist

from vibe_sgl_lite.model_worker.lifeline import Lifeline

LENGTH_BYTES = 8
INLINE_BYTES = 4096 - LENGTH_BYTES  # what a first broadcast carries: the usual decode step fits


class BatchRelay:
    """Rank 0 calls `send`, every other member `receive`. process_group: of rank 0 and the ranks of other nodes.

    lifeline: of the same ranks, to be told before they end in order.
    """

    def __init__(self, process_group: dist.ProcessGroup, lifeline: Lifeline | None = None) -> None:
        self._group = process_group
        self._lifeline = lifeline
        self._head = torch.zeros(LENGTH_BYTES + INLINE_BYTES, dtype=torch.uint8)

    def send(self, frame: bytes) -> None:
        data = torch.frombuffer(bytearray(frame), dtype=torch.uint8) if frame else torch.empty(0, dtype=torch.uint8)
        self._head[:LENGTH_BYTES] = torch.tensor([len(frame)], dtype=torch.int64).view(torch.uint8)
        inline = data[:INLINE_BYTES]
        self._head[LENGTH_BYTES : LENGTH_BYTES + len(inline)] = inline
        dist.broadcast(self._head, 0, self._group)
        if len(frame) > INLINE_BYTES:
            dist.broadcast(data[INLINE_BYTES:].clone(), 0, self._group)

    def receive(self) -> bytes:
        """The next frame; empty when rank 0 had nothing to send. Blocks until then."""
        dist.broadcast(self._head, 0, self._group)
        length = int(self._head[:LENGTH_BYTES].view(torch.int64).item())
        inline = self._head[LENGTH_BYTES : LENGTH_BYTES + min(length, INLINE_BYTES)].numpy().tobytes()
        if length <= INLINE_BYTES:
            return inline
        rest = torch.empty(length - INLINE_BYTES, dtype=torch.uint8)
        dist.broadcast(rest, 0, self._group)
        return inline + rest.numpy().tobytes()

    def close(self) -> None:
        """After the last frame, by every member: their ends are no losses then."""
        if self._lifeline is not None:
            self._lifeline.say_farewell()
