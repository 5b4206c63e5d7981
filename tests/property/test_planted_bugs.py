"""The scheduler machine finds bugs that are planted into the scheduler, each in a few hundred runs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from tests.property.test_scheduler_machine import SchedulerMachine
from vibe_sgl_lite.runtime.messages import StepResult, TokenOutput
from vibe_sgl_lite.scheduler.batch import BatchBuilder, DecodeRows
from vibe_sgl_lite.scheduler.core import Scheduler
from vibe_sgl_lite.scheduler.memory import KVMemory, PageAllocator
from vibe_sgl_lite.scheduler.planner import StepPlanner
from vibe_sgl_lite.scheduler.radix_cache import RadixCache
from vibe_sgl_lite.scheduler.request import Request
from vibe_sgl_lite.scheduler.results import Outputs, ResultApplier
from vibe_sgl_lite.scheduler.state import SchedulerState


class Planted:
    """A method of which every nth call, counted anew for each scheduler, does something else."""

    def __init__(self, owner: type, name: str, n: int, instead: Callable[..., Any]) -> None:
        self.owner, self.name, self.n, self.instead = owner, name, n, instead
        self.calls = 0

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        method, begin = getattr(self.owner, self.name), SchedulerState.__init__

        def broken(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return (self.instead if self.calls % self.n == 0 else method)(*args, **kwargs)

        def counted_anew(state: SchedulerState, *args: Any) -> None:
            self.calls = 0
            begin(state, *args)

        monkeypatch.setattr(self.owner, self.name, broken)
        monkeypatch.setattr(SchedulerState, "__init__", counted_anew)


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


SAMPLED, LOSE_RANKS, LOSE = ResultApplier._sampled, SchedulerState.lose_ranks, KVMemory.lose
COMPLETE = Scheduler.complete


def lose_the_last_output(applier: ResultApplier, request: Request, *rest: Any) -> None:
    SAMPLED(applier, request, *rest)
    if request.finished and rest[-1].tokens[-1].finish is not None:
        rest[-1].tokens.pop()


def mix_up_slots(rows: DecodeRows, request: Request) -> None:
    row = rows.requests.index(request)
    del rows.requests[row], rows.uids[row], rows.slots[-1]


def count_a_dropped_row(applier: ResultApplier, request: Request, tokens: bytes, *rest: Any) -> None:
    if request.finished:
        rest[-1].tokens.append(TokenOutput(request.uid, request.num_generated, tokens))
    else:
        SAMPLED(applier, request, tokens, *rest)


def keep_what_follows_an_end(applier: ResultApplier, request: Request, tokens: bytes, *rest: Any) -> None:
    before = request.num_tokens
    SAMPLED(applier, request, tokens, *rest)
    output = rest[-1].tokens[-1] if rest[-1].tokens else None
    if request.finished and output is not None and request.num_tokens - before < len(tokens) // 4:
        rest[-1].tokens[-1] = msgspec.structs.replace(output, token_ids=tokens)


def leave_at_once(state: SchedulerState, request: Request) -> None:
    for place in (state.prefilling, state.ending):
        place.pop(request.uid, None)
    if request in state.decoding.requests:
        state.decoding.remove(request)
    state.leaders.end(request)
    state.memory.unreserve(request)
    state._release(request)


def leak_pages_of_drafts(memory: KVMemory, request: Request) -> None:
    del request.pages[memory.pages_for(request.num_computed_tokens) :]


def stay_at_the_end(state: SchedulerState, request: Request, count: int) -> None:
    request.num_computed_tokens -= count
    if request.uid not in state.leaving:
        state.memory.shrink(request)


def skip_a_requeue(state: SchedulerState, epoch: int) -> list[Request]:
    ended = LOSE_RANKS(state, epoch)
    running = [request for request in state.waiting if request.last_step >= 0]
    if running:
        state.waiting.remove(running[-1])
    return ended


def forget_the_new_epoch(state: SchedulerState, epoch: int) -> list[Request]:
    ended = LOSE_RANKS(state, epoch)
    state.builder = BatchBuilder(epoch - 1)
    return ended


def requeue_without_the_tokens(state: SchedulerState, epoch: int) -> list[Request]:
    ended = LOSE_RANKS(state, epoch)
    for waiting in state.waiting:
        del waiting.tokens[4 * waiting.num_prompt_tokens :]
    return ended


def never_end_a_killer(state: SchedulerState, epoch: int) -> list[Request]:
    LOSE_RANKS(state, epoch)
    return []


def suspect_too_many(state: SchedulerState, epoch: int) -> list[Request]:
    for sample in state.requests.values():
        sample.tokens_at_loss, sample.losses = sample.num_tokens, max(sample.losses, 1)
    return LOSE_RANKS(state, epoch)


def promise_pages(planner: StepPlanner, rooms: Iterable[int]) -> array[int]:
    rows = zip(planner._state.decoding, rooms, strict=True)
    return array("i", [min(1 + room, r.kv_limit - r.num_computed_tokens) for r, room in rows])


def take_any_result(scheduler: Scheduler, result: StepResult, now: float) -> Outputs:
    return COMPLETE(scheduler, msgspec.structs.replace(result, epoch=scheduler.state.epoch), now)


def keep_the_cache(memory: KVMemory, holders: Iterable[Request]) -> None:
    clear, memory.cache.clear = memory.cache.clear, nothing  # type: ignore[method-assign]
    LOSE(memory, holders)
    memory.cache.clear = clear  # type: ignore[method-assign]


PLANTED = {
    "a free is skipped": Planted(PageAllocator, "free", 5, nothing),
    "a lock is dropped": Planted(RadixCache, "lock", 5, nothing),
    "an unlock is dropped": Planted(RadixCache, "unlock", 5, nothing),
    "a terminal event is lost": Planted(ResultApplier, "_sampled", 1, lose_the_last_output),
    "a slot is not released": Planted(SchedulerState, "_release", 3, nothing),
    "pages are free before their step is done": Planted(SchedulerState, "_leave", 1, leave_at_once),
    "the ranks do not learn of a page": Planted(BatchBuilder, "add_pages", 3, nothing),
    "a failed row enters the cache": Planted(ResultApplier, "_fail", 1, lambda applier, r, *rest: None),
    "all rows only have a token more": Planted(ResultApplier, "_rows_apart", 1, lambda *args: []),
    "a row has another one's slot": Planted(DecodeRows, "remove", 1, mix_up_slots),
    "rows of steps in flight change": Planted(DecodeRows, "copy", 1, lambda rows: rows),
    "a dropped row counts": Planted(ResultApplier, "_sampled", 1, count_a_dropped_row),
    "what follows an end counts": Planted(ResultApplier, "_sampled", 1, keep_what_follows_an_end),
    "a page of a rejected draft leaks": Planted(KVMemory, "shrink", 1, leak_pages_of_drafts),
    "rejected drafts count as computed": Planted(SchedulerState, "reject_drafts", 1, nothing),
    "rejected drafts leave a request at its end": Planted(SchedulerState, "reject_drafts", 1, stay_at_the_end),
    "the ranks do not learn of a replaced page": Planted(BatchBuilder, "replace_pages", 1, nothing),
    "a draft's pages are not taken": Planted(StepPlanner, "_secure_draft_pages", 1, promise_pages),
    "one is not requeued": Planted(SchedulerState, "lose_ranks", 1, skip_a_requeue),
    "a requeued one loses its tokens": Planted(SchedulerState, "lose_ranks", 1, requeue_without_the_tokens),
    "batches have an old epoch": Planted(SchedulerState, "lose_ranks", 1, forget_the_new_epoch),
    "results of an old epoch count": Planted(Scheduler, "complete", 1, take_any_result),
    "the cache outlives its ranks": Planted(KVMemory, "lose", 1, keep_the_cache),
    "who kills ranks goes on": Planted(SchedulerState, "lose_ranks", 1, never_end_a_killer),
    "who gains tokens is suspected": Planted(SchedulerState, "lose_ranks", 1, suspect_too_many),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug].plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError, ExceptionGroup)):
        run_state_machine_as_test(
            SchedulerMachine,
            settings=settings(
                max_examples=300,
                stateful_step_count=50,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
