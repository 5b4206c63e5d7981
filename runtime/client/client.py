"""The synchronous client. Any number of threads may use one `Client` at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack, overload

from vibe_sgl_lite.runtime.client.call import Call
from vibe_sgl_lite.runtime.client.connection import Connection, Event, QueryAnswer
from vibe_sgl_lite.runtime.client.outputs import Collector, Output, OutputChunk, chunk_from_message
from vibe_sgl_lite.runtime.client.requests import (
    ChatOptions,
    GenerateOptions,
    Messages,
    Plan,
    Request,
    plan_chat,
    plan_generate,
    single,
)
from vibe_sgl_lite.runtime.errors import VibeError, error_from_code
from vibe_sgl_lite.runtime.messages import Accepted, Chunk, ModelInfo, Welcome
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams
from vibe_sgl_lite.runtime.transport.rundir import default_address

Params = SamplingParams | Sequence[SamplingParams] | None
Rid = str | Sequence[str] | None
Values = dict[str, int | float | str | bool]
T = TypeVar("T")


class Client:
    """A session with a running engine; a context manager.

    address: ipc:// or tcp://; by default that of the daemon called `name`. Raises ConfigError for an address that makes
    no sense, ConnectError within 2 s when nobody answers there, ProtocolError when the engine speaks another version.

    All calls raise RequestError (a ValueError) for an invalid request, EngineDeadError when the engine dies or the
    connection is lost, another EngineError for other failures (with what was generated before it as `output`), and
    ClosedError once the client is closed. After a loss, the next call connects again.
    """

    def __init__(self, address: str | None = None, *, name: str = "default") -> None:
        self._attach(Connection(default_address(name) if address is None else address))

    def _attach(self, connection: Connection) -> None:
        self._connection = connection
        weakref.finalize(self, connection.stop).atexit = False  # at exit the connection closes itself
        try:
            self._session()
        except BaseException:
            connection.close()
            raise

    # ------------------------------------------------------------------------------------------------- requests

    @overload
    def generate(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        sampling_params: Params = None,
        *,
        input_ids: None = None,
        rid: Rid = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Output]: ...

    @overload
    def generate(
        self,
        prompt: None = None,
        sampling_params: Params = None,
        *,
        input_ids: list[list[int]],
        rid: Rid = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        *,
        input_ids: Any = None,
        rid: Any = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Continue raw text or token ids (no chat template).

        One prompt (a text, or a flat list of ids) gives one Output; a list gives a list in the same order, in which
        requests that failed on the way have finish_reason "error" and `error`. sampling_params: one for all, or a list.
        options: see `GenerateOptions`. With n > 1 in its sampling parameters, a prompt gives a list of n Outputs in
        place of one (the declared types are those for n = 1).
        """
        return self._run(plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        rid: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Output: ...

    @overload
    def chat(
        self,
        messages: Sequence[Messages],
        sampling_params: Params = None,
        *,
        rid: Rid = None,
        **options: Unpack[ChatOptions],
    ) -> list[Output]: ...

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        rid: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Any:
        """Answer a conversation through the model's chat template; a list of conversations gives a list.

        messages: dicts with `role` and `content`. options: see `ChatOptions`. n > 1 as in `generate`.
        """
        return self._run(plan_chat(messages, sampling_params, rid=rid, options=options))

    def stream(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """`generate` for one prompt, chunk by chunk; with n > 1 the samples' chunks come mixed, told by `index`.

        The request is sent at once, not at the first `next`.
        """
        plan = plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options)
        return Stream(self, self._connection, single(plan))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        rid: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """`chat` for one conversation, chunk by chunk."""
        plan = plan_chat(messages, sampling_params, rid=rid, options=options)
        return Stream(self, self._connection, single(plan))

    def abort(self, rid: str) -> None:
        """End one of this client's requests; it returns what it has, with finish_reason "abort". Unknown: ignored."""
        self._connection.abort(rid)

    # --------------------------------------------------------------------------------------------------- engine

    @property
    def address(self) -> str:
        return self._connection.address

    @property
    def model(self) -> ModelInfo:
        """Name, context length, vocabulary, device and dtype of the model that is served."""
        return self._session().model

    def stats(self) -> Values:
        """The engine's counters (docs: kv_pages_free, num_running, cached_tokens_total, ...)."""
        return self._query("stats")

    def health(self) -> Values:
        """Whether the engine makes progress, with details. Raises EngineError when it does not."""
        return self._query("health")

    def flush_cache(self) -> None:
        """Empty the radix cache. Raises EngineError while requests run or wait."""
        self._query("flush_cache")

    def close(self) -> None:
        """End the session; requests that still run are aborted, and calls that wait for them raise ClosedError."""
        self._connection.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- waiting

    def _run(self, plan: Plan) -> Any:
        ended: SimpleQueue[int] = SimpleQueue()
        call = Call(self._connection, plan, ended.put)
        try:
            call.start()
            while call.running:
                call.finish(ended.get())
        finally:
            call.abandon()
        return call.result()

    def _session(self) -> Welcome:
        return _answer(self._connection.open)

    def _query(self, what: Literal["stats", "health", "flush_cache"]) -> Values:
        def ask(deliver: Callable[[QueryAnswer], None]) -> None:
            self._connection.query(what, deliver)

        reply = _answer(ask)
        if reply.error is not None:
            raise error_from_code(reply.error.code, reply.error.message, reply.error.field)
        return reply.values


def _answer(ask: Callable[[Callable[[T | VibeError], None]], None]) -> T:
    """Ask, wait for the one answer, and raise it when it is an error."""
    answers: SimpleQueue[T | VibeError] = SimpleQueue()
    ask(answers.put)
    answer = answers.get()
    if isinstance(answer, VibeError):
        raise answer
    return answer


class Stream(Iterator[OutputChunk]):
    """The chunks of one request; leaving it early (close, the end of its `with`, garbage collection) aborts it.

    For one thread at a time. `sampling` is what the request runs with, from the first chunk on.
    """

    def __init__(self, client: Client, connection: Connection, request: Request) -> None:
        self.rid = request.rid
        self._client = client  # keeps it open
        self._connection = connection
        self._collector = Collector(request.rid, request.n)
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ended = False
        connection.submit(request.rid, request.frame, self._events.put, request.n)

    @property
    def sampling(self) -> ResolvedSampling | None:
        return self._collector.sampling

    def __next__(self) -> OutputChunk:
        while not self._ended:
            event = self._events.get()
            self._collector.add(event)
            self._ended = self._collector.done
            if self._collector.error is not None:
                raise self._collector.failure()
            if isinstance(event, Chunk):
                return chunk_from_message(event)
            assert isinstance(event, Accepted)
        raise StopIteration

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.drop(self.rid)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):  # false when the constructor failed
            self.close()
