"""Embeddings and relevance as requests, with the instructions of Qwen3-Embedding's and Qwen3-Reranker's model cards:
https://huggingface.co/Qwen/Qwen3-Embedding-0.6B and Qwen3-Reranker-0.6B.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vibe_sgl_lite.runtime.client.outputs import Collector
from vibe_sgl_lite.runtime.client.requests import Plan, Rid, each, make_request, several, split, text_or_ids
from vibe_sgl_lite.runtime.errors import EngineError, RequestError
from vibe_sgl_lite.runtime.settings.schema import is_list, plain, shown

OPTIONS = ("priority", "cache_salt")  # and timeout_s
QUERY = "Instruct: {instruction}\nQuery:{text}"
RANKING_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

Progress = Callable[[int, int], None] | bool | None


def plan_embed(
    inputs: Any,
    *,
    instruction: str | None,
    dimensions: int | None,
    options: Mapping[str, Any],
    progress: Progress = None,
    rid: Rid = None,
    field: str = "inputs",
) -> Plan:
    """Requests of one `embed` call; see there. field: what its caller calls `inputs`. Raises RequestError."""
    given, many = several(inputs, field)
    if instruction is not None:
        _check_text(instruction, "instruction")
        if not all(isinstance(item, str) for item in given):
            raise RequestError(f"instruction goes before texts; {field} holds token ids", field="instruction")
        given = [QUERY.format(instruction=instruction, text=item) for item in given]
    if dimensions is not None:
        dimensions = plain(dimensions)
        if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
            raise RequestError(f"dimensions={shown(dimensions)} must be a whole number, 1 or more", field="dimensions")
    prompts = [dict(zip(("prompt", "input_ids"), text_or_ids(item, field), strict=True)) for item in given]
    return _plan(prompts, many, field, Collector.pooled, progress, rid, options, dimensions=dimensions or 0)


def plan_score(
    query: str,
    documents: Any,
    *,
    instruction: str | None,
    options: Mapping[str, Any],
    progress: Progress = None,
    rid: Rid = None,
) -> Plan:
    """Requests of one `score` call; see `Requests.score`. Raises RequestError."""
    instruction = RANKING_INSTRUCTION if instruction is None else instruction
    _check_text(instruction, "instruction")
    _check_text(query, "query")
    many = is_list(documents)
    prompts = []
    for document in documents if many else [documents]:
        _check_text(document, "documents")
        prompts.append({"pair": (instruction, query, document)})
    return _plan(prompts, many, "documents", _relevance, progress, rid, options)


def _plan(
    prompts: Sequence[dict[str, Any]],
    many: bool,
    field: str,
    outcome: Callable[[Collector], Any],
    progress: Progress,
    rid: Rid,
    options: Mapping[str, Any],
    **pooling: Any,
) -> Plan:
    shared, sampling = split(options, OPTIONS)
    wrong = next((name for name in sampling if name != "timeout_s"), None)
    if wrong is not None:
        raise RequestError(f"{wrong} does not go with it: nothing is sampled; leave it out", field=wrong)
    requests = [
        make_request(field, params, rid=name, **prompt, **pooling, **shared)
        for prompt, name, params in each(prompts, many, None, sampling, rid)
    ]
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise RequestError("progress must be True, or a function that takes two numbers", field="progress")
    return Plan(requests, many, outcome, _show if progress is True else progress or None)


def _relevance(collector: Collector) -> float:
    pooled = collector.pooled()
    if pooled.error is not None:
        raise pooled.error
    if pooled.finish_reason == "abort":
        raise EngineError("a score was aborted before its end")
    return pooled.vector[0]


def _check_text(value: object, field: str) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{field} holds a {type(value).__name__}: must be a text", field=field)


def _show(done: int, count: int) -> None:
    """A line on stderr that changes; a line of its own for each tenth where that is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {count}" + "\n" * (done == count))
    elif done * 10 // count > (done - 1) * 10 // count:
        sys.stderr.write(f"{done} of {count}\n")
    sys.stderr.flush()
