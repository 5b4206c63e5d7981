"""Decides what the next step runs.

In this order: pages for the running decode rows (retracting somebody if there are none), chunks of prompts that are
being prefilled, and chunks of newly admitted requests, in the policy's order, as long as tokens, cost, slots and memory
allow. Changes the state accordingly; sends nothing.

Cost: while somebody reads tokens of decode rows as they come, chunks may make the step at most `max_step_stretch` times
as long as the decode rows alone, by the cost model's estimate, but together they have `smallest_chunk` tokens, or
`fresh_chunk`, in any case; else a step takes a full chunk.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice

from vibe_sgl_lite.scheduler.admission import NewTokenRatio
from vibe_sgl_lite.scheduler.batch import DecodeRows, PrefillChunk, Step
from vibe_sgl_lite.scheduler.cost import CostModel, Work, chunk_work, decode_work
from vibe_sgl_lite.scheduler.policies import SchedulePolicy
from vibe_sgl_lite.scheduler.request import NO_SLOT, Request
from vibe_sgl_lite.scheduler.speculation import Speculation
from vibe_sgl_lite.scheduler.state import SchedulerState

LOADED_AHEAD = 4  # waiting requests, by arrival, for whom pages are loaded before it is their turn
RETRY_STEPS = 8  # admission that found no memory is tried again when something has changed, or after so many steps


class StepPlanner:
    """Plans one step at a time. `plan` may be called while a step is in flight."""

    def __init__(
        self,
        state: SchedulerState,
        policy: SchedulePolicy,
        ratio: NewTokenRatio,
        cost: CostModel,
        speculation: Speculation,
    ) -> None:
        self._state = state
        self._policy = policy
        self._ratio = ratio
        self._cost = cost
        self._page_size = state.config.page_size
        self._speculation = speculation
        self._blocked: tuple[int, int, int] | None = None  # how things were when memory was last found short
        self._rows = DecodeRows()  # of the last step
        # of the step being planned
        self._tokens_left = 0
        self._cost_left = math.inf
        self._decode_tokens = 0
        self._chunks: list[PrefillChunk] = []
        self._retracted = False

    def plan(self, now: float) -> Step | None:
        """The next step, already entered into the state; None when nothing can run before a result comes or at all."""
        state = self._state
        self._retracted = False
        drafts = None if state.prefilling else self._speculation.plan(state.decoding.requests)
        tokens = None if drafts is None else self._secure_draft_pages(drafts.rooms)
        stalled = self._secure_decode_pages() if tokens is None else []
        decode, work = self._decode_rows(stalled, tokens)
        self._chunks = []
        self._decode_tokens = work.tokens
        self._tokens_left = state.config.chunked_prefill_size
        self._cost_left = math.inf
        if decode and (state.prefilling or state.waiting) and any(request.streamed for request in state.decoding):
            self._cost_left = (state.config.max_step_stretch - 1) * self._cost.seconds(work)
        if state.prefilling:
            if self._sessions_take_turns and not stalled and self._may_admit:
                self._admit_ahead(now)
            self._continue_prefill(blocked=not decode and not state.in_flight)
        if not stalled and self._may_admit:
            self._admit(self._order(now), now)
        for request in islice(state.waiting, LOADED_AHEAD) if state.tier is not None else ():
            self._waits_for_pages(request, now)
        if not decode and not self._chunks:
            comes = state.in_flight or state.memory.num_loading
            assert comes or not state.requests, "requests are there, nothing is in flight, and nothing runs"
            return None

        for chunk in self._chunks:
            work += chunk_work(chunk.end - chunk.count, chunk.count)
        estimate = self._cost.seconds(work) if self._cost.measured else 0.0
        step = Step(state.next_step, decode, self._chunks, now, work, estimate, tokens, drafts if tokens else None)
        state.next_step += 1
        state.in_flight.append(step)
        if decode:
            self._ratio.decode_step()
        return step

    # ------------------------------------------------------------------------------------------------------ decoding

    def _secure_draft_pages(self, rooms: Iterable[int]) -> array[int] | None:
        """Give every decode row the pages that it needs if all its drafts hold; None, and no page, if they are short.

        Returns the rows' tokens: no more than their requests may still get.
        """
        state, memory = self._state, self._state.memory
        tokens, needs = array("i"), []
        for request, room in zip(state.decoding, rooms, strict=True):
            count = min(1 + room, request.kv_limit - request.num_computed_tokens)
            tokens.append(count)
            needs.append(memory.pages_for(request.num_computed_tokens + count) - len(request.pages))
        if sum(needs) > memory.spare:
            return None
        for request, need in zip(state.decoding, needs, strict=True):
            if need:
                state.builder.add_pages(request, memory.grow(request, need))
        return tokens

    def _secure_decode_pages(self) -> list[Request]:
        """Give a page to every decode row that begins one. Returns the requests that must sit this step out.

        When pages run out and none are on their way back, requests are retracted until the rest fits.
        """
        state, memory, page_size = self._state, self._state.memory, self._page_size
        while True:
            needy = [r for r in state.decoding if r.num_computed_tokens % page_size == 0]
            stalled: list[Request] = []
            if len(needy) > memory.spare:
                sure = [r for r in needy if r.guaranteed]
                others = [r for r in needy if not r.guaranteed]
                room_sure, room_others = max(0, memory.available), max(0, memory.spare)
                stalled = sure[room_sure:] + others[room_others:]
                if stalled and not state.memory_is_coming:
                    self._retract_one()
                    continue
                needy = sure[:room_sure] + others[:room_others]
            if needy:
                for request, page in zip(needy, memory.grow_each(needy), strict=True):
                    state.builder.add_pages(request, (page,))
            return stalled

    def _decode_rows(self, stalled: list[Request], tokens: array[int] | None) -> tuple[DecodeRows, Work]:
        """One token, or so many `tokens`, of every decoding request that is not stalled; and what that comes to."""
        state, number = self._state, self._state.next_step
        if stalled or state.decoding.requests != self._rows.requests:
            self._rows = state.decoding.copy()  # steps in flight have the old ones
            for request in stalled:
                self._rows.remove(request)
        rows = self._rows
        context = 0
        ending = []
        if tokens is None:
            for request in rows:
                computed = request.num_computed_tokens + 1
                request.num_computed_tokens = computed
                request.last_step = number
                context += computed
                if computed >= request.kv_limit:
                    ending.append(request)
            work = decode_work(len(rows), context)
        else:
            work = decode_work(0, 0)
            for request, count in zip(rows, tokens, strict=True):
                work += chunk_work(request.num_computed_tokens, count)
                request.num_computed_tokens += count
                request.last_step = number
                if request.num_computed_tokens >= request.kv_limit:
                    ending.append(request)
        for request in ending:
            state.decoding.remove(request)
            state.ending[request.uid] = request
        return rows, work

    def _retract_one(self) -> None:
        """Retract the running request with the fewest generated tokens (ties: the longest prompt, the latest)."""
        state = self._state
        candidates = [r for r in self._running() if not r.guaranteed]
        assert candidates, "requests with reserved memory ran out of it"
        victim = min(candidates, key=lambda r: (r.num_generated, -r.num_prompt_tokens, -r.seq))
        state.retract(victim)
        self._retracted = True
        self._ratio.retracted(self._running())

    def _running(self) -> Iterator[Request]:
        yield from self._state.decoding
        yield from self._state.prefilling.values()

    # ------------------------------------------------------------------------------------------------------- prefill

    def _continue_prefill(self, *, blocked: bool) -> None:
        """Chunks for the requests that have begun their prompt. `blocked`: nothing else runs, so one must go on."""
        state = self._state
        while True:
            unfinished = [r for r in state.prefilling.values() if r.last_step != state.next_step]
            if self._sessions_take_turns:
                unfinished.sort(key=lambda r: r.prefill_end - r.num_computed_tokens)
            for request in unfinished:
                self._add_chunk(request)
            if self._chunks or not blocked or not state.prefilling:
                return
            self._retract_one()  # several prompts hold all the pages between them

    def _add_chunk(self, request: Request) -> bool:
        """Give a request as many of its next tokens as this step has room for; False when there is none."""
        state, memory = self._state, self._state.memory
        start = request.num_computed_tokens
        count = self._affordable(start, request.prefill_end - start)
        room = max(0, memory.available if request.guaranteed else memory.spare)
        count = min(count, (len(request.pages) + room) * self._page_size - start)
        if count <= 0:
            return False
        end = start + count
        state.builder.add_pages(request, memory.grow(request, memory.pages_for(end) - len(request.pages)))
        request.num_computed_tokens = end
        request.last_step = state.next_step
        samples = end == request.prefill_end
        self._chunks.append(PrefillChunk(request, count, end, samples))
        self._tokens_left -= count
        self._cost_left -= self._cost.added(chunk_work(start, count))
        if samples:
            del state.prefilling[request.uid]
            if end >= request.kv_limit:
                state.ending[request.uid] = request
            else:
                state.decoding.add(request)
        return True

    def _affordable(self, start: int, wanted: int) -> int:
        """Tokens, at most `wanted`, after `start` computed ones, that this step's budgets leave room for."""
        room, config = self._tokens_left, self._state.config
        planned = sum(chunk.count for chunk in self._chunks)
        if self._cost_left < math.inf:
            affordable = self._cost.tokens_within(self._cost_left, start)
            fresh = min(config.fresh_chunk - planned, config.fresh_prompt - start)
            room = min(room, max(affordable, config.smallest_chunk - planned, fresh, 0))
        planned += self._decode_tokens
        size = bisect_right(config.step_sizes, planned + room)
        if size and (self._chunks or config.step_sizes[size - 1] > planned):
            room = max(0, config.step_sizes[size - 1] - planned)
        return min(wanted, room)

    # ----------------------------------------------------------------------------------------------------- admission

    @property
    def _may_admit(self) -> bool:
        """Somebody waits, and looking at who that is may be worth while."""
        state = self._state
        return (
            bool(state.waiting)
            and self._tokens_left > 0
            and not self._retracted
            and (bool(state.free_slots) or self._policy.preempts)
            and self._blocked != (state.num_arrived, state.num_released, state.next_step // RETRY_STEPS)
        )

    @property
    def _sessions_take_turns(self) -> bool:
        return self._state.config.fairness and self._state.shares.contended

    def _order(self, now: float) -> Iterator[Request]:
        """The waiting requests, who is next first; found one by one, as they are asked for."""
        state = self._state
        suspect = state.suspect()
        if suspect is not None:
            yield from (suspect,) if suspect.queued else ()
            return
        waiting = state.waiting.snapshot()
        if state.pause is not None:
            waiting = [request for request in waiting if request.begun]
        order = self._policy.order(waiting, state.memory, now)
        if self._sessions_take_turns:
            order = state.shares.order(order, state.memory, by_priority=self._policy.preempts)
        yield from order

    def _admit_ahead(self, now: float) -> None:
        """A prompt does not wait for a longer one of another session: half of this step's room is for it."""
        state = self._state
        request = next(self._order(now), None)
        if request is None or any(r.session == request.session for r in state.prefilling.values()):
            return
        left = max(r.prefill_end - r.num_computed_tokens for r in state.prefilling.values())
        if request.num_tokens - state.memory.cached_length(request) <= left:
            tokens, cost = self._tokens_left // 2, self._cost_left / 2
            self._tokens_left -= tokens
            self._cost_left = cost
            self._admit((request,), now)
            self._tokens_left += tokens
            self._cost_left += cost

    def _admit(self, order: Iterable[Request], now: float) -> None:
        """Start waiting requests in their order, until one finds no room."""
        state = self._state
        to_come: int | None = None  # costs a look at every running request, so not before it matters
        for request in order:
            if self._tokens_left <= 0:
                return
            if request.slot != NO_SLOT:
                return  # just retracted, and its last token is still in flight: others must not take its place
            depth = state.memory.cached_length(request)
            if state.host is not None and state.free_slots:
                state.host.restore(request, depth)
                depth = state.memory.cached_length(request)
            if state.leaders.should_wait(request, depth) or self._waits_for_pages(request, now):
                continue
            if not state.free_slots:
                self._preempt(request)
                return
            if self._affordable(depth, request.num_tokens - depth) <= 0:
                return
            room = self._attach(request)
            if room >= 0 and to_come is None:
                to_come = self._ratio.pages_to_come(self._running(), state.memory)
            if to_come is None or room < to_come:
                state.memory.drop_prefix(request)
                self._blocked = (state.num_arrived, state.num_released, state.next_step // RETRY_STEPS)
                self._preempt(request)
                return
            state.admit(request, now)
            if not self._add_chunk(request):
                raise AssertionError(f"{request} was admitted without room for a token")
            to_come += self._ratio.pages_to_come((request,), state.memory)

    def _waits_for_pages(self, request: Request, now: float) -> bool:
        """Whether more of a waiting request's prefix is being loaded, or begins to be."""
        state, memory = self._state, self._state.memory
        if state.tier is None or request.slot != NO_SLOT:
            return False
        depth = memory.cached_length(request)
        return state.tier.wait_for(
            request, depth, lambda: memory.spare - self._ratio.pages_to_come(self._running(), memory), now
        )

    def _preempt(self, candidate: Request) -> None:
        """Retract whom the policy names, one at a time; what it gives up is there when its step is done."""
        if self._policy.preempts and not self._state.leaving:
            victim = self._policy.victim(candidate, self._running())
            if victim is not None:
                self._state.retract(victim)

    def _attach(self, request: Request) -> int:
        """Attach the request's cached prefix. Returns the pages that are left when all it is kept room for is taken."""
        state, memory = self._state, self._state.memory
        memory.attach(request)
        if request.guaranteed:
            need = memory.pages_for(request.kv_limit) - len(request.pages)
        elif state.num_running == 0:
            need = memory.pages_for(request.num_tokens) - len(request.pages)
        else:
            need = self._ratio.pages_to_come((request,), memory)
        return memory.spare - need
