"""Processes that are killed at any moment of an update: every answer is that of the old weights or of the new ones, and
says so; every call ends; and what is in force afterwards is what the engine says."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tests.integration.daemon import running
from tests.integration.test_rollouts import BASE, Models, reference_greedy
from tests.qwen3.harness import DENSE
from vibe_sgl_lite import Client, EngineError, Output, SamplingParams

PROMPT = [5, 6, 7, 8] * 6
COUNT = 40
ROUNDS = 12
VICTIMS = ("model_worker.0", "model_worker.1", "scheduler", "tokenizer_manager", "detokenizer")


@pytest.mark.slow
def test_whatever_dies_during_an_update(tmp_path: Path) -> None:
    models = Models(tmp_path, DENSE)
    expected = {name: reference_greedy(models, name, PROMPT, COUNT) for name in "abc"}
    draw = random.Random(7)
    params = SamplingParams(max_new_tokens=COUNT, temperature=0, ignore_eos=True)
    flags = ("--model-path", models.path("a"), "--weight-version", "a", "--dtype", "float32", "--tp", "2", *BASE)
    outcomes: dict[bool, int] = {True: 0, False: 0}
    with running(*flags, "--max-restarts", "50", standby=True) as daemon, daemon.client() as client:
        for number in range(ROUNDS):
            outputs: list[Output] = []
            streams = [threading.Thread(target=_generate, args=(client, params, outputs)) for _ in range(4)]
            for stream in streams:
                stream.start()
            name, done = "abc"[(number + 1) % 3], list[bool]()
            update = threading.Thread(target=_update, args=(client, models.path(name), name, done))
            update.start()
            time.sleep(draw.uniform(0.0, 0.3))  # the moment
            victim = VICTIMS[number % len(VICTIMS)]
            daemon.children()[victim].kill()
            for thread in (*streams, update):
                thread.join(90)
                assert not thread.is_alive(), f"{victim} was killed, and somebody waits for ever"
            assert len(outputs) == 4
            for out in outputs:
                check(out, expected)
            _until_served(client)
            version = client.weight_version()
            outcomes[done[0]] += 1
            assert not done[0] or version == name, "an update that was confirmed is in force"
            after = client.generate(input_ids=PROMPT, sampling_params=params)
            assert (after.token_ids, after.weight_version) == (expected[version], version)
    assert sum(outcomes.values()) == ROUNDS


def check(out: Output, expected: dict[str, list[int]]) -> None:
    """Tokens of one version are that version's; where a process died between them, the first ones are."""
    assert out.finish_reason == "length"
    first = out.weight_versions[0]
    end = COUNT if len(out.weight_versions) == 1 else first.end
    assert out.token_ids[:end] == expected[first.version][:end]


def _generate(client: Client, params: SamplingParams, outputs: list[Output]) -> None:
    outputs.append(client.generate(input_ids=PROMPT, sampling_params=params))


def _update(client: Client, path: str, name: str, done: list[bool]) -> None:
    try:
        client.update_weights_from_disk(path, name)
        done.append(True)
    except EngineError:
        done.append(False)


def _until_served(client: Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if client.health()["status"] == "ok":
                return
        except EngineError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)
