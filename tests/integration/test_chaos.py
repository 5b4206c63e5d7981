"""Faults under load: killed and hung processes, vanishing clients, a pool that is too small."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.integration.daemon import ROOT, Daemon, alive_after, running, wait_until
from tests.integration.streams import Streams, assert_dead_within
from vibe_sgl_lite import SamplingParams

STEP_TIMEOUT_S = 2


@pytest.mark.parametrize("victim", ["model_worker.0", "scheduler", "detokenizer", "tokenizer_manager"])
def test_a_killed_child_ends_everything_in_time(victim: str) -> None:
    with running("--restart", "never") as daemon, daemon.client() as one, daemon.client() as two:
        streams = Streams([one, two], each=4)
        streams.wait_running()
        start = time.monotonic()
        daemon.children()[victim].kill()
        assert_dead_within(streams, start, 2.0)
        assert daemon.wait_exit(5) == 1
        assert daemon.log().splitlines()[-1] == f"error: {victim} was killed by SIGKILL"
        assert daemon.survivors(within=20) == []
        assert daemon.rest_of_stdout() == ""


def test_a_killed_launcher_takes_everything_along() -> None:
    with running() as daemon, daemon.client() as client:
        streams = Streams([client], each=4)
        streams.wait_running()
        start = time.monotonic()
        daemon.process.kill()
        assert_dead_within(streams, start, 2.0)
        assert daemon.survivors(within=max(0.0, start + 2 - time.monotonic())) == []


def test_a_launcher_killed_while_starting_leaves_nothing() -> None:
    with Daemon() as daemon:
        wait_until(lambda: len(daemon.children()) == 4, 60, "four children")
        children = daemon.descendants()
        daemon.process.kill()
        assert alive_after(children, 20) == []


def test_a_hung_worker_is_found_dumped_and_killed() -> None:
    with running("--restart", "never", "--step-timeout", str(STEP_TIMEOUT_S)) as daemon, daemon.client() as client:
        streams = Streams([client], each=4)
        streams.wait_running()
        start = time.monotonic()
        daemon.children()["model_worker.0"].send_signal(signal.SIGSTOP)
        assert_dead_within(streams, start, STEP_TIMEOUT_S + 6.0)
        assert daemon.wait_exit(5) == 1
        assert daemon.log().splitlines()[-1].startswith("error: model_worker.0 hung and was killed: ")
        assert daemon.survivors(within=20) == []


VANISHING = """
import asyncio, sys
from vibe_sgl_lite import AsyncClient, SamplingParams

async def one(name, i):
    async with AsyncClient(name=name) as client:
        first = True
        async for chunk in client.stream(f"Client {i}", SamplingParams(max_new_tokens=8000, ignore_eos=True)):
            if first:
                print("streaming", flush=True)
            first = False

async def main():
    await asyncio.gather(*(one(sys.argv[1], i) for i in range(40)))

asyncio.run(main())
"""


def test_200_streaming_clients_a_fifth_vanishes() -> None:
    params = SamplingParams(max_new_tokens=48, temperature=0.8, seed=1, ignore_eos=True)

    async def stay(daemon: Daemon, index: int) -> int:
        async with daemon.async_client() as client:
            tokens, finish = 0, None
            async for chunk in client.stream(f"Client {index} says", params):
                tokens += len(chunk.token_ids)
                finish = chunk.finish_reason
            assert finish == "length"
            return tokens

    async def all_who_stay(daemon: Daemon) -> list[int]:
        return await asyncio.gather(*(stay(daemon, index) for index in range(160)))

    with running() as daemon, daemon.client() as watcher:
        vanishing = subprocess.Popen(
            [sys.executable, "-c", VANISHING, daemon.name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert vanishing.stdout is not None
        for _ in range(40):
            assert vanishing.stdout.readline() == "streaming\n"
        killer = threading.Timer(1.0, vanishing.kill)
        killer.start()
        assert asyncio.run(all_who_stay(daemon)) == [48] * 160
        killer.join()
        vanishing.wait()
        vanishing.stdout.close()
        wait_until(lambda: watcher.stats()["num_running"] == 0, 60, "the vanished clients' requests end")
        stats = watcher.stats()
        assert stats["num_waiting"] == 0
        assert int(stats["kv_pages_free"]) + int(stats["kv_pages_cached"]) == int(stats["kv_pages_total"])
        assert daemon.stop() == 0


@pytest.mark.slow
def test_a_pool_for_2_of_16_requests_changes_no_token() -> None:
    prompts = [f"Repeat: {word} {number}" for number, word in enumerate(["blue", "cat", "nine", "tree"] * 4)]
    params = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
    with running("--dtype", "float32") as daemon, daemon.client() as client:
        alone = [client.generate(prompt, params).token_ids for prompt in prompts]
    with running("--dtype", "float32", "--max-total-tokens", "160") as daemon, daemon.client() as client:
        together = client.generate(prompts, params)
        stats = client.stats()
        assert stats["kv_pages_total"] == 10
        assert [output.token_ids for output in together] == alone
        assert int(stats["kv_pages_free"]) + int(stats["kv_pages_cached"]) == 10
