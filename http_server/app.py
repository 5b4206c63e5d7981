"""The ASGI application: which handler answers what, and what every answer goes through."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from vibe_sgl_lite.http_server import control, info, native
from vibe_sgl_lite.http_server.anthropic_messages import count_tokens, messages
from vibe_sgl_lite.http_server.errors import RETRY_AFTER_S, ApiError, from_engine
from vibe_sgl_lite.http_server.exchange import DisconnectedError, Exchange, Receive, Scope, Send
from vibe_sgl_lite.http_server.live import watch
from vibe_sgl_lite.http_server.openai_chat import chat_completions
from vibe_sgl_lite.http_server.openai_completions import completions
from vibe_sgl_lite.http_server.openai_embeddings import embeddings, rerank, score
from vibe_sgl_lite.http_server.openai_responses import responses
from vibe_sgl_lite.http_server.openapi import openapi
from vibe_sgl_lite.http_server.pages import page
from vibe_sgl_lite.http_server.request_log import RequestLog
from vibe_sgl_lite.http_server.security import Guard
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.runtime.errors import VibeError

Handler = Callable[[Service, Exchange], Awaitable[None]]

ROUTES: dict[tuple[str, str], Handler] = {
    ("POST", "/v1/chat/completions"): chat_completions,
    ("POST", "/v1/completions"): completions,
    ("POST", "/v1/responses"): responses,
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/v1/rerank"): rerank,
    ("POST", "/v1/score"): score,
    ("POST", "/v1/messages"): messages,
    ("POST", "/v1/messages/count_tokens"): count_tokens,
    ("POST", "/generate"): native.generate,
    ("POST", "/tokenize"): native.tokenize,
    ("POST", "/detokenize"): native.detokenize,
    ("POST", "/abort_request"): native.abort_request,
    ("POST", "/flush_cache"): native.flush_cache,
    ("POST", "/pause_generation"): control.pause_generation,
    ("POST", "/continue_generation"): control.continue_generation,
    ("POST", "/update_weights_from_disk"): control.update_weights_from_disk,
    ("POST", "/release_memory_occupation"): control.release_memory,
    ("POST", "/resume_memory_occupation"): control.resume_memory,
    ("POST", "/pause"): control.pause,
    ("POST", "/resume"): control.resume,
    ("POST", "/sleep"): control.sleep,
    ("POST", "/wake_up"): control.wake_up,
    ("GET", "/is_paused"): control.is_paused,
    ("GET", "/is_sleeping"): control.is_sleeping,
    ("GET", "/weight_version"): control.weight_version,
    ("GET", "/get_weight_version"): control.weight_version,
    ("GET", "/v1/models"): info.models,
    ("GET", "/"): page,
    ("GET", "/watch"): watch,
    ("GET", "/health"): info.health,
    ("GET", "/metrics"): info.prometheus,
    ("GET", "/openapi.json"): openapi,
    ("GET", "/version"): info.version,
    ("GET", "/server_info"): info.server_info,
    ("GET", "/get_server_info"): info.server_info,
    ("GET", "/model_info"): info.model_info,
    ("GET", "/get_model_info"): info.model_info,
}
# Paths that begin with these lead to one handler.
TREES: dict[str, Handler] = {"/v1/models/": info.one_model, "/static/": page}
GENERATES = ("/v1/", "/generate")  # what needs a model that is loaded

# Where other engines have what is here: Ollama, llama.cpp, SageMaker, SGLang.
ELSEWHERE = {
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
    "/api/embed": "/v1/embeddings",
    "/completion": "/v1/completions",
    "/props": "/server_info",
    "/slots": "/watch",
    "/ping": "/health",
    "/health_generate": "/health",
    "/encode": "/v1/embeddings",
}

log = logging.getLogger(__name__)


class App:
    def __init__(self, service: Service, guard: Guard, requests: RequestLog, max_body: int) -> None:
        self._service, self._guard, self._log, self._max_body = service, guard, requests, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "there is neither a lifespan nor a websocket"
        exchange = Exchange(scope, receive, send, self._max_body)
        try:
            await self._answer(exchange)
        except DisconnectedError:
            self._service.metrics.own.disconnects += 1
        except ApiError as error:
            await self._refuse(exchange, error)
        except VibeError as error:
            await self._refuse(exchange, from_engine(error, exchange.path))
        except Exception:
            log.exception("%s %s failed", exchange.method, exchange.path)
            if exchange.status:
                raise  # uvicorn closes the connection: the answer is not whole
            await self._refuse(exchange, ApiError(500, "the server made a mistake; its log tells more"))
        self._log.write(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        self._guard.check(exchange)
        if self._guard.is_preflight(exchange):
            await exchange.answer(b"", 204)
            return
        handler = self._handler(exchange)
        if exchange.method == "POST" and exchange.path.startswith(GENERATES):
            self._service.check_ready()
        await handler(self._service, exchange)

    def _handler(self, exchange: Exchange) -> Handler:
        method = "GET" if exchange.method == "HEAD" else exchange.method
        found = ROUTES.get((method, exchange.path))
        if found is None and method == "GET":
            found = next((handler for tree, handler in TREES.items() if exchange.path.startswith(tree)), None)
        if found is not None:
            return found
        allowed = [method for method, path in ROUTES if path == exchange.path]
        if allowed:
            exchange.extra_headers.append((b"allow", ", ".join(allowed).encode()))
            raise ApiError(405, f"{exchange.method} is not allowed here: use {' or '.join(allowed)}")
        path = exchange.path.rstrip("/")
        meant = ELSEWHERE.get(path) or next((ours for _, ours in ROUTES if ours in (path, f"/v1{path}")), None)
        told = f"it is {meant}" if meant else "see /openapi.json"
        raise ApiError(404, f"there is no {exchange.path} here; {told}", code="not_found")

    async def _refuse(self, exchange: Exchange, error: ApiError) -> None:
        if error.status in (429, 503):
            exchange.extra_headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        if error.status == 401:
            exchange.extra_headers.append((b"www-authenticate", b"Bearer"))
        body = error.anthropic() if exchange.path.startswith("/v1/messages") else error.openai()
        await exchange.answer_json(body, error.status)
