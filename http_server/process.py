"""The HTTP server's process: `python -m vibe_sgl_lite.http_server.process <spec file> <worker number>`.

One more client of the engine. It opens its port at once and answers 503 until the engine can serve; then it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from vibe_sgl_lite.http_server.app import App
from vibe_sgl_lite.http_server.engine import Engine
from vibe_sgl_lite.http_server.listen import Handover, url
from vibe_sgl_lite.http_server.metrics import Metrics, SharedMetrics
from vibe_sgl_lite.http_server.request_log import RequestLog
from vibe_sgl_lite.http_server.security import Guard
from vibe_sgl_lite.http_server.service import Service
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import Child, run_child
from vibe_sgl_lite.runtime.messages import MAX_FRAME_BYTES, Shutdown
from vibe_sgl_lite.runtime.settings.machine import raise_descriptor_limit
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

TICK_S = 0.25
PUBLISH_TICKS = 4
IDLE_CONNECTION_S = 75
LAST_WORDS_S = 1  # for streams to get their end when the engine stops


class _Server(uvicorn.Server):
    """Signals are the launcher's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(child: Child, worker: int) -> None:
    spec, args = child.spec, child.spec.args
    folder = Path(spec.endpoints.directory)
    handover = Handover(folder, worker, args.http_workers)
    listener = await asyncio.to_thread(handover.get, args.host, args.port)
    handing_over = handover.offer(listener)
    metrics = SharedMetrics(Metrics(), folder, worker, args.http_workers)
    engine = Engine(spec.endpoints.inner_api)
    service = Service(spec, engine, metrics)
    app = App(service, Guard(args), RequestLog(args.log_requests, metrics.own), MAX_FRAME_BYTES)
    server = _Server(_uvicorn_config(app, args))
    control = _Control(child, server, metrics)
    server_task = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(_tell_ready(child, engine, url(listener, args.host, tls=bool(args.ssl_certfile))))
    try:
        await server_task
    finally:
        ready.cancel()
        control.close()
        handing_over.cancel()
        await engine.close()


async def _tell_ready(child: Child, engine: Engine, address: str) -> None:
    await engine.wait_ready()
    child.ready(http=address)


class _Control:
    """Answers the launcher between requests: heartbeats out, the end in."""

    def __init__(self, child: Child, server: uvicorn.Server, metrics: SharedMetrics) -> None:
        self._child, self._server, self._metrics = child, server, metrics
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(child.control.FD, self._look)
        self._ticks = 0
        self._timer = self._loop.call_later(0, self._tick)

    def _look(self) -> None:
        self._child.heartbeat()
        if any(isinstance(command, Shutdown) for command in self._child.commands()):
            self._server.should_exit = True

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._look()
        self._ticks += 1
        if self._ticks % PUBLISH_TICKS == 0:
            self._metrics.publish()

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._child.control.FD)


def _uvicorn_config(app: App, args: ServerArgs) -> uvicorn.Config:
    for flag, path in (("ssl_certfile", args.ssl_certfile), ("ssl_keyfile", args.ssl_keyfile)):
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"--{flag.replace('_', '-')} {path} cannot be read", field=flag)
    if args.ssl_certfile is not None:
        try:  # a key with a password would make the library ask for it on the terminal
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"--ssl-certfile {args.ssl_certfile}: no certificate in PEM with its key, without a password: {error}",
                field="ssl_certfile",
            ) from error
    return uvicorn.Config(
        app,
        http="httptools",
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=LAST_WORDS_S,
        proxy_headers=False,
    )


def main(child: Child) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are the ranks'
    raise_descriptor_limit()  # one a connection
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve(child, int(sys.argv[2])))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for this platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


if __name__ == "__main__":
    run_child("http_server" if sys.argv[2] == "0" else f"http_server.{sys.argv[2]}", main)
