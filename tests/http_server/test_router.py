"""The recipe of docs/http.md: two daemons behind sglang-router. Skipped where that is not installed (SGLANG_ROUTER)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.http_server.server import Server, serving
from tests.http_server.test_life import free_port

ROUTER = os.environ.get("SGLANG_ROUTER") or shutil.which("sglang-router")
pytestmark = pytest.mark.skipif(ROUTER is None, reason="there is no sglang-router (pip install sglang-router)")
GROUPS, ROUNDS = 6, 6


@pytest.fixture(scope="module")
def daemons() -> Iterator[list[Server]]:
    with serving() as one, serving() as other:
        yield [one, other]


@contextmanager
def routing(daemons: list[Server], policy: str) -> Iterator[Server]:
    """A router in front of the daemons, as a server."""
    assert ROUTER is not None
    port = free_port()
    command = [
        ROUTER, "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--prometheus-port",
        str(free_port()), "--worker-urls", *(daemon.url for daemon in daemons),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            router = Server(daemons[0].daemon, f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError):
                    if (
                        router.get("/health").status == 200
                        and router.post("/v1/completions", _body(0, 0)).status == 200
                    ):
                        break
                assert time.monotonic() < deadline, "the router does not come up"
                time.sleep(0.2)
            yield router
        finally:
            process.kill()


def _body(group: int, number: int) -> dict[str, object]:
    prefix = f"Group {group} has a long common beginning. " * 12
    return {"model": "tiny", "prompt": f"{prefix} Number {number}.", "max_tokens": 20}


def hit_rate(daemons: list[Server], policy: str) -> float:
    """Part of the prompt tokens of all groups that came from a cache."""
    for daemon in daemons:
        daemon.wait_idle()
        daemon.post("/flush_cache", {})
    with routing(daemons, policy) as router:
        before = [daemon.stats() for daemon in daemons]
        for number in range(ROUNDS):  # the groups of a round at once, so that load tells the daemons apart too
            with ThreadPoolExecutor(GROUPS) as pool:
                bodies = [_body(group, number + 1) for group in range(GROUPS)]
                replies = list(pool.map(lambda body: router.post("/v1/completions", body), bodies))
            assert {reply.status for reply in replies} == {200}
        after = [daemon.stats() for daemon in daemons]
    found, looked = (
        sum(late[name] - early[name] for early, late in zip(before, after, strict=True))
        for name in ("cached_tokens_total", "prompt_tokens_total")
    )
    assert all(late["requests_total"] > early["requests_total"] for early, late in zip(before, after, strict=True))
    return float(found / looked)


def test_a_router_that_knows_prefixes_finds_more_in_the_caches(daemons: list[Server]) -> None:
    aware, random = hit_rate(daemons, "cache_aware"), hit_rate(daemons, "random")
    print(f"hit rate: cache_aware {aware:.2f}, random {random:.2f}")  # noqa: T201
    assert aware > random
    assert aware > 0.7


def test_streams_pass_through(daemons: list[Server]) -> None:
    with routing(daemons, "round_robin") as router:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 5}
        assert router.post("/v1/chat/completions", body).events[-1] == "[DONE]"
