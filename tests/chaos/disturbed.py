"""Requests whose answers are known, run while something is broken; and what must hold afterwards."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from tests.integration.daemon import Daemon, wait_until
from vibe_sgl_lite import Client, SamplingParams, VibeError

# Of every kind that keeps state from token to token. fp32 and position-keyed draws make a continuation exact.
KINDS: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, seed=7),
    SamplingParams(temperature=1.1, seed=11, top_p=0.9, top_k=40, repetition_penalty=1.2, presence_penalty=0.4),
    SamplingParams(temperature=0.8, seed=3, frequency_penalty=0.5, min_new_tokens=20, logprobs=True),
)
SHARED = "One day a girl and her dog went to the river. " * 6  # a prefix that the radix cache shares


@dataclass
class Job:
    """One request and what became of it. text, token_ids: joined from the chunks as they came."""

    prompt: str
    params: SamplingParams
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # one, if all is well
    times: list[float] = field(default_factory=list)  # of the chunks

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def make_jobs(count: int, tokens: int) -> list[Job]:
    """`count` requests of mixed kinds, each of `tokens` tokens."""
    return [
        Job(
            (SHARED if number % 2 else "") + f"Story number {number}:",
            SamplingParams(**{**KINDS[number % len(KINDS)].to_dict(), "max_new_tokens": tokens, "ignore_eos": True}),
        )
        for number in range(count)
    ]


class Run:
    """`jobs` as streams of `client`, each in a thread of its own."""

    def __init__(self, client: Client, jobs: list[Job]) -> None:
        self.jobs = jobs
        self._client = client
        self._threads = [threading.Thread(target=self._stream, args=(job,)) for job in jobs]
        for thread in self._threads:
            thread.start()

    def _stream(self, job: Job) -> None:
        try:
            for chunk in self._client.stream(job.prompt, job.params):
                job.times.append(time.monotonic())
                job.text += chunk.text
                job.token_ids += chunk.token_ids
                if chunk.finish_reason is not None:
                    job.ends.append(chunk.finish_reason)
        except VibeError as error:
            job.ends.append(f"{type(error).__name__}: {error}")

    @property
    def num_tokens(self) -> int:
        return sum(len(job.token_ids) for job in self.jobs)

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert self.ended, f"streams without an end after {timeout:.0f} s: {[job.ends for job in self.jobs]}"


def assert_same(run: Run, undisturbed: Run) -> None:
    """Exactly one good end each, with the tokens and the text of the run that nothing disturbed."""
    for job, expected in zip(run.jobs, undisturbed.jobs, strict=True):
        assert job.ends == expected.ends == ["length"], job.prompt
        assert job.token_ids == expected.token_ids, job.prompt
        assert job.text == expected.text, job.prompt


def assert_nothing_leaked(daemon: Daemon, client: Client) -> None:
    """All pages free or cached, nothing running, and the engine's four processes."""
    wait_until(lambda: not client.stats()["num_running"] and not client.stats()["num_waiting"], 60, "idle")
    stats = client.stats()
    assert int(stats["kv_pages_free"]) + int(stats["kv_pages_cached"]) == int(stats["kv_pages_total"])
