"""What can be asked of an engine, the same for the sync and the async client: `generate`, `chat`, `embed`, `score`.

`Client` and `AsyncClient` add only the waiting (calls.py): a queue of the standard library, or a future of the event
loop.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, overload

from vibe_sgl_lite.runtime.client.connection import Connection
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
from vibe_sgl_lite.runtime.errors import ConfigError, RequestError, error_from_code
from vibe_sgl_lite.runtime.messages import ControlArgs, QueryReply
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams
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
        plan = plan_generate(prompt, sampling_params, input_ids=input_ids, rid=rid, options=options, streamed=True)
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
        return self._stream(single(plan_chat(messages, sampling_params, rid=rid, options=options, streamed=True)))

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
