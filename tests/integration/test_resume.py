"""Processes that hold the state of requests are killed while clients stream: every stream ends with the same text."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.integration.daemon import running
from vibe_sgl_lite import SamplingParams

# In float32 a continuation is exact; in bfloat16 a near tie may fall the other way in another batch.
FLAGS = ("--restart", "on-failure", "--max-restarts", "100", "--dtype", "float32", "--max-total-tokens", "65536")
CLIENTS = 50


def params(number: int) -> SamplingParams:
    """Of every kind: greedy and not, penalties, samples, logprobs, stop strings, texts held back."""
    return SamplingParams(
        max_new_tokens=150,
        ignore_eos=True,
        temperature=0 if number % 2 else 0.9,
        seed=number,
        repetition_penalty=1.2 if number % 3 == 0 else 1.0,
        n=2 if number % 10 == 4 else 1,
        top_logprobs=2 if number % 5 == 0 else 0,
        stop=[" and then she was", "\n\n\n"] if number % 4 == 0 else (),
        min_new_tokens=120 if number % 7 == 0 else 0,
    )


SLOW = pytest.mark.slow  # tests/chaos/test_recovery.py kills these too, under fewer kinds of requests


@pytest.mark.parametrize(
    "victim",
    ["tokenizer_manager", pytest.param("detokenizer", marks=SLOW), pytest.param("scheduler", marks=SLOW)],
)
def test_streams_survive_a_kill_with_the_same_text(victim: str) -> None:
    prompts = [f"Once upon a time, child {number}" for number in range(CLIENTS)]
    with running(*FLAGS) as daemon:
        with daemon.client() as client:
            wanted: list[Any] = client.generate(prompts, [params(number) for number in range(CLIENTS)])
        got: list[Any] = [None] * CLIENTS
        streams = [threading.Event() for _ in range(CLIENTS)]

        def stream(number: int) -> None:
            with daemon.client() as client:
                with client.stream(prompts[number], params(number)) as chunks:
                    pieces = []
                    for piece in chunks:
                        pieces.append(piece)
                        streams[number].set()
                got[number] = pieces

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        assert all(started.wait(30) for started in streams)
        daemon.children()[victim].kill()
        killed = time.monotonic()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), f"after {time.monotonic() - killed:.0f} s"
    for output, pieces in zip(wanted, got, strict=True):
        for sample in output if isinstance(output, list) else [output]:
            mine = [piece for piece in pieces if piece.index == sample.index]
            assert "".join(piece.text for piece in mine) == sample.text
            assert [token for piece in mine for token in piece.token_ids] == sample.token_ids
            last = mine[-1]
            assert (last.finish_reason, last.matched) == (sample.finish_reason, sample.matched)
            assert last.usage is not None
            assert last.usage.completion_tokens == sample.usage.completion_tokens
            logprobs = [entry for piece in mine for entry in piece.logprobs or ()]
            assert [(e.token_id, e.text, e.text_offset) for e in logprobs] == [
                (e.token_id, e.text, e.text_offset) for e in sample.logprobs or ()
            ]
