"""What trainers call between rollouts, under SGLang's names and vLLM's: pauses, new weights, sleep.

Unknown fields and parameters are refused: one that is not understood could leave a trainer with other weights than it
thinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec

from vibe_sgl_lite.http_server.errors import bad_request, from_engine
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.messages import ControlArgs, ControlCall

T = TypeVar("T", bound=msgspec.Struct)
Tag = Literal["weights", "kv_cache", "cuda_graph"]
UPDATE_REFUSED: Mapping[str, tuple[object, ...]] = {"load_format": ("auto",), "is_async": (), "keep_pause": ()}
UPDATE_IGNORED = frozenset({"torch_empty_cache", "recapture_cuda_graph", "token_step"})


class PauseBody(msgspec.Struct, kw_only=True):
    """`POST /pause_generation`. What becomes of requests that run; in_place is keep."""

    mode: Literal["abort", "wait", "keep", "retract", "in_place"] = "abort"


class UpdateBody(msgspec.Struct, kw_only=True):
    """`POST /update_weights_from_disk`."""

    model_path: str
    weight_version: str | None = None
    flush_cache: bool | None = None
    abort_all_requests: bool | None = None


class MemoryBody(msgspec.Struct, kw_only=True):
    """`POST /release_memory_occupation`, `/resume_memory_occupation`. tags: of what; all of it by default."""

    tags: list[Tag] | None = None


class NoBody(msgspec.Struct, kw_only=True):
    """`POST /continue_generation`."""


class _PauseParameters(msgspec.Struct, kw_only=True):
    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True


class _SleepParameters(msgspec.Struct, kw_only=True):
    level: int = 1
    mode: Literal["abort", "wait", "keep"] = "keep"


class _WakeParameters(msgspec.Struct, kw_only=True):
    tags: list[Tag] | None = None


async def pause_generation(service: Service, exchange: Exchange) -> None:
    mode = (await _body(service, exchange, PauseBody)).mode
    values = await _call(service, "pause", {"mode": "keep" if mode == "in_place" else mode})
    await exchange.answer_json({"status": "ok", "message": "generation is paused", **values})


async def continue_generation(service: Service, exchange: Exchange) -> None:
    await _body(service, exchange, NoBody, {}, frozenset({"torch_empty_cache"}))
    await _call(service, "continue", {})
    await exchange.answer_json({"status": "ok", "message": "generation continues"})


async def update_weights_from_disk(service: Service, exchange: Exchange) -> None:
    """What went wrong is told in SGLang's form too."""
    body = await _body(service, exchange, UpdateBody, UPDATE_REFUSED, UPDATE_IGNORED)
    args: ControlArgs = {"path": body.model_path, "weight_version": body.weight_version}
    args |= {"flush_cache": body.flush_cache is not False, "abort_all_requests": body.abort_all_requests is True}
    try:
        values = await service.engine.query("update_weights", args)
    except VibeError as error:
        refusal = from_engine(error, exchange.path)
        await exchange.answer_json({"success": False, "message": refusal.message, **refusal.openai()}, refusal.status)
        return
    await exchange.answer_json({"success": True, "message": "the new weights are in force", **values})


async def release_memory(service: Service, exchange: Exchange) -> None:
    """Without the tag kv_cache nothing is freed alone."""
    tags = (await _body(service, exchange, MemoryBody)).tags
    if tags is not None and "kv_cache" not in tags:
        raise bad_request("weights are freed together with the KV cache: add kv_cache, or leave tags out", "tags")
    level = 2 if tags is None or "weights" in tags else 1
    await exchange.answer_json(await _call(service, "sleep", {"level": level, "mode": "keep"}))


async def resume_memory(service: Service, exchange: Exchange) -> None:
    """Weights come back together with the KV cache; asked for alone, nothing is done yet."""
    await _wake(service, exchange, (await _body(service, exchange, MemoryBody)).tags)


async def pause(service: Service, exchange: Exchange) -> None:
    parameters = _parameters(exchange, _PauseParameters)
    await _call(service, "pause", {"mode": parameters.mode})
    if parameters.clear_cache and parameters.mode != "keep":
        await service.engine.query("flush_cache")
    await exchange.answer_json({"status": "paused"})


async def resume(service: Service, exchange: Exchange) -> None:
    await _call(service, "continue", {})
    await exchange.answer_json({"status": "resumed"})


async def sleep(service: Service, exchange: Exchange) -> None:
    parameters = _parameters(exchange, _SleepParameters)
    await exchange.answer_json(await _call(service, "sleep", {"level": parameters.level, "mode": parameters.mode}))


async def wake_up(service: Service, exchange: Exchange) -> None:
    await _wake(service, exchange, _parameters(exchange, _WakeParameters).tags)


async def is_paused(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json({"is_paused": bool((await service.engine.query("stats"))["paused"])})


async def is_sleeping(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json({"is_sleeping": bool((await service.engine.query("stats"))["sleep_level"])})


async def weight_version(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json({"weight_version": (await service.engine.query("stats"))["weight_version"]})


async def _wake(service: Service, exchange: Exchange, tags: list[Tag] | None) -> None:
    awakes = tags is None or "kv_cache" in tags
    await exchange.answer_json(await _call(service, "wake", {}) if awakes else {})


async def _call(service: Service, what: ControlCall, args: ControlArgs) -> dict[str, int | float | str | bool]:
    try:
        return await service.engine.query(what, args)
    except VibeError as error:
        raise from_engine(error) from error


async def _body(
    service: Service,
    exchange: Exchange,
    kind: type[T],
    refused: Mapping[str, tuple[object, ...]] | None = None,
    ignored: frozenset[str] = frozenset(),
) -> T:
    return service.bodies.read(await exchange.body() or b"{}", kind, refused or {}, ignored, strict=True)


def _parameters(exchange: Exchange, kind: type[T]) -> T:
    """Of the URL, as vLLM has them. Raises ApiError."""
    given: dict[str, object] = {}
    for name, value in parse_qsl(exchange.query, keep_blank_values=True):
        if name == "tags":
            given.setdefault(name, []).append(value)  # type: ignore[attr-defined]
        else:
            given[name] = value
    unknown = next((name for name in given if name not in kind.__struct_fields__), None)
    if unknown is not None:
        raise bad_request(f"{unknown:.80} is no parameter of {exchange.path}", unknown[:80], "unknown_parameter")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise bad_request(str(error)) from error
