"""Endless streams in threads, for tests that end the engine under them."""

from __future__ import annotations

import threading
import time

from tests.integration.daemon import wait_until
from vibe_sgl_lite import Client, EngineDeadError, SamplingParams, VibeError

LONG = SamplingParams(max_new_tokens=16_000, temperature=0, ignore_eos=True)


class Streams:
    """Streams of several clients in threads; when each ended and with what."""

    def __init__(self, clients: list[Client], each: int) -> None:
        self.started = [0] * (len(clients) * each)
        self.ends: list[tuple[float, VibeError | str]] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(client, position * each + i))
            for position, client in enumerate(clients)
            for i in range(each)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: Client, index: int) -> None:
        end: VibeError | str = "no terminal event"
        try:
            for chunk in client.stream(f"Story number {index}:", LONG):
                self.started[index] += len(chunk.token_ids)
                end = chunk.finish_reason or end
        except VibeError as error:
            end = error
        with self._lock:
            self.ends.append((time.monotonic(), end))

    def wait_running(self) -> None:
        wait_until(lambda: all(self.started), 60, "every stream's first token")

    def wait_ended(self, timeout: float) -> None:
        for thread in self._threads:
            thread.join(timeout)
        assert not any(thread.is_alive() for thread in self._threads), "a stream did not end"


def assert_dead_within(streams: Streams, since: float, seconds: float) -> None:
    streams.wait_ended(seconds + 3)
    for at, end in streams.ends:
        assert isinstance(end, EngineDeadError), end
        assert at - since < seconds
