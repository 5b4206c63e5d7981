"""The synchronous client. Any number of threads may use one `Client` at once."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from vibe_sgl_lite.runtime.client.calls import Call, StreamState
from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.client.core import Requests, Values, check_rid, connect, update_args, values_of
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.outputs import Embedding, Output, OutputChunk
from vibe_sgl_lite.runtime.client.requests import ClientRequest, Plan
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import ControlArgs, ControlCall, ModelInfo, Welcome

T = TypeVar("T")


class Client(Requests[Output, list[Output], "Stream", Embedding, list[Embedding], float, list[float]]):
    """A session with a running engine; a context manager.

    address: ipc:// or tcp://; by default that of the daemon called `name`. Raises ConfigError for an address that makes
    no sense, ConnectError within 2 s when nobody answers there, ProtocolError when the engine speaks another version.
    resume: when a process of the engine dies and starts again, requests go on from what has come of them.
    server_key, client_key: where the engine runs with `--client-keys`: its public key, as text or the name of a file,
    and the file with this client's own pair (docs/security.md).

    All calls raise RequestError (a ValueError) for an invalid request, EngineDeadError when the engine dies for good or
    the connection is lost, another EngineError for other failures (with what was generated before it as `output`), and
    ClosedError once the client is closed. After a loss, the next call connects again.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str = "default",
        resume: bool = True,
        server_key: str | None = None,
        client_key: str | None = None,
    ) -> None:
        self._attach(connect(address, name, resume=resume, server_key=server_key, client_key=client_key))

    def _attach(self, connection: Connection) -> None:
        self._connection = connection
        weakref.finalize(self, connection.stop).atexit = False  # at exit the connection closes itself
        try:
            self._session()
        except BaseException:
            connection.close()
            raise

    def abort(self, rid: str) -> None:
        """End one of this client's requests; it returns what it has, with finish_reason "abort". Unknown: ignored."""
        self._connection.abort(check_rid(rid))

    @property
    def model(self) -> ModelInfo:
        """Name, context length, vocabulary, device and dtype of the model that is served."""
        return self._session().model

    def stats(self) -> Values:
        """The engine's counters (docs: kv_pages_free, num_running, cached_tokens_total, ...)."""
        return values_of(_answer(partial(self._connection.query, "stats")))

    def health(self) -> Values:
        """Whether the engine makes progress, with details. Raises EngineError when it does not."""
        return values_of(_answer(partial(self._connection.query, "health")))

    def flush_cache(self) -> None:
        """Empty the radix cache. Raises EngineError while requests run or wait."""
        values_of(_answer(partial(self._connection.query, "flush_cache")))

    def watch(self) -> dict[str, Any]:
        """What the engine does now: running and waiting requests, pages, the radix tree (scheduler/snapshot.py)."""
        values = values_of(_answer(partial(self._connection.query, "watch")))
        return dict(msgspec.json.decode(str(values["snapshot"])))

    def pause_generation(self, mode: str = "abort") -> None:
        """Begin no more requests until `continue_generation`; returns when no step runs.

        mode: what becomes of those that run: "abort" (they end with what they have, and those that wait do too), "wait"
        (they run to their end), "keep" (they stop, and go on from their KV cache), or "retract" (they stop, and compute
        it anew). Requests that come meanwhile wait; deadlines hold.
        """
        self._control("pause", {"mode": mode})

    def continue_generation(self) -> None:
        """End a pause."""
        self._control("continue", {})

    def update_weights_from_disk(
        self,
        path: str | os.PathLike[str],
        weight_version: str | None = None,
        *,
        flush_cache: bool = True,
        abort_all_requests: bool = False,
    ) -> str:
        """Take the weights of another folder in place of those that are served; returns the version in force then.

        path: a folder on the engine's machine with config.json and *.safetensors of the same shape. RequestError, with
        the weights as before, for one that does not fit, cannot be read or has NaN. weight_version: what answers call
        them, by default as before. Without a pause, requests that run are finished first; in one of mode "keep", they
        go on with the new weights. flush_cache: forget cached prefixes; False keeps those of the old weights for the
        day when their version comes back. abort_all_requests: end what runs and waits first.
        """
        options = {"flush_cache": flush_cache, "abort_all_requests": abort_all_requests}
        values = self._control("update_weights", update_args(path, weight_version, options))
        return str(values["weight_version"])

    def weight_version(self) -> str:
        """Of the weights in force."""
        return str((self.stats())["weight_version"])

    def sleep(self, level: int = 1, mode: str = "keep") -> None:
        """Free the KV pool (level 1), or the weights too (level 2), until `wake_up`; returns when they are free.

        mode: as in `pause_generation`; with "keep", requests that run wait and then compute their KV anew. So do those
        that come meanwhile.
        """
        self._control("sleep", {"level": level, "mode": mode})

    def wake_up(self) -> None:
        """End a sleep. Weights that were freed are those of the folder in force: of the start, or of an update."""
        self._control("wake", {})

    def _control(self, what: ControlCall, args: ControlArgs) -> Values:
        return values_of(_answer(partial(self._connection.query, what, args=args)))

    def close(self) -> None:
        """End the session; requests that still run are aborted, and calls that wait for them raise ClosedError."""
        self._connection.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _session(self) -> Welcome:
        return _answer(self._connection.open)

    def _run(self, make: Callable[[], Plan]) -> object:
        ended: SimpleQueue[int] = SimpleQueue()
        call = Call(self._connection, make(), ended.put)
        try:
            call.start()
            while call.running:
                call.finish(ended.get())
        finally:
            call.abandon()
        return call.result()

    def _stream(self, request: ClientRequest) -> Stream:
        return Stream(self, self._connection, request)


def _answer(ask: Callable[[Callable[[T | VibeError], None]], None]) -> T:
    """Ask, wait for the one answer, and raise it when it is an error."""
    answers: SimpleQueue[T | VibeError] = SimpleQueue()
    ask(answers.put)
    answer = answers.get()
    if isinstance(answer, VibeError):
        raise answer
    return answer


class Stream(StreamState, Iterator[OutputChunk]):
    """The chunks of one request; leaving it early (close, the end of its `with`, garbage collection) aborts it.

    For one thread at a time.
    """

    def __init__(self, client: Client, connection: Connection, request: ClientRequest) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        super().__init__(client, connection, request, self._events.put)

    def __next__(self) -> OutputChunk:
        while not self._ended:
            chunk = self._take(self._events.get())
            if chunk is not None:
                return chunk
        raise StopIteration

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()
