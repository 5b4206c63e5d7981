"""`/openapi.json`: a valid document that tells every path, and a server that holds to it whatever is sent."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite.http_server.app import ROUTES
from vibe_sgl_lite.http_server.openapi import BODIES, STREAMS

WRONG: list[Any] = [
    None, True, -1, 0, 1.5, 2**70, "", "x", "\u0000", [], [1], ["x"], [[1]], {}, {"x": 1}, [None], {"type": "x"}, [{}],
    {"type": "json_schema"}, [{"role": "user"}], {"function": {}}, [2**40], {"0": 1},
]  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 1}},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/abort_request": {"rid": "x"},
}


def test_the_document_tells_every_path(server: Server) -> None:
    document = server.get("/openapi.json").json
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    served = {route for route in ROUTES if not route[1].startswith(("/get_", "/openapi", "/metrics"))}
    assert {route for route in served if route[1] not in ("/", "/watch")} == told
    for path in BODIES:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        whole = schema | {"components": document["components"]}
        jsonschema.Draft202012Validator.check_schema(whole)
        jsonschema.validate(BASES[path], whole)
    assert set(STREAMS) <= set(BODIES)


@pytest.mark.parametrize("path", BODIES)
def test_no_body_makes_the_server_fail(server: Server, path: str) -> None:
    """Every field with values of every kind: done, or refused in the form that the document tells."""
    document = server.get("/openapi.json").json
    fields = document["components"]["schemas"][BODIES[path].__name__]["properties"]
    draw = random.Random(path)
    for field in fields:
        for value in draw.sample(WRONG, 3):
            if field in ("max_tokens", "max_output_tokens", "max_completion_tokens") and value is None:
                continue  # as many as fit takes long
            body = BASES[path] | {field: value}
            reply = server.post(path, body)
            assert reply.status in (200, 400, 404, 503), (body, reply.data)
            if reply.status != 200:
                assert reply.status != 503 or reply.json["error"]["code"] == "aborted"
                assert reply.json["error"]["message"]
                if "/messages" not in path:
                    jsonschema.validate(reply.json, document["components"]["schemas"]["Error"])
    assert server.get("/health").status == 200
