"""What every handler needs of this server: the engine, the tokenizer, names, counters."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vibe_sgl_lite.http_server.bodies import BodyReader
from vibe_sgl_lite.http_server.engine import Call, Engine
from vibe_sgl_lite.http_server.errors import ApiError
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.live_view import LiveView
from vibe_sgl_lite.http_server.metrics import SharedMetrics
from vibe_sgl_lite.http_server.security import given_key
from vibe_sgl_lite.http_server.timing import CallTimes
from vibe_sgl_lite.runtime.client.requests import ClientRequest, with_payer
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer


class Progress:
    """Whether steps get done while there is work: what was seen at the last look, and since when it has not changed."""

    def __init__(self) -> None:
        self._steps = -1
        self._since = 0.0

    def stuck_for(self, steps: int, busy: bool, now: float) -> float:
        """Seconds that no step has been planned for although requests wait for one."""
        if not busy or steps != self._steps:
            self._steps, self._since = steps, now
        return now - self._since


LOADING = "the engine is still loading the model; ask again soon"


class Service:
    def __init__(self, spec: PipelineSpec, engine: Engine, metrics: SharedMetrics) -> None:
        self.spec = spec
        self.engine = engine
        self.metrics = metrics
        self.bodies = BodyReader(metrics.own)
        self.model = spec.args.served_model_name or spec.model_name
        self.created = int(time.time())
        self.progress = Progress()
        self.live = LiveView(engine, metrics, lambda: self.tokenizer, self.model)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Loaded when the first request needs it, in a thread."""
        return ChatTokenizer.from_folder(self.spec.tokenizer_folder)

    async def chat_ids(self, messages: Sequence[dict[str, Any]], template_kwargs: Mapping[str, Any]) -> list[int]:
        """A chat as the engine tokenizes it. Raises RequestError."""

        def work() -> list[int]:
            self.tokenizer.check_variables(template_kwargs)
            return self.tokenizer.encode_chat(self.tokenizer.apply_chat_template(messages, **template_kwargs))

        return await asyncio.to_thread(work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await asyncio.to_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return await asyncio.to_thread(lambda: self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def check_ready(self) -> None:
        """Raises ApiError (503) while the engine loads."""
        if not self.engine.ready:
            raise ApiError(503, LOADING, code="loading")

    def _payer(self, exchange: Exchange) -> str:
        """Whose turn a request takes: that of its sender's address and key. Nobody learns the key from it."""
        sender = f"{exchange.client} {given_key(exchange)}".encode()
        return hashlib.blake2b(sender, key=self.spec.epoch.encode()[:64], digest_size=12).hexdigest()

    def submit(self, exchange: Exchange, requests: Sequence[ClientRequest], *, keep_aborted: bool = False) -> Call:
        """The caller closes the call. keep_aborted: see `Call`."""
        payer = self._payer(exchange)
        requests = [with_payer(request, payer) for request in requests]
        times = CallTimes(self.metrics.own, asyncio.get_running_loop().time(), requests[0].rid)
        exchange.times = times
        return self.engine.submit(requests, times, keep_aborted=keep_aborted)
