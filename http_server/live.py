"""`GET /watch`: what the engine does right now, as a stream of events for the page and for `vibe-sgl-lite top`."""

from __future__ import annotations

import asyncio

from vibe_sgl_lite.http_server import sse
from vibe_sgl_lite.http_server.errors import from_engine
from vibe_sgl_lite.http_server.exchange import EVENTS, Exchange
from vibe_sgl_lite.http_server.live_view import LOOKS_A_SECOND
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.runtime.errors import VibeError


async def watch(service: Service, exchange: Exchange) -> None:
    service.check_ready()
    await asyncio.to_thread(lambda: service.tokenizer)  # loaded where that holds nobody up
    async with exchange.abandoned_on_disconnect():
        data = await service.live.event()
        await exchange.begin(200, EVENTS)
        while True:
            await exchange.write(data)
            await asyncio.sleep(1 / LOOKS_A_SECOND)
            try:
                data = await service.live.event()
            except VibeError as error:
                await exchange.write(sse.event(from_engine(error).openai()), more=False)
                return
