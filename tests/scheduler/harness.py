"""Shared by the scheduler's tests: factories, the scheduler with a fake rank, and the page equation."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.scheduler.fake_folder import FakeFolder, FakeMover, over_the_wire
from tests.scheduler.fake_rank import VOCAB, FakeRank, extend, reference, start
from vibe_sgl_lite.runtime.messages import (
    AddRequest,
    Finish,
    ForwardBatch,
    RequestRejected,
    StepResult,
    TokenOutput,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, ResolvedSampling
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.observer import SchedulerObserver
from vibe_sgl_lite.scheduler.results import Outputs


def sampling(**fields: object) -> ResolvedSampling:
    """Greedy defaults; `end` is short for end_token_ids."""
    values: dict[str, Any] = {**DEFAULTS, "seed": 0, "end_token_ids": (), "temperature": 0.0, **fields}
    if values.get("pooling") is not None:
        values["max_new_tokens"] = 1
    return ResolvedSampling(**values)


def request(
    uid: int, tokens: Sequence[int], *, salt: str = "", priority: int = 0, streamed: bool = True, **fields: object
) -> AddRequest:
    return AddRequest(
        uid, f"r{uid}", pack_ids(tokens), sampling(**fields), priority=priority, cache_salt=salt, streamed=streamed
    )


def config(**fields: object) -> SchedulerConfig:
    values: dict[str, Any] = {
        "num_pages": 64,
        "page_size": 4,
        "max_running_requests": 8,
        "chunked_prefill_size": 16,
        **fields,
    }
    return SchedulerConfig(**values)


def check_pages(scheduler: Scheduler, rank: FakeRank | None = None) -> None:
    """free + cached (evictable and locked) + held by requests + deferred = all pages, and none is in two places."""
    state, memory, cache = scheduler.state, scheduler.state.memory, scheduler.state.memory.cache
    places: list[int] = memory.allocator.free_pages()
    free = set(places)
    nodes = list(cache.nodes())
    for node in nodes:
        places += node.pages
    holders = [*state.prefilling.values(), *state.decoding, *state.ending.values(), *state.leaving.values()]
    for holder in holders:
        places += holder.pages[holder.num_shared_pages :]
    for _, pages in memory._deferred:
        places += pages
    loads = [] if state.tier is None else [move for move in state.tier._moves.values() if move.kind == "load"]
    for load in loads:
        places += load.pages
    assert memory.num_loading == sum(len(load.pages) for load in loads)
    assert sorted(places) == list(range(memory.num_pages)), "a page is lost or in two places"

    locked = {id(node): 0 for node in nodes}
    for holder in holders:
        path, walk = [], holder.node
        while walk is not None and walk.parent is not None:
            locked[id(walk)] += 1
            path.append(walk)
            walk = walk.parent
        shared = [page for node in reversed(path) for page in node.pages]
        assert shared == list(holder.pages[: holder.num_shared_pages]), "the shared pages are not the node's path"
    for load in loads:
        walk = load.node
        while walk is not None and walk.parent is not None:
            locked[id(walk)] += 1
            walk = walk.parent
    for node in nodes:
        assert node.locks == locked[id(node)], "a lock too many or too few"
        assert node.pages, "an empty node"
        assert len(node.key) == len(node.pages) * 4 * memory.page_size
        assert node.parent is not None
        assert node.parent.children[node.key[: 4 * memory.page_size]] is node
        assert node.locks or node.children or node.queued, "an evictable leaf is not in the queue"
        assert node.locks or node.parent.last_access >= node.last_access, "a parent would go before its child"
    assert cache.num_cached == sum(len(node.pages) for node in nodes)
    assert cache.num_nodes == len(nodes)
    assert cache.num_evictable == sum(len(node.pages) for node in nodes if node.locks == 0)
    assert memory.reserved == sum(r.reserved_pages for r in state.requests.values())
    if not state.in_flight:
        assert memory.num_deferred == 0
        assert not state.leaving
        assert memory.spare >= 0
    slots = [holder.slot for holder in holders]
    assert sorted(slots + state.free_slots) == list(range(scheduler.config.max_running_requests))
    if rank is not None:
        for step in state.in_flight:
            assert not (rank.used[step.number] & free), "a page is free while a step in flight uses it"


def check_cache_contents(scheduler: Scheduler, rank: FakeRank) -> None:
    """Every page of the radix tree holds, on the rank, the KV of exactly the tokens that lead to it."""
    cache = scheduler.state.memory.cache
    page_size = scheduler.config.page_size
    states: dict[int, int] = {}
    for node in cache.nodes():  # parents before children
        assert node.parent is not None
        state = states.get(id(node.parent), start(node.cache_salt))
        tokens = unpack_ids(node.key)
        for index, page in enumerate(node.pages):
            expected: list[int | None] = []
            for token in tokens[index * page_size : (index + 1) * page_size]:
                state = extend(state, token)
                expected.append(state)
            assert rank.pages[page] == expected, f"page {page} of the cache does not hold what its path says"
        states[id(node)] = state


@dataclass
class Sample:
    """What one sample has shown so far."""

    message: AddRequest
    index: int
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    opened: bool = False
    silent: bool = False  # its stop string was found: the detokenizer ended it
    losses: int = 0  # rank groups in a row that died while they ran it and before it gained a token
    tokens_at_loss: int = 0
    cached_tokens: int = 0
    pooled: list[int] | None = None


class Harness:
    """A scheduler, a fake rank and what clients have seen; checks every promise about outputs as they come."""

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        poison: int | None = None,
        observers: Callable[[Harness], Sequence[SchedulerObserver]] = lambda harness: (),
        seed: int = 0,
        late: float = 0.0,
        folder: FakeFolder | None = None,
    ) -> None:
        self.late = late
        self.config = scheduler_config
        self.folder = folder
        self.now = 0.0
        self.scheduler = Scheduler(scheduler_config, observers(self))
        self.samples: dict[int, Sample] = {}
        self.rejected: dict[int, RequestRejected] = {}
        self.results: deque[StepResult] = deque()
        self.poison = poison
        self.rng = random.Random(seed)
        self.rank = self._new_rank(scheduler_config.num_pages, scheduler_config.epoch)
        self.from_earlier_ranks: set[tuple[object, bytes]] = set()  # prefixes that the folder may have of them
        self.movers: list[FakeMover] = []
        self._open_folder()

    def _open_folder(self) -> None:
        """The ranks have run nothing yet; what those before them were at is done or never will be."""
        folder = self.folder
        if folder is None:
            return
        for mover in self.movers:
            for loader in mover.threads():
                if not loader and self.rng.random() < 0.5:
                    mover.work(loader)
        self.movers = [FakeMover(folder, rank, self.rank.pages, self.rank.epoch) for rank in range(folder.ranks)]
        if folder.limit:
            self.scheduler.open_tier(folder.contents(), self.now)
        if folder.host_slots:
            self.scheduler.open_host(folder.host_slots, self.now)

    def answer(self) -> bool:
        """One of the ranks' threads does its next message, and the scheduler hears of it. False: none has any."""
        working = [(mover, loader) for mover in self.movers for loader in mover.threads()]
        if working:
            mover, loader = self.rng.choice(working)
            answer = mover.work(loader)
            if answer is not None:
                self.scheduler.pages_moved(answer, self.now)
        return bool(working)

    def _new_rank(self, num_pages: int, epoch: int) -> FakeRank:
        settings = self.config
        return FakeRank(
            num_pages,
            settings.page_size,
            settings.max_running_requests,
            self._cache_salt,
            self.poison,
            epoch,
            self.rng,
            self.late,
        )

    def _cache_salt(self, uid: int) -> object:
        message = self.samples[uid].message
        if not self.config.radix_cache:
            return f"request {message.uid}"
        return message.cache_salt if message.attributes is None else (message.cache_salt, message.attributes.adapter)

    def add(self, message: AddRequest) -> bool:
        rejected = self.scheduler.add(message, self.now)
        if rejected is not None:
            assert rejected.uid == message.uid
            self.rejected[message.uid] = rejected
            return False
        for index, resumed in enumerate(message.resume_ids or [b""] * message.sampling.n):
            if resumed is not None:
                self.samples[message.uid + index] = Sample(message, index, unpack_ids(resumed))
        return True

    def abort(self, uid: int) -> None:
        self._take(self.scheduler.abort(uid, self.now))

    def stop_matched(self, uid: int) -> None:
        self.samples[uid].silent = True
        self.scheduler.stop_matched(uid, self.now)

    def expire(self, now: float) -> None:
        self.now = max(self.now, now)
        self._take(self.scheduler.expire(now))

    def lose_ranks(self) -> None:
        """The ranks die. Results that they have sent may still come in, and who ran in vain thrice is ended."""
        running = {uid for result in self.due() for uid in self.rank.row_uids[result.step]}
        for uid in running & {*self.live()}:  # a row of one that has ended may still be in flight
            sample = self.samples[uid]
            sample.losses = 1 if len(sample.tokens) > sample.tokens_at_loss else sample.losses + 1
            sample.tokens_at_loss = len(sample.tokens)
        guilty = {uid for uid in self.live() if self.samples[uid].losses >= 3}
        epoch = self.rank.epoch + 1
        if self.folder is not None:
            self.from_earlier_ranks |= self._prefixes(self.rank.computed)
        outputs = self.scheduler.lose_ranks(epoch, self.now)
        self._take(outputs)
        ended = {output.uid: output.finish.error for output in outputs.tokens if output.finish is not None}
        assert {*ended} == guilty
        assert all(error is not None and error.code == "poison" for error in ended.values())
        self.rank = self._new_rank(self.scheduler.state.memory.num_pages, epoch)

    def ranks_ready(self, num_pages: int | None = None) -> None:
        """The next ranks are there, with as many pages as the last ones, or so many."""
        if num_pages is not None:
            self.rank = self._new_rank(num_pages, self.rank.epoch)
        self._take(self.scheduler.ranks_ready(len(self.rank.pages), self.now))
        self._open_folder()

    def due(self) -> list[StepResult]:
        """Results of the ranks that live which the scheduler has not got yet."""
        return [result for result in self.results if result.epoch == self.rank.epoch]

    def schedule(self) -> bool:
        self.now += 0.001
        batch = self.scheduler.schedule(self.now)
        moves = self.scheduler.moves(self.now) if self.scheduler.has_moves(self.now) else []
        for message in moves:
            for mover in self.movers:
                mover.take(over_the_wire(message))
        if batch is not None:
            batch = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=ForwardBatch)
            self.results.append(self.rank.run(batch))
        return batch is not None

    def complete(self) -> bool:
        if not self.results:
            return False
        self.now += 0.001
        result = self.results.popleft()
        outputs = self.scheduler.complete(result, self.now)
        assert result.epoch == self.rank.epoch or not outputs, "dead ranks still count"
        self._take(outputs)
        return True

    def step(self) -> bool:
        """As the process does: send what may be sent, then take one result. False when nothing is left to do."""
        while self.schedule():
            pass
        if self.rng.random() < 0.3 and self.answer():
            return True
        return self.complete() or self.answer()

    def run(self, limit: int = 100_000, checked: bool = True) -> None:
        if not self.scheduler.state.has_ranks:
            self.ranks_ready()
        for _ in range(limit):
            if not self.step():
                break
            if checked:
                self.check()
        else:
            raise AssertionError("the scheduler does not come to an end")
        assert self.scheduler.idle
        self.check_all_ended()
        self.check_what_is_cached()

    def check(self) -> None:
        check_pages(self.scheduler, self.rank)
        check_cache_contents(self.scheduler, self.rank)

    def check_what_is_cached(self) -> None:
        """The tree against a plain set of all page-long prefixes that some sample has computed, when all is done.

        Nothing else may be cached, and nothing of it may be missing unless pages had to be evicted. What a sample had
        in flight that had ended, by an abort or a stop string, or was retracted, and then failed may be missing too.
        """
        cache, page_bytes = self.scheduler.state.memory.cache, 4 * self.config.page_size
        expected = self._prefixes(self.rank.computed) | self.from_earlier_ranks
        retracted = bool(self.scheduler.state.num_retractions)
        ended = {uid for uid, one in self.samples.items() if one.finish is None or one.finish.reason != "error"}
        counted = self.rank.counted.items()
        ended_before = {uid for uid in self.rank.failed if uid in ended or retracted}
        required = self._prefixes({uid: count for uid, count in counted if uid not in ended_before}) & expected
        cached = set()
        paths: dict[int, bytes] = {}
        for node in cache.nodes():
            path = paths[id(node)] = paths.get(id(node.parent), b"") + node.key
            for stop in range(len(path) - len(node.key) + page_bytes, len(path) + 1, page_bytes):
                cached.add((node.cache_salt, path[:stop]))
        assert len(cached) == cache.num_cached, "a prefix is cached twice"
        assert cached <= expected
        if cache.num_evicted == 0 and self.config.radix_cache:
            assert cached >= required

    def _prefixes(self, counts: Mapping[int, int]) -> set[tuple[object, bytes]]:
        """All of whole pages, among the first so many tokens of each sample."""
        prefixes: set[tuple[object, bytes]] = set()
        page_bytes = 4 * self.config.page_size
        for uid, count in counts.items():
            sample = self.samples[uid]
            tokens = sample.message.token_ids + pack_ids(sample.tokens)
            for stop in range(page_bytes, min(len(tokens), 4 * count) + 1, page_bytes):
                prefixes.add((self._cache_salt(uid), tokens[:stop]))
        return prefixes

    def live(self) -> list[int]:
        """Samples without a terminal event."""
        return [uid for uid, sample in self.samples.items() if sample.finish is None and not sample.silent]

    def check_all_ended(self) -> None:
        assert not self.live(), f"without a terminal event: {self.live()}"
        for sample in self.samples.values():
            self.check_tokens(sample)

    def check_tokens(self, sample: Sample) -> None:
        params = sample.message.sampling
        salt = self._cache_salt(sample.message.uid + sample.index)
        expected = reference(unpack_ids(sample.message.token_ids), params, salt, sample.index)
        reason = sample.finish.reason if sample.finish is not None else None
        if params.pooling is not None:
            assert (reason, sample.tokens) == ("stop", []) or (reason != "stop" and sample.pooled is None)
            assert reason != "stop" or sample.pooled == expected
            return
        if reason in ("stop", "length"):
            assert sample.tokens == expected
            ends = set(params.end_token_ids + params.stop_token_ids)
            assert (reason == "stop") == (expected[-1] in ends)
            assert sample.finish is not None
            assert sample.finish.matched == (expected[-1] if reason == "stop" else None)
        else:
            assert sample.tokens == expected[: len(sample.tokens)]

    def _take(self, outputs: Outputs) -> None:
        for message in outputs.opens:
            sample = self.samples[message.uid]
            assert not sample.opened, "opened twice"
            sample.opened = True
        for uid, token in outputs.next_tokens:
            self._take_output(TokenOutput(uid, len(self.samples[uid].tokens), token))
        for output in outputs.tokens:
            self._take_output(output)

    def _take_output(self, output: TokenOutput) -> None:
        sample = self.samples[output.uid]
        assert sample.opened, "an output before it was opened"
        assert sample.finish is None, "an output after the terminal event"
        assert not sample.silent, "an output after the detokenizer ended it"
        assert output.first == len(sample.tokens), "a token lost or repeated"
        sample.tokens += unpack_ids(output.token_ids)
        sample.pooled = None if output.pooled is None else unpack_ids(output.pooled)
        if output.finish is not None:
            sample.finish = output.finish
            assert output.usage is not None
            assert output.usage.completion_tokens == len(sample.tokens)
            assert output.usage.prompt_tokens == len(sample.message.token_ids) // 4
            sample.cached_tokens = output.usage.cached_tokens


def random_prompt(rng: random.Random, length: int, prefixes: Iterable[Sequence[int]] = ()) -> list[int]:
    """Random tokens, often after one of the given prefixes."""
    choices = [list(p) for p in prefixes]
    head = rng.choice(choices) if choices and rng.random() < 0.7 else []
    return (head + [rng.randrange(VOCAB) for _ in range(length)])[: max(1, length)]
