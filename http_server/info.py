"""What the server tells of itself: health, models, metrics, version."""

from __future__ import annotations

import asyncio
import time
from importlib import metadata

import msgspec

from vibe_sgl_lite.http_server.errors import ApiError, from_engine
from vibe_sgl_lite.http_server.exchange import Exchange
from vibe_sgl_lite.http_server.metrics import render
from vibe_sgl_lite.http_server.requests import check_model
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.runtime.errors import VibeError

OWNER = "vibe-sgl-lite"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"


async def health(service: Service, exchange: Exchange) -> None:
    """200 while the engine serves or sleeps; 503 while it loads, drains, does not answer, or makes no progress."""
    service.check_ready()
    try:
        values = await service.engine.query("health")
    except VibeError as error:
        raise ApiError(503, str(error), code=error.code) from error
    if values.get("status") not in ("ok", "sleeping"):
        raise ApiError(503, f"the engine is not serving: {values.get('status')}", code="not_serving")
    busy = bool(values.get("steps_in_flight"))
    stuck = service.progress.stuck_for(int(values.get("steps_total", 0)), busy, time.monotonic())
    if stuck > service.spec.args.step_timeout / 2:
        raise ApiError(503, f"no step has ended for {stuck:.0f} s", code="no_progress")
    await exchange.answer_json({"status": "ok"})


async def models(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json({"object": "list", "data": [_model(service)]})


async def one_model(service: Service, exchange: Exchange) -> None:
    check_model(exchange.path.removeprefix("/v1/models/"), service.model)
    await exchange.answer_json(_model(service))


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": OWNER,
        "root": service.spec.model_name,
        "parent": None,
        "max_model_len": service.spec.context_length,
    }


async def prometheus(service: Service, exchange: Exchange) -> None:
    try:
        stats = await service.engine.query("stats")
    except VibeError as error:
        raise from_engine(error) from error
    args = service.spec.args
    pages = int(stats.get("kv_pages_total", 0))
    cache = {
        "block_size": str(service.spec.page_size),
        "num_gpu_blocks": str(pages),
        "cache_dtype": args.kv_cache_dtype,
        "enable_prefix_caching": str(not args.disable_radix_cache),
    }
    page = render(args.metrics_prefix, service.model, service.metrics.total(), stats, cache)
    await exchange.answer(page, content_type=TEXT)


def package_version() -> str:
    try:
        return metadata.version("vibe-sgl-lite")
    except metadata.PackageNotFoundError:
        return "0+checkout"


async def version(service: Service, exchange: Exchange) -> None:
    await exchange.answer_json({"version": package_version(), "engine": OWNER})


async def server_info(service: Service, exchange: Exchange) -> None:
    """Settings, without the key, and the engine's counters; this worker's requests in flight and tasks."""
    service.check_ready()
    args = msgspec.to_builtins(service.spec.args) | {"api_key": None, "page_size": service.spec.page_size}
    stats = await service.engine.query("stats")
    await exchange.answer_json(
        {
            "version": package_version(),
            "server_args": args,
            "device": service.spec.device,
            "dtype": service.spec.dtype,
            "max_total_num_tokens": int(stats.get("kv_pages_total", 0)) * service.spec.page_size,
            "internal_states": [stats],
            "http": {"calls": len(service.engine.calls), "tasks": len(asyncio.all_tasks())},
        }
    )


async def model_info(service: Service, exchange: Exchange) -> None:
    spec, stats = service.spec, await service.engine.query("stats")
    await exchange.answer_json(
        {
            "model_path": spec.model_name,
            "weight_version": stats["weight_version"],
            "tokenizer_path": spec.tokenizer_folder,
            "is_generation": spec.model.has_head,
            "context_length": spec.context_length,
            "vocab_size": spec.model.vocab_size,
            "served_model_name": service.model,
        }
    )
