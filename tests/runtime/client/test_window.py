"""A client sends no more than the engine takes, and everything that it holds back is answered in the end."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.integration.daemon import wait_until
from tests.runtime.client.fake_engine import STOP, FakeEngine, accepted, answer, chunk
from vibe_sgl_lite import AsyncClient, Client, SamplingParams
from vibe_sgl_lite.runtime.client.calls import Call
from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.client.in_flight import Event
from vibe_sgl_lite.runtime.client.requests import plan_generate
from vibe_sgl_lite.runtime.errors import EngineLostError, OverloadedError
from vibe_sgl_lite.runtime.messages import Abort, Accepted, Chunk, ErrorInfo, Finish, Generate, Refused, ServerMessage

FULL = ErrorInfo(OverloadedError.code, "the queue is full")


class Counting:
    """An engine that ends one sample whenever a new request finds it full, and refuses what is beyond its capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running: list[tuple[Generate, int]] = []
        self.most = 0
        self.refused = 0

    def script(self, request: Generate) -> list[ServerMessage]:
        n = samples(request)
        if self.running and len(self.running) + n > self.capacity:
            self.refused += 1
            return [Refused(FULL, request.rid)]
        self.running += [(request, index) for index in range(n)]
        self.most = max(self.most, len(self.running))
        replies: list[ServerMessage] = [accepted(request)]
        while len(self.running) >= self.capacity:
            replies.append(self.end_one())
        return replies

    def end_one(self) -> ServerMessage:
        request, index = self.running.pop(0)
        return replace(chunk(request.rid, 0, "x", STOP), index=index)


def samples(request: Generate) -> int:
    params = msgspec.msgpack.decode(request.sampling, type=SamplingParams)
    return params.n if isinstance(params.n, int) else 1


@pytest.mark.parametrize(
    ("prompts", "n", "capacity", "told"),
    [
        (164, 20, 2304, 2304),
        (164, 20, 64, 64),
        (100, 1, 12, 12),
        (30, 7, 20, 20),
        (5, 64, 10, 10),
        (200, 3, 16, 1000),
    ],
)
def test_any_list_of_any_n_completes(engine: FakeEngine, prompts: int, n: int, capacity: int, told: int) -> None:
    """Also when the engine takes less than it says: others fill it, too."""
    counting = Counting(capacity)
    engine.script = counting.script
    engine.capacity = told
    with Client(engine.address) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, ["a"] * prompts, SamplingParams(n=n))
        while not call.done():
            engine.send(*(counting.end_one() for _ in range(len(counting.running) // 2 + 1) if counting.running))
        groups: Any = call.result()
    outputs = [out for group in groups for out in (group if isinstance(group, list) else [group])]
    assert len(outputs) == prompts * n
    assert {(out.text, out.finish_reason) for out in outputs} == {("x", "stop")}
    assert counting.most <= max(capacity, n)
    if capacity == told:
        assert counting.refused == 0


def test_single_requests_of_many_tasks_wait_their_turn(engine: FakeEngine) -> None:
    counting = Counting(8)
    engine.script = counting.script
    engine.capacity = 8

    async def work() -> None:
        async with AsyncClient(engine.address) as client:
            calls = asyncio.gather(*(client.generate("a") for _ in range(100)))
            while not calls.done():
                await asyncio.sleep(0)
                ended = [counting.end_one() for _ in range(len(counting.running) // 2 + 1) if counting.running]
                await asyncio.to_thread(engine.send, *ended)
            assert {out.text for out in await calls} == {"x"}

    asyncio.run(work())
    assert counting.most <= 8
    assert counting.refused == 0


def test_a_full_engine_is_told_to_who_asks_for_one(engine: FakeEngine) -> None:
    """Others fill it: a single request hears of it at once, a list comes later."""
    refusals = 3

    def script(request: Generate) -> list[ServerMessage]:
        nonlocal refusals
        refusals -= 1
        return [accepted(request), Refused(FULL, request.rid)] if refusals >= 0 else answer(request)

    engine.script = script
    with Client(engine.address) as client:
        with pytest.raises(OverloadedError):
            client.generate("ab")
        outputs = client.generate(["ab", "cd"])
        assert [out.text for out in outputs] == ["ba", "dc"]
        assert engine.count(Generate) == 5


def test_who_wants_no_queue_gets_the_refusal(engine: FakeEngine) -> None:
    counting = Counting(4)
    engine.script = counting.script
    engine.capacity = 4
    connection = Connection(engine.address, queue=False)
    plan = plan_generate(["a"] * 3, SamplingParams(n=3), input_ids=None, rid=None, options={})
    ended: list[int] = []
    call = Call(connection, plan, ended.append)
    call.start()
    engine.wait_for(Generate, 3)
    connection.close()
    assert counting.refused == 2


def has_ended(events: list[Event]) -> bool:
    return any(isinstance(event, Chunk) and event.finish is not None for event in events)


@pytest.mark.parametrize("queue", [True, False])
def test_what_ran_before_a_loss_waits_until_it_can_go_on(engine: FakeEngine, queue: bool) -> None:
    """Others have taken its place: that is no reason to end it. They are not held up."""
    refusals = 3

    def script(request: Generate) -> list[ServerMessage]:
        nonlocal refusals
        if request.resume_ids is not None:
            refusals -= 1
            rest = chunk(request.rid, 3, "tial", STOP)
            return [accepted(request), Refused(FULL, request.rid) if refusals >= 0 else rest]
        if request.rid == "long":
            lost = Finish("error", error=ErrorInfo(EngineLostError.code, "the scheduler died"))
            return [accepted(request), chunk(request.rid, 0, "par"), chunk(request.rid, 3, "", lost)]
        return answer(request)

    engine.script = script
    connection = Connection(engine.address, queue=queue)
    events: dict[str, list[Event]] = {"long": [], "short": []}
    for rid, texts in events.items():
        plan = plan_generate("ab", SamplingParams(seed=1), input_ids=None, rid=rid, options={})
        connection.submit(plan.requests[0], texts.append)
    engine.wait_for(Generate, 6)
    wait_until(lambda: all(map(has_ended, events.values())), 30, "their ends")
    connection.close()
    for rid, text in (("long", "partial"), ("short", "ba")):
        assert "".join(event.text for event in events[rid] if isinstance(event, Chunk)) == text
        assert sum(isinstance(event, Accepted) for event in events[rid]) == 1
        assert isinstance(events[rid][-1], Chunk)


def test_what_is_held_back_can_be_aborted_and_left(engine: FakeEngine) -> None:
    engine.script = lambda request: [accepted(request), chunk(request.rid, 0, "par")]
    engine.capacity = 1
    with Client(engine.address) as client:
        first = client.stream("a", rid="first")
        assert next(first).text == "par"
        held = client.stream("a", SamplingParams(n=2), rid="held")
        client.abort("held")
        pieces = list(held)
        assert [(piece.index, piece.finish_reason, piece.text) for piece in pieces] == [
            (0, "abort", ""),
            (1, "abort", ""),
        ]
        left = client.stream("a", rid="left")
        left.close()
        again = client.stream("a", rid="held")  # the name is free
        engine.send(chunk("first", 3, "x", STOP))
        assert next(first).finish_reason == "stop"
        assert next(again).text == "par"
        again.close()
        engine.wait_for(Abort)
    assert [message.rid for message in engine.wait_for(Generate)] == ["first", "held"]
    assert engine.aborted() == ["held"]
