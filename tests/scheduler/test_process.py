"""The scheduler's process over real sockets: the test plays launcher, tokenizer manager, detokenizer and rank."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.scheduler.fake_rank import FakeRank, reference
from tests.scheduler.harness import config, request, sampling
from tests.scheduler.neighbours import Neighbours
from vibe_sgl_lite.runtime.messages import (
    AbortRequest,
    ChildFailed,
    ClientsLost,
    ForwardBatch,
    Heartbeat,
    RankReady,
    RanksLost,
    RequestRejected,
    SchedulerQuery,
    SchedulerReply,
    StepOutput,
    StopRank,
    TokenOutput,
    unpack_ids,
)
from vibe_sgl_lite.scheduler.process import make_core
from vibe_sgl_lite.scheduler.tools.replay import replay
from vibe_sgl_lite.scheduler.tools.timeline import FILE_NAME

NUM_PAGES = 32


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vsl", dir="/tmp") as path:
        yield path


def test_serves_requests_and_stops(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.control_message(Heartbeat)
        ready = n.become_ready()
        assert ready.facts == {"kv_pages": NUM_PAGES, "device": "cpu", "dtype": "float32", "page_size": 4}
        prompts = {10: [1, 2, 3], 20: list(range(40)), 30: [5] * 9}
        for uid, prompt in prompts.items():
            n.inputs.send(request(uid, prompt, max_new_tokens=6))
        n.inputs.send(request(40, [1], max_new_tokens=4 * NUM_PAGES + 1))
        opens, outputs = n.run_rank(until_finished=3)
        assert sorted(o.uid for o in opens) == [10, 20, 30]
        for uid, prompt in prompts.items():
            tokens = [t for o in outputs if o.uid == uid for t in unpack_ids(o.token_ids)]
            assert tokens == reference(prompt, sampling(max_new_tokens=6))
        rejected = n.reply()
        assert isinstance(rejected, RequestRejected)
        assert (rejected.uid, rejected.error.code) == (40, "kv_exhausted")

        n.inputs.send(SchedulerQuery(1, "stats"))
        stats = n.reply()
        assert isinstance(stats, SchedulerReply)
        assert stats.values["kv_pages_total"] == NUM_PAGES
        assert stats.values["completion_tokens_total"] == 18
        n.inputs.send(SchedulerQuery(2, "flush_cache"))
        flushed = n.reply()
        assert isinstance(flushed, SchedulerReply)
        assert flushed.error is None
        assert int(flushed.values["flushed_pages"]) > 0

        n.inputs.send(request(50, [1, 2], max_new_tokens=9))
        while n.batches.receive(0.2) is not None:
            pass  # its steps stay unanswered
        n.inputs.send(SchedulerQuery(3, "flush_cache"))
        refused = n.reply()
        assert isinstance(refused, SchedulerReply)
        assert refused.error is not None
        n.inputs.send(AbortRequest(50))
        aborted: list[TokenOutput] = []
        while not aborted:
            message = n.detokenizer.receive(5)
            assert message is not None
            aborted += message.outputs if isinstance(message, StepOutput) else []
        assert aborted[0].finish is not None
        assert aborted[0].finish.reason == "abort"

        assert n.shut_down() == 0
        assert isinstance(n.batches.receive(5), StopRank)
    finally:
        n.close()


def test_requests_sent_together_share_the_first_step(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.become_ready()
        together = []
        for attempt in range(5):  # a busy machine may put more than a lull between two of them
            for uid in range(4):
                n.inputs.send(request(10 * attempt + uid, [1, 2, 3, uid], max_new_tokens=1))
                time.sleep(0.0002)
            first = n.batches.receive(10)
            assert isinstance(first, ForwardBatch)
            together.append(len(first.new))
            n.results.send(n.rank.run(first))
            n.run_rank(until_finished=4)
            if together[-1] == 4:
                break
        assert together[-1] == 4, together
        assert n.shut_down() == 0
    finally:
        n.close()


def test_the_longer_a_step_takes_the_longer_it_waits_for_company(folder: str) -> None:
    """Where steps take seconds, requests that come some milliseconds apart share the first one too."""
    n = Neighbours(folder)
    try:
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3, 4], max_new_tokens=1))
        first = n.batches.receive(10)
        assert isinstance(first, ForwardBatch)
        n.results.send(msgspec.structs.replace(n.rank.run(first), total_s=2.0))
        n.run_rank(until_finished=1)
        together = []
        for attempt in range(1, 31):  # a busy machine may put more than a lull between two of them
            for uid in range(3):
                n.inputs.send(request(10 * attempt + uid, [1, 2, attempt, uid], max_new_tokens=1))
                time.sleep(0.0025)
            first = n.batches.receive(10)
            assert isinstance(first, ForwardBatch)
            together.append(len(first.new))
            n.results.send(msgspec.structs.replace(n.rank.run(first), total_s=2.0))
            n.run_rank(until_finished=3)
            if together[-1] == 3:
                break
        assert together[-1] == 3, together
        assert n.shut_down() == 0
    finally:
        n.close()


def test_a_flush_waits_for_the_last_step(folder: str) -> None:
    """The request has ended, but overlap has one more step of it in flight; what comes after the flush waits too."""
    n = Neighbours(folder)
    try:
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3, 4, 5], max_new_tokens=50))
        batch = n.batches.receive(10)
        assert isinstance(batch, ForwardBatch)
        later = n.batches.receive(10)
        assert isinstance(later, ForwardBatch)
        n.inputs.send(AbortRequest(1))
        n.inputs.send(SchedulerQuery(1, "flush_cache"))
        n.inputs.send(SchedulerQuery(2, "stats"))
        n.inputs.send(request(2, [1, 2, 3, 4, 5], max_new_tokens=2))
        n.results.send(n.rank.run(batch))
        assert n.tokenizer.receive(0.3) is None
        assert n.batches.receive(0.0) is None
        n.results.send(n.rank.run(later))
        flushed, stats = n.reply(), n.reply()
        assert isinstance(flushed, SchedulerReply)
        assert (flushed.qid, flushed.error) == (1, None)
        assert int(flushed.values["flushed_pages"]) > 0
        assert isinstance(stats, SchedulerReply)
        assert (stats.qid, stats.values["kv_pages_free"]) == (2, NUM_PAGES)
        _, outputs = n.run_rank(until_finished=2)  # the aborted one too
        tokens = [t for o in outputs if o.uid == 2 for t in unpack_ids(o.token_ids)]
        assert tokens == reference([1, 2, 3, 4, 5], sampling(max_new_tokens=2))
        usage = next(o.usage for o in outputs if o.uid == 2 and o.finish is not None)
        assert usage is not None
        assert usage.cached_tokens == 0
    finally:
        n.close()


def test_a_rank_that_hangs_is_named(folder: str) -> None:
    n = Neighbours(folder, step_timeout=0.3)
    try:
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3], max_new_tokens=6))
        began = time.monotonic()
        failed = n.control_message(ChildFailed)
        assert failed.culprit == "model_worker.0"
        assert "step 0" in failed.message
        assert 0.25 < time.monotonic() - began < 15
        n.control_message(Heartbeat)  # it still answers the launcher
        assert n.shut_down() == 0
    finally:
        n.close()


@pytest.mark.parametrize("told_by", ["launcher", "ranks"])
@pytest.mark.parametrize("hung", [False, True])
def test_requests_outlive_the_ranks(folder: str, told_by: str, hung: bool) -> None:
    """They die with two steps in flight; a late answer of theirs comes after the new ones are there."""
    n = Neighbours(folder, **({"step_timeout": 0.3} if hung else {}))
    try:
        n.become_ready()
        prompts = {10: [1, 2, 3], 20: list(range(40))}
        for uid, prompt in prompts.items():
            n.inputs.send(request(uid, prompt, max_new_tokens=9))
        late = []
        for answered in (True, True, False, False):
            batch = n.batches.receive(5)
            assert isinstance(batch, ForwardBatch)
            result = n.rank.run(batch)
            if answered:
                n.results.send(result)
            else:
                late.append(result)
        if hung:
            assert n.control_message(ChildFailed).culprit == "model_worker.0"
        n.inputs.send(request(30, [7], max_new_tokens=3))
        if told_by == "launcher":
            n.tell(RanksLost(epoch=1))
        n.restart_ranks(1)
        n.results.send(RankReady(NUM_PAGES, "cpu", "float32", 1))
        if told_by == "ranks":
            n.tell(RanksLost(epoch=1))  # behind the news
        for result in late:
            n.results.send(result)
        prompts[30] = [7]
        _, outputs = n.run_rank(until_finished=3)
        for uid, prompt in prompts.items():
            ids = [t for o in outputs if o.uid == uid for t in unpack_ids(o.token_ids)]
            assert ids == reference(prompt, sampling(max_new_tokens=3 if uid == 30 else 9))
        assert n.shut_down() == 0
        assert n.batches.receive(5) == StopRank(epoch=1)
    finally:
        n.close()


def test_ranks_may_die_before_they_are_ready(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.control_message(Heartbeat)
        n.tell(RanksLost(epoch=1))
        n.tell(RanksLost(epoch=2))
        time.sleep(0.3)
        n.results.send(RankReady(NUM_PAGES, "cpu", "float32", 1))  # said on its last breath
        n.restart_ranks(2)
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3], max_new_tokens=4))
        _, outputs = n.run_rank(until_finished=1)
        assert sum(len(unpack_ids(output.token_ids)) for output in outputs) == 4
    finally:
        n.close()


def test_a_dead_tokenizer_manager_s_requests_are_aborted(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3], max_new_tokens=100, n=2))
        n.inputs.send(request(9, [1, 2, 3], max_new_tokens=100))
        for _ in range(3):
            batch = n.batches.receive(5)
            assert isinstance(batch, ForwardBatch)
            n.results.send(n.rank.run(batch))
        n.process.send_signal(signal.SIGSTOP)  # it hears of it when the next one has sent a request already
        n.inputs.send(request(20, [1, 2, 3], max_new_tokens=100))
        n.inputs.send(request(10**6, [1, 2, 3], max_new_tokens=4))
        time.sleep(0.2)
        n.tell(ClientsLost(before=10**6))
        n.process.send_signal(signal.SIGCONT)
        _, outputs = n.run_rank(until_finished=4)
        ends = {output.uid: output.finish.reason for output in outputs if output.finish is not None}
        assert ends == {1: "abort", 2: "abort", 9: "abort", 10**6: "length"}  # so that the detokenizer forgets them
        assert 20 not in {output.uid for output in outputs}
        n.inputs.send(SchedulerQuery(1, "stats"))
        reply = n.reply()
        assert isinstance(reply, SchedulerReply)
        assert (reply.values["num_running"], reply.values["num_waiting"]) == (0, 0)
    finally:
        n.close()


def test_stops_while_the_ranks_still_load(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.control_message(Heartbeat)
        assert n.shut_down() == 0
    finally:
        n.close()


def test_sleeps_when_there_is_nothing_to_do(folder: str) -> None:
    n = Neighbours(folder)
    try:
        n.become_ready()
        scheduler = psutil.Process(n.process.pid)

        def cpu_s() -> float:
            times = scheduler.cpu_times()
            return times.user + times.system

        before = cpu_s()
        time.sleep(1.0)
        assert cpu_s() - before < 0.1
    finally:
        n.close()


def test_an_abort_does_not_overtake_the_tokens_before_it(folder: str) -> None:
    n = Neighbours(folder, disable_overlap=True)
    try:
        n.become_ready()
        n.inputs.send(request(1, [1, 2, 3], max_new_tokens=50))
        batch = n.batches.receive(10)
        assert isinstance(batch, ForwardBatch)
        scheduler = psutil.Process(n.process.pid)
        scheduler.suspend()  # so that it finds the result and the abort in the same turn
        n.results.send(n.rank.run(batch))
        n.inputs.send(AbortRequest(1))
        time.sleep(0.2)
        scheduler.resume()
        outputs: list[TokenOutput] = []
        while not outputs or outputs[-1].finish is None:
            message = n.detokenizer.receive(5)
            assert message is not None
            outputs += message.outputs if isinstance(message, StepOutput) else []
        assert [(o.first, len(unpack_ids(o.token_ids))) for o in outputs] == [(0, 1), (1, 0)]
        assert outputs[-1].usage is not None
        assert outputs[-1].usage.completion_tokens == 1
    finally:
        n.close()


def test_a_trace_and_a_timeline_on_demand(tmp_path: Path) -> None:
    assert not make_core(config(), None, None).observers
    core = make_core(config(), str(tmp_path / "run.trace"), str(tmp_path / "profile"))
    core.add(request(1, [1, 2, 3], max_new_tokens=4), 0.0)
    rank = FakeRank(64, 4, 8)
    for _ in range(4):
        batch = core.schedule(0.0)
        assert batch is not None
        core.complete(rank.run(batch), 0.0)
    core.close()
    assert replay(tmp_path / "run.trace")[0].steps == 4
    assert (tmp_path / "profile" / FILE_NAME).read_bytes().endswith(b"]\n")
