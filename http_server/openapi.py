"""`/openapi.json`, made from the types that bodies are read with."""

from __future__ import annotations

from typing import Any

import msgspec

from vibe_sgl_lite.http_server.anthropic_messages import CountBody, MessagesBody
from vibe_sgl_lite.http_server.control import MemoryBody, NoBody, PauseBody, UpdateBody
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.info import package_version
from vibe_sgl_lite.http_server.native import AbortBody, DetokenizeBody, GenerateBody, TokenizeBody
from vibe_sgl_lite.http_server.openai_embeddings import EmbeddingsBody, RerankBody, ScoreBody
from vibe_sgl_lite.http_server.openai_responses import ResponsesBody
from vibe_sgl_lite.http_server.openai_types import ChatBody, CompletionBody
from vibe_sgl_lite.http_server.service import Service

CONTROL_BODIES: dict[str, type[msgspec.Struct]] = {
    "/pause_generation": PauseBody,
    "/continue_generation": NoBody,
    "/update_weights_from_disk": UpdateBody,
    "/release_memory_occupation": MemoryBody,
    "/resume_memory_occupation": MemoryBody,
}
BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/rerank": RerankBody,
    "/v1/score": ScoreBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/generate": GenerateBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/abort_request": AbortBody,
}
STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate")
GETS = {
    "/v1/models": "The models that are served.",
    "/health": "Whether the engine serves.",
    "/version": "The version of this package.",
    "/server_info": "Settings and counters.",
    "/model_info": "The model that is served.",
    "/is_paused": "Whether generation is paused.",
    "/is_sleeping": "Whether the engine sleeps.",
    "/weight_version": "The version of the weights in force.",
}
POSTS = {
    "/flush_cache": "Empty the prefix cache.",
    "/pause": "Pause generation; parameters mode and clear_cache.",
    "/resume": "End a pause.",
    "/sleep": "Free memory; parameters level and mode.",
    "/wake_up": "End a sleep; parameter tags.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document() -> dict[str, Any]:
    template = "#/components/schemas/{name}"
    bodies = BODIES | CONTROL_BODIES
    _, components = msgspec.json.schema_components(bodies.values(), ref_template=template)
    paths: dict[str, Any] = {path: {"get": _operation(path, text)} for path, text in GETS.items()}
    for path, kind in bodies.items():
        reference = {"$ref": template.format(name=kind.__name__)}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        text = (kind.__doc__ or path).splitlines()[0].replace("`", "")
        paths[path] = {"post": _operation(path, text) | {"requestBody": body}}
    paths |= {path: {"post": _operation(path, text)} for path, text in POSTS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vibe-sgl-lite", "version": package_version()},
        "paths": paths,
        "components": {
            "schemas": components | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str, text: str) -> dict[str, Any]:
    kinds = ["object", "array"] if path == "/generate" else "object"  # several prompts make a list there
    answer: dict[str, Any] = {"application/json": {"schema": {"type": kinds}}}
    if path in STREAMS:
        answer["text/event-stream"] = {}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {
        "summary": text,
        "responses": {
            "200": {"description": "Done.", "content": answer},
            "4XX": {"description": "The request is wrong, or not allowed."} | error,
            "5XX": {"description": "The engine cannot do it now."} | error,
        },
    }


async def openapi(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json(document())
