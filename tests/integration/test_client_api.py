"""The client library on a real engine: what every call returns, refuses and leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.daemon import Daemon, running, wait_until
from vibe_sgl_lite import Client, Output, SamplingParams
from vibe_sgl_lite.runtime.errors import EngineError, RequestError
from vibe_sgl_lite.runtime.messages import Usage

TOKENS = 8  # of an answer: a step of the 0.6B shape in float32 takes a fifth of a second
GREEDY = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=2000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def daemon(model: list[str]) -> Iterator[Daemon]:
    """In float32, where no rounding makes a greedy token depend on what else is in the batch."""
    with running(*model, "--dtype", "float32") as daemon:
        yield daemon


def idle(client: Client) -> bool:
    """Nothing runs or waits, and every page is free or cached."""
    stats: dict[str, Any] = client.stats()
    busy = stats["num_running"] + stats["num_waiting"] + stats["steps_in_flight"]
    unused = stats["kv_pages_free"] + stats["kv_pages_cached"]
    return bool(busy == 0 and unused == stats["kv_pages_total"])


@pytest.fixture(autouse=True)
def nothing_is_left(client: Client) -> Iterator[None]:
    yield
    wait_until(lambda: idle(client), 60, "an idle engine")


def test_the_same_tokens_by_every_way(client: Client, daemon: Daemon) -> None:
    """Alone, in a list, streamed, awaited, as ids: greedy gives the same."""
    prompts = ["Once upon a time", "The little dog ran", "小猫 🐱 and"]
    alone = [client.generate(prompt, GREEDY) for prompt in prompts]
    together = client.generate(prompts, GREEDY)
    for one, other, prompt in zip(alone, together, prompts, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.finish_reason == "length"
        assert len(one.token_ids) == TOKENS
        assert one.usage is not None
        assert one.usage.completion_tokens == TOKENS
        chunks = list(client.stream(prompt, GREEDY))
        assert "".join(c.text for c in chunks) == one.text
        assert [i for c in chunks for i in c.token_ids] == one.token_ids
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        last = chunks[-1].usage
        assert last is not None
        assert (last.prompt_tokens, last.completion_tokens) == (one.usage.prompt_tokens, TOKENS)

    async def awaited() -> list[Output]:
        async with daemon.async_client() as c:
            return await c.generate(prompts, GREEDY)

    assert [out.token_ids for out in asyncio.run(awaited())] == [out.token_ids for out in alone]


def test_ids_and_their_errors(client: Client) -> None:
    out = client.generate(input_ids=[5, 6, 7], sampling_params=GREEDY)
    assert out.usage is not None
    assert out.usage.prompt_tokens == 3
    assert client.generate([5, 6, 7], GREEDY).token_ids == out.token_ids
    with pytest.raises(RequestError, match="outside the vocabulary"):
        client.generate(input_ids=[client.model.vocab_size])


def test_a_seed_decides_and_is_reported(client: Client) -> None:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=1.5, seed=11, ignore_eos=True)
    first = client.generate("Once", params)
    assert client.generate(["Ben", "Once", "Anna"], params)[1].token_ids == first.token_ids
    assert first.sampling is not None
    assert (first.sampling.seed, first.sampling.temperature) == (11, 1.5)
    free = client.generate("Once", SamplingParams(max_new_tokens=TOKENS, temperature=1.5, ignore_eos=True))
    assert free.sampling is not None
    seed = free.sampling.seed  # a random one, which repeats the output
    again = SamplingParams(max_new_tokens=TOKENS, temperature=1.5, ignore_eos=True, seed=seed)
    assert client.generate("Once", again).token_ids == free.token_ids


def test_stop_token_and_stop_string(client: Client) -> None:
    plain = client.generate("Once upon a time", GREEDY)
    stop_id = plain.token_ids[4]
    at = plain.token_ids.index(stop_id)
    out = client.generate(
        "Once upon a time",
        SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True, stop_token_ids=[stop_id]),
    )
    assert (out.finish_reason, out.matched, out.token_ids) == ("stop", stop_id, plain.token_ids[: at + 1])
    word = plain.text[3:7]
    out = client.generate(
        "Once upon a time", SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True, stop=word)
    )
    assert (out.finish_reason, out.matched) == ("stop", word)
    assert out.text == plain.text[: plain.text.index(word)]
    assert out.usage is not None
    assert out.usage.completion_tokens == len(out.token_ids) <= TOKENS


def test_chat_counts_the_template_and_finds_it_cached(client: Client) -> None:
    salt = os.urandom(4).hex()
    messages = [{"role": "user", "content": "Tell me about a cat and a dog in the garden, please. " * 3}]
    first = client.chat(messages, GREEDY, enable_thinking=False, cache_salt=salt)
    again = client.chat(messages, GREEDY, enable_thinking=False, cache_salt=salt)
    assert first.token_ids == again.token_ids
    assert first.usage is not None
    assert again.usage is not None
    assert (first.usage.cached_tokens, again.usage.prompt_tokens) == (0, first.usage.prompt_tokens)
    assert again.usage.cached_tokens >= 16
    other = client.chat(messages, GREEDY, enable_thinking=False, cache_salt=salt + "x")
    assert other.usage is not None
    assert other.usage.cached_tokens == 0
    text = "".join(c.text for c in client.stream_chat(messages, GREEDY, enable_thinking=False))
    assert text == first.text
    assert [out.token_ids for out in client.chat([messages, messages], GREEDY, enable_thinking=False)] == [
        first.token_ids
    ] * 2


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.generate(""), "prompt"),
        (lambda c: c.generate("x " * 5_000_000), "prompt"),
        (lambda c: c.generate("x", SamplingParams(max_new_tokens=10**8)), "max_new_tokens"),
        (lambda c: c.generate("x", SamplingParams(stop_token_ids=[10**7])), "stop_token_ids"),
        (lambda c: c.generate("x", regex="(a"), "regex"),
        (lambda c: c.generate("x", json_schema={"type": "thing"}), "json_schema"),
        (lambda c: c.chat([{"role": "user", "content": "x"}], tools=["f"]), "tools"),
        (lambda c: c.chat([{"role": "king", "content": "x"}]), "messages"),
        (lambda c: c.chat([{"role": "user"}]), "messages"),
        (lambda c: list(c.stream("")), "prompt"),
    ],
)
def test_bad_requests_get_one_clear_error_and_disturb_nobody(
    client: Client, call: Callable[[Client], Any], field: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(client.generate, "Once upon a time", GREEDY)
        start = time.monotonic()
        with pytest.raises(RequestError) as caught:
            call(client)
        assert caught.value.field == field, caught.value
        assert time.monotonic() - start < 20
        assert neighbour.result(30).finish_reason == "length"


def test_abort(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "Once", LONG, rid="victim")
        wait_until(lambda: client.stats()["num_running"] == 1, 60, "a running request")
        client.abort("victim")
        out = call.result(60)
    assert out.finish_reason == "abort"
    assert out.usage is not None
    assert len(out.token_ids) == out.usage.completion_tokens < 2000


def test_leaving_a_stream_frees_its_pages(client: Client) -> None:
    for chunk in client.stream("Once", LONG):
        assert chunk.finish_reason is None
        break
    wait_until(lambda: client.stats()["num_running"] == 0, 60, "the end of the left stream")


def test_cancelling_frees_its_pages(client: Client, daemon: Daemon) -> None:
    async def work() -> None:
        async with daemon.async_client() as c:
            calls = [asyncio.create_task(c.generate(["Once", "Ben"], LONG)) for _ in range(3)]
            while (await c.stats())["num_running"] != 6:
                await asyncio.sleep(0.02)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            while (await c.stats())["num_running"] != 0:
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_closing_a_client_frees_its_pages(client: Client, daemon: Daemon) -> None:
    other = daemon.client()
    stream = other.stream("Once", LONG)
    next(stream)
    other.close()
    wait_until(lambda: client.stats()["num_running"] == 0, 60, "the end of the closed client's request")


def test_a_vanished_client_frees_its_pages(client: Client, daemon: Daemon) -> None:
    """Killed, so that it cannot say goodbye: 3 s and a step."""
    code = f"""
from vibe_sgl_lite import Client, SamplingParams
s = Client({client.address!r}).stream("Once", SamplingParams(max_new_tokens=2000, temperature=0, ignore_eos=True))
next(s); print("on", flush=True)
for _ in s: pass
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "on\n"
        assert client.stats()["num_running"] == 1
        victim.send_signal(signal.SIGKILL)
    wait_until(lambda: client.stats()["num_running"] == 0, 60, "the end of the vanished client's request")


def test_a_pausing_consumer_loses_nothing(client: Client) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
    whole = client.generate("Once upon a time", params)
    stream = client.stream("Once upon a time", params)
    chunks = [next(stream)]
    time.sleep(3.5)  # longer than a silent session lives
    chunks += stream
    assert "".join(c.text for c in chunks) == whole.text
    assert chunks[-1].usage == Usage(whole.usage.prompt_tokens, 24, chunks[-1].usage.cached_tokens)  # type: ignore[union-attr]


def test_stats_health_and_flush(client: Client) -> None:
    promised = {
        "kv_pages_total", "kv_pages_free", "kv_pages_cached", "num_running", "num_waiting", "num_retractions",
        "cached_tokens_total", "prompt_tokens_total", "completion_tokens_total", "steps_total",
    }  # fmt: skip
    before: dict[str, Any] = client.stats()
    assert promised <= set(before)
    client.generate("Once upon a time there was a little dog in the garden", GREEDY)
    after = client.stats()
    assert after["completion_tokens_total"] == before["completion_tokens_total"] + TOKENS
    health = client.health()
    assert health["status"] == "ok"
    assert health["memory_low"] is False
    parts = {name: int(size) for name, size in health.items() if name.startswith("memory_") and name != "memory_low"}
    assert {f"memory_{name}.process" for name in ("scheduler", "detokenizer", "tokenizer_manager")} < parts.keys()
    assert all(2**20 < size < 2**42 for size in parts.values()), parts
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "Once", LONG, rid="running")
        wait_until(lambda: client.stats()["num_running"] == 1, 60, "a running request")
        with pytest.raises(EngineError, match="run"):
            client.flush_cache()
        client.abort("running")
        call.result(60)
    wait_until(lambda: idle(client), 60, "an idle engine")
    client.flush_cache()
    stats = client.stats()
    assert (stats["kv_pages_free"], stats["kv_pages_cached"]) == (stats["kv_pages_total"], 0)


def test_threads_share_a_client(client: Client) -> None:
    expected = {p: client.generate(p, GREEDY).token_ids for p in ("Anna", "Ben", "Once", "The dog")}
    failures: list[str] = []

    def work(prompt: str) -> None:
        streamed = [i for c in client.stream(prompt, GREEDY) for i in c.token_ids]
        if not client.generate(prompt, GREEDY).token_ids == streamed == expected[prompt]:
            failures.append(prompt)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in expected for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    assert failures == []
