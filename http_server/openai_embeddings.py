"""`POST /v1/embeddings` as OpenAI has it, and Qwen3-Reranker's relevance: `/v1/rerank` (Jina's and Cohere's shape) and
`/v1/score` (vLLM's)."""

from __future__ import annotations

import asyncio
import base64
import time
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from vibe_sgl_lite.http_server.errors import bad_request
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.openai_types import IGNORED
from vibe_sgl_lite.http_server.requests import check_model, new_id, several_prompts
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.http_server.streaming import Collected, collect
from vibe_sgl_lite.runtime.client.pooling import plan_embed, plan_score
from vibe_sgl_lite.runtime.client.requests import Plan

MAX_INPUTS = 2048  # OpenAI's own
REFUSED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (),
    "messages": (),
    "normalize": (True,),
    "rank_fields": (),
    "truncate_prompt_tokens": (),
    "use_activation": (True,),
}


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """`POST /v1/embeddings`. input: a text, token ids, or several of either kind. instruction: for queries."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    instruction: str | None = None
    priority: int | None = None
    cache_salt: str | None = None


class Document(msgspec.Struct):
    text: str


class RerankBody(msgspec.Struct, kw_only=True):
    """`POST /v1/rerank`: documents by how relevant they are to a query."""

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    instruction: str | None = None
    priority: int | None = None
    cache_salt: str | None = None


class ScoreBody(msgspec.Struct, kw_only=True):
    """`POST /v1/score`: how relevant each text_2 is to text_1."""

    text_1: str
    text_2: str | list[str]
    model: str | None = None
    instruction: str | None = None
    priority: int | None = None
    cache_salt: str | None = None


async def embeddings(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), EmbeddingsBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    inputs = several_prompts(body.input, "input", MAX_INPUTS)
    plan = plan_embed(
        inputs, instruction=body.instruction, dimensions=body.dimensions, options=_options(body), field="input"
    )
    samples = await _run(service, exchange, plan)
    data = []
    for index, sample in enumerate(samples):
        data.append({"object": "embedding", "index": index, "embedding": _encoded(sample, body.encoding_format)})
        await asyncio.sleep(0)  # a thousand vectors as text take a second: others' streams go on meanwhile
    await exchange.answer_json({"object": "list", "data": data, "model": service.model, "usage": _usage(samples)})


async def rerank(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), RerankBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    if body.top_n is not None and body.top_n < 1:
        raise bad_request(f"top_n={body.top_n} must be at least 1", "top_n")
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    samples = await _scores(service, exchange, body, body.query, documents, "documents")
    scores = [_first(sample) for sample in samples]
    results: list[dict[str, Any]] = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]:
        shown = {} if body.return_documents is False else {"document": {"text": documents[index]}}
        results.append({"index": index, "relevance_score": scores[index], **shown})
    answer = {"id": new_id("rerank"), "model": service.model, "usage": _usage(samples), "results": results}
    await exchange.answer_json(answer)


async def score(service: Service, exchange: Exchange) -> None:
    body = service.bodies.read(await exchange.body(), ScoreBody, REFUSED, IGNORED)
    check_model(body.model, service.model)
    documents = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    samples = await _scores(service, exchange, body, body.text_1, documents, "text_2")
    data = [{"index": index, "object": "score", "score": _first(sample)} for index, sample in enumerate(samples)]
    head = {"id": new_id("score"), "object": "list", "created": int(time.time()), "model": service.model}
    await exchange.answer_json({**head, "data": data, "usage": _usage(samples)})


async def _scores(
    service: Service,
    exchange: Exchange,
    body: RerankBody | ScoreBody,
    query: str,
    documents: Sequence[str],
    field: str,
) -> list[Collected]:
    if not 0 < len(documents) <= MAX_INPUTS:
        raise bad_request(f"{field} has {len(documents)} entries: must have 1 to {MAX_INPUTS}", field)
    plan = plan_score(query, documents, instruction=body.instruction, options=_options(body))
    return await _run(service, exchange, plan)


async def _run(service: Service, exchange: Exchange, plan: Plan) -> list[Collected]:
    return await collect(exchange, service.submit(exchange, plan.requests))


def _options(body: EmbeddingsBody | RerankBody | ScoreBody) -> dict[str, Any]:
    return {key: value for key in ("priority", "cache_salt") if (value := getattr(body, key)) is not None}


def _encoded(sample: Collected, form: str | None) -> msgspec.Raw:
    """JSON of a vector."""
    value = base64.b64encode(sample.pooled).decode() if form == "base64" else array("f", sample.pooled).tolist()
    return msgspec.Raw(msgspec.json.encode(value))


def _first(sample: Collected) -> float:
    return array("f", sample.pooled)[0]


def _usage(samples: Sequence[Collected]) -> dict[str, int]:
    count = sum(sample.usage.prompt_tokens for sample in samples)
    return {"prompt_tokens": count, "total_tokens": count}
