"""What the sync and the async client share: how requests are made, and what a stream does with its events.

`Client` and `AsyncClient` add only the waiting: a queue of the standard library, or a future of the event loop.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, overload

from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.outputs import Collector, OutputChunk, chunk_from_message
from vibe_sgl_lite.runtime.client.pooling import Progress, plan_embed, plan_score
from vibe_sgl_lite.runtime.client.requests import (
    ClientRequest,
    Messages,
    Params,
    Plan,
    Rid,
    plan_chat,
    plan_generate,
    single,
)
from vibe_sgl_lite.runtime.errors import ConfigError, EngineDeadError, RequestError, UserError, error_from_code
from vibe_sgl_lite.runtime.messages import Chunk, ControlArgs, QueryReply
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams
from vibe_sgl_lite.runtime.settings.schema import shown
from vibe_sgl_lite.runtime.transport.curve import client_keys
from vibe_sgl_lite.runtime.transport.rundir import default_address

One = SamplingParams | Mapping[str, Any] | None
Values = dict[str, int | float | str | bool]

OutT = TypeVar("OutT")  # an Output, or an awaitable of one
ListT = TypeVar("ListT")
StreamT = TypeVar("StreamT")
EmbeddingT = TypeVar("EmbeddingT")  # an Embedding, or an awaitable of one
EmbeddingsT = TypeVar("EmbeddingsT")
ScoreT = TypeVar("ScoreT")  # a number, or an awaitable of one
ScoresT = TypeVar("ScoresT")


class Requests(ABC, Generic[OutT, ListT, StreamT, EmbeddingT, EmbeddingsT, ScoreT, ScoresT]):
    """The calls that make requests; who implements it runs their plans.

    sampling_params: a `SamplingParams`, a dict of its fields, or, with a list of prompts, a list of these; fields may
    also be passed by name, as `temperature=0`, and win. rid: names the request for `abort`.
    Other keywords: priority (higher goes first where the engine runs with `--schedule-policy priority`); cache_salt
    (only requests with the same one share cached prefixes); one of json_schema (a dict or JSON text), regex, choice (a
    list of texts) and grammar (Lark's syntax): the output, after a thinking block, is exactly that.
    """

    _connection: Connection

    @abstractmethod
    def _run(self, make: Callable[[], Plan]) -> Any: ...

    @abstractmethod
    def _stream(self, request: ClientRequest) -> StreamT: ...

    @overload
    def generate(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: One = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Any,
    ) -> OutT: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        sampling_params: Params = None,
        *,
        input_ids: None = None,
        rid: Rid = None,
        **options: Any,
    ) -> ListT: ...

    @overload
    def generate(
        self,
        prompt: None = None,
        sampling_params: Params = None,
        *,
        input_ids: list[list[int]],
        rid: Rid = None,
        **options: Any,
    ) -> ListT: ...

    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        *,
        input_ids: Any = None,
        rid: Any = None,
        **options: Any,
    ) -> Any:
        """Continue raw text or token ids (no chat template).

        One prompt (a text, or a flat list of ids) gives one Output; a list gives a list in the same order, in which
        requests that failed on the way have finish_reason "error" and `error`. With n > 1 in its sampling parameters,
        a prompt gives a list of n Outputs in place of one (the declared types are those for n = 1).
        """
        return self._run(partial(plan_generate, prompt, sampling_params, input_ids=input_ids, rid=rid, options=options))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: One = None,
        *,
        rid: str | None = None,
        **options: Any,
    ) -> OutT: ...

    @overload
    def chat(
        self, messages: Sequence[Messages], sampling_params: Params = None, *, rid: Rid = None, **options: Any
    ) -> ListT: ...

    def chat(self, messages: Any, sampling_params: Any = None, *, rid: Any = None, **options: Any) -> Any:
        """Answer a conversation through the model's chat template; a list of conversations gives a list.

        messages: dicts with `role` and `content`. Keywords beside those of every call: enable_thinking (for the
        template; None leaves its default); max_thinking_tokens (a thinking block is closed after so many); tools
        (functions that the model may call, as dicts in OpenAI's form; calls come as `tool_calls`); template_kwargs
        (other variables of the template, `continue_final_message` and `add_generation_prompt` too).
        """
        return self._run(partial(plan_chat, messages, sampling_params, rid=rid, options=options))

    def stream(
        self,
        prompt: str | list[int] | None = None,
        sampling_params: One = None,
        *,
        input_ids: list[int] | None = None,
        rid: str | None = None,
        **options: Any,
    ) -> StreamT:
        """`generate` for one prompt, chunk by chunk; with n > 1 the samples' chunks come mixed, told by `index`.

        The request is sent at once, not when the first chunk is asked for.
        """
        plan = plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options)
        return self._stream(single(plan))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: One = None,
        *,
        rid: str | None = None,
        **options: Any,
    ) -> StreamT:
        """`chat` for one conversation, chunk by chunk."""
        return self._stream(single(plan_chat(messages, sampling_params, rid=rid, options=options)))

    @overload
    def embed(
        self,
        inputs: str | list[int],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        progress: Progress = None,
        rid: str | None = None,
        **options: Any,
    ) -> EmbeddingT: ...

    @overload
    def embed(
        self,
        inputs: Sequence[str] | Sequence[list[int]],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        progress: Progress = None,
        rid: Rid = None,
        **options: Any,
    ) -> EmbeddingsT: ...

    def embed(
        self,
        inputs: Any,
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        progress: Progress = None,
        rid: Any = None,
        **options: Any,
    ) -> Any:
        """Texts, or lists of token ids, as vectors of length 1, with any model; Qwen3-Embedding is made for it.

        A vector is the beginning of the last token's final hidden state. One text gives one Embedding, a list a list in
        the same order, in which what failed on the way has `error`.
        instruction: for queries, what to look for; documents go without. dimensions: values of a vector, by default as
        many as the model has. progress: True for a line on stderr, or a function of how many are done and of how many.
        Other keywords: priority, cache_salt, timeout_s.
        """
        return self._run(
            partial(
                plan_embed, inputs, instruction=instruction, dimensions=dimensions, progress=progress, rid=rid,
                options=options,
            )
        )  # fmt: skip

    @overload
    def score(
        self,
        query: str,
        documents: str,
        *,
        instruction: str | None = None,
        progress: Progress = None,
        rid: str | None = None,
        **options: Any,
    ) -> ScoreT: ...

    @overload
    def score(
        self,
        query: str,
        documents: list[str],
        *,
        instruction: str | None = None,
        progress: Progress = None,
        rid: Rid = None,
        **options: Any,
    ) -> ScoresT: ...

    def score(
        self,
        query: str,
        documents: Any,
        *,
        instruction: str | None = None,
        progress: Progress = None,
        rid: Any = None,
        **options: Any,
    ) -> Any:
        """How relevant documents are to a query, from 0 to 1: one document gives a number, a list a list of them.

        It is the probability of "yes" against "no" after Qwen3-Reranker's prompt, and means something with that model.
        instruction: what makes a document relevant, by default the model card's. Raises the error of the first that
        failed. Other keywords: as in `embed`.
        """
        return self._run(
            partial(plan_score, query, documents, instruction=instruction, progress=progress, rid=rid, options=options)
        )

    @property
    def address(self) -> str:
        return self._connection.address


def connect(
    address: str | None, name: str, *, resume: bool, server_key: str | None = None, client_key: str | None = None
) -> Connection:
    """To the daemon at `address`, by default the one called `name`. Raises ConfigError."""
    given = {"address": address, "server_key": server_key, "client_key": client_key, "name": name}
    for field, value in given.items():
        if not isinstance(value, str) and not (field != "name" and value is None):
            raise ConfigError(f"{field}={shown(value)} is a {type(value).__name__}: must be a text", field=field)
    address = default_address(name) if address is None else address
    return Connection(address, keys=client_keys(address, server_key, client_key), resume=resume)


def update_args(path: str | os.PathLike[str], weight_version: str | None, options: Mapping[str, bool]) -> ControlArgs:
    """Of `update_weights_from_disk`. Raises RequestError."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise RequestError(f"path={shown(path)} must name a folder", field="path")
    if not isinstance(weight_version, str | None):
        raise RequestError(f"weight_version={shown(weight_version)} must be a text", field="weight_version")
    return {"path": os.path.abspath(os.fspath(path)), "weight_version": weight_version, **options}


def check_rid(rid: str) -> str:
    """Raises RequestError for what can be no request's name."""
    if not isinstance(rid, str):
        raise RequestError(f"rid={shown(rid)} must be a text", field="rid")
    return rid


def values_of(reply: QueryReply) -> Values:
    """Raises the error that a query was answered with."""
    if reply.error is not None:
        raise error_from_code(reply.error.code, reply.error.message, reply.error.field)
    return reply.values


class Call:
    """One `generate` or `chat` with all its requests: submit, then `finish(position)` for each position that `ended`
    is told, until `running` is False. Events are collected in the connection's thread, so that the caller wakes once a
    request and not once a token.

    ended: called in the connection's thread; must neither block nor raise.
    """

    def __init__(self, connection: Connection, plan: Plan, ended: Callable[[int], None]) -> None:
        self._connection = connection
        self._plan = plan
        self._collectors = [Collector(request.rid, request.n) for request in plan.requests]
        self._outputs: dict[int, Any] = {}  # by position, put together while others still run
        self._open = set(range(len(plan.requests)))
        self._ended = ended

    @property
    def running(self) -> bool:
        return bool(self._open)

    def start(self) -> None:
        """Raises ClosedError."""
        for position, (request, collector) in enumerate(zip(self._plan.requests, self._collectors, strict=True)):
            deliver = partial(self._deliver, position, collector)
            self._connection.submit(request, deliver, patient=self._plan.many)

    def finish(self, position: int) -> None:
        """Note the end of a request. Raises RequestError when it was invalid."""
        self._open.remove(position)
        if self._plan.progress is not None:
            self._plan.progress(len(self._collectors) - len(self._open), len(self._collectors))
        collector = self._collectors[position]
        if isinstance(collector.error, UserError):
            raise collector.error
        if self._plan.outcome is Collector.result:
            self._outputs[position] = collector.result()

    def abandon(self) -> None:
        """Have the engine end what still runs."""
        for position in self._open:
            self._connection.drop(self._plan.requests[position].rid)

    def result(self) -> Any:
        """The outcome, as a rule an Output, or a list of them in order; a request with n > 1 gives a list of its
        samples in place of one.

        Raises the error of a single request, and EngineDeadError when every request of a list ended with it.
        """
        errors = [collector.error for collector in self._collectors]
        if errors and (not self._plan.many or all(isinstance(error, EngineDeadError) for error in errors)):
            for collector in self._collectors:
                if collector.error is not None:
                    raise collector.failure()
        outputs = [
            self._outputs[position] if position in self._outputs else self._plan.outcome(collector)
            for position, collector in enumerate(self._collectors)
        ]
        return outputs if self._plan.many else outputs[0]

    def _deliver(self, position: int, collector: Collector, event: Event) -> None:
        collector.add(event)
        if collector.done:
            self._ended(position)


class StreamState:
    """One request whose chunks are handed out as they come. `sampling`: what it runs with, from the first chunk on.

    client: kept alive as long as the stream. put: takes the events, in the connection's thread.
    """

    def __init__(
        self, client: object, connection: Connection, request: ClientRequest, put: Callable[[Event], None]
    ) -> None:
        self.rid = request.rid
        self._client = client
        self._connection = connection
        self._collector = Collector(request.rid, request.n)
        self._ended = False
        connection.submit(request, put)

    @property
    def sampling(self) -> ResolvedSampling | None:
        return self._collector.sampling

    def _take(self, event: Event) -> OutputChunk | None:
        """The event as a chunk, if it is one. Raises what ended the request."""
        self._collector.add(event)
        self._ended = self._collector.done
        if self._collector.error is not None:
            raise self._collector.failure()
        return chunk_from_message(event) if isinstance(event, Chunk) else None

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.drop(self.rid)

    def __del__(self) -> None:
        if hasattr(self, "_ended"):  # false when the constructor failed
            self._close()
