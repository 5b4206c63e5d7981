"""The asyncio client against a fake engine, under asyncio's loop and under uvloop."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.runtime.client.fake_engine import MODEL, FakeEngine, accepted, answer, chunk, failing, silent
from vibe_sgl_lite import AsyncClient, SamplingParams
from vibe_sgl_lite.runtime.errors import (
    ClosedError,
    ConnectError,
    EngineDeadError,
    KVExhaustedError,
    OverloadedError,
    RequestError,
)
from vibe_sgl_lite.runtime.messages import Abort, ErrorInfo, Finish, Generate, Goodbye, Ping, Refused

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def runner(work: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as loop:
            loop.run(asyncio.wait_for(work, 30))

    return runner


def test_every_call(run: Run, engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.address) as c:
            assert (await c.generate("abc", SamplingParams(seed=1))).text == "cba"
            assert [out.text for out in await c.generate(["ab", "cd"])] == ["ba", "dc"]
            assert [out.text for out in await c.generate(input_ids=[[0], [1, 2]])] == ["A", "BC"]
            hi = [{"role": "user", "content": "hi"}]
            assert (await c.chat(hi, enable_thinking=True)).text == "ih"
            stream = c.stream(input_ids=[1, 2, 3])
            assert [piece.text async for piece in stream] == ["B", "C", "D"]
            assert stream.sampling is not None
            assert [piece.finish_reason async for piece in c.stream_chat(hi)] == [None, "stop"]
            assert await c.stats() == await c.health() == {"num_running": 0}
            assert await c.model() == MODEL
            engine.query_error = ErrorInfo(code="overloaded", message="busy")
            with pytest.raises(OverloadedError, match="busy"):
                await c.flush_cache()
        assert c.address == engine.address

    run(work())
    engine.wait_for(Goodbye)


def test_without_async_with(run: Run, engine: FakeEngine) -> None:
    client = AsyncClient(engine.address)

    async def work() -> None:
        assert (await client.generate("abc")).text == "cba"
        await client.close()
        with pytest.raises(ClosedError):
            await client.generate("abc")

    run(work())


def test_errors(run: Run, engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.address) as c:
            engine.script = failing("kv_exhausted", "ab")
            with pytest.raises(KVExhaustedError) as caught:
                await c.generate("x")
            assert vars(caught.value)["output"].text == "ab"
            with pytest.raises(KVExhaustedError):
                async for _ in c.stream("x"):
                    pass
            assert [out.finish_reason for out in await c.generate(["x", "y"])] == ["error", "error"]
            bad = ErrorInfo(code="invalid_request", message="no", field="prompt")
            engine.script = lambda r: [Refused(error=bad, rid=r.rid)]
            with pytest.raises(RequestError):
                await c.generate("x")
            with pytest.raises(RequestError, match="one prompt"):
                c.stream(["a", "b"])  # type: ignore[list-item]

    run(work())


def test_leaving_a_stream_aborts(run: Run, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "x")]

    async def work() -> None:
        async with AsyncClient(engine.address) as c:
            async for _ in c.stream("a", rid="broken"):
                break
            async with c.stream("a", rid="left") as stream:
                await anext(stream)
            stream = c.stream("a", rid="closed")
            await stream.aclose()
            assert [piece async for piece in stream] == []
            stream = c.stream("a", rid="collected")
            del stream
            gc.collect()
            await asyncio.to_thread(engine.wait_for, Abort, 4)
        assert engine.aborted() == ["broken", "left", "closed", "collected"]

    run(work())


def test_cancelling_aborts(run: Run, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "x")]

    async def work() -> None:
        async with AsyncClient(engine.address) as c:

            async def waits_for_a_chunk() -> None:
                async for _ in c.stream("a", rid="1"):
                    pass

            async def does_other_work() -> None:
                stream = c.stream("a", rid="2")
                async for _ in stream:
                    await asyncio.sleep(60)

            async def waits_for_a_list() -> None:
                await c.generate(["a", "b"], rid=["3", "4"])

            tasks = [asyncio.create_task(t()) for t in (waits_for_a_chunk, does_other_work, waits_for_a_list)]
            await asyncio.to_thread(engine.wait_for, Generate, 4)
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(d) for d in done] == [asyncio.CancelledError] * 3
            await asyncio.to_thread(engine.wait_for, Abort, 4)
        assert sorted(engine.aborted()) == ["1", "2", "3", "4"]

    run(work())


def test_a_stream_outlives_the_task_that_made_it(run: Run, engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.address) as c:

            async def make() -> Any:
                return c.stream("abc")

            stream = await asyncio.create_task(make())
            assert [piece.text async for piece in stream] == ["c", "b", "a"]

    run(work())


def test_abort_and_close(run: Run, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "par")]

    async def work() -> None:
        c = AsyncClient(engine.address)
        call = asyncio.create_task(c.generate("x", rid="r"))
        await asyncio.to_thread(engine.wait_for, Generate)
        await c.abort("r")
        await asyncio.to_thread(engine.wait_for, Abort)
        engine.send(chunk("r", 3, "", Finish(reason="abort")))
        out = await call
        assert (out.text, out.finish_reason) == ("par", "abort")
        call = asyncio.create_task(c.generate("x"))
        await asyncio.to_thread(engine.wait_for, Generate, 2)
        await c.close()
        with pytest.raises(ClosedError):
            await call

    run(work())


def test_no_daemon(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        start = time.monotonic()
        with pytest.raises(ConnectError):
            async with AsyncClient(f"ipc://{tmp_path}/none.sock"):
                pass
        c = AsyncClient("tcp://127.0.0.1:9")
        with pytest.raises(ConnectError):
            async for _ in c.stream("x"):
                pass
        await c.close()
        assert time.monotonic() - start < 10

    run(work())


def test_engine_death(run: Run, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "par")]

    async def work() -> None:
        async with AsyncClient(engine.address) as c:

            async def one() -> str:
                text = ""
                try:
                    async for piece in c.stream("x"):
                        text += piece.text
                except EngineDeadError:
                    return text
                raise AssertionError("ended without an error")

            tasks = [asyncio.create_task(one()) for _ in range(50)]
            await asyncio.to_thread(engine.wait_for, Generate, 50)
            await asyncio.sleep(0.2)
            start = time.monotonic()
            await asyncio.to_thread(engine.close)
            assert await asyncio.gather(*tasks) == ["par"] * 50
            assert time.monotonic() - start < 10

    run(work())


def test_200_streams_at_once(run: Run, engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.address) as c:

            async def one(n: int) -> None:
                text = f"prompt {n}: " + "x" * (n % 50)
                assert "".join([piece.text async for piece in c.stream(text)]) == text[::-1]

            await asyncio.gather(*(one(n) for n in range(200)))

    run(work())


def test_a_blocked_loop_does_not_kill_the_session(run: Run, engine: FakeEngine) -> None:
    async def work() -> None:
        async with AsyncClient(engine.address) as c:
            stream = c.stream("abc")
            before = engine.count(Ping)
            time.sleep(1.6)
            assert engine.count(Ping) - before >= 2
            assert [piece.text async for piece in stream] == ["c", "b", "a"]

    run(work())


def test_a_loop_that_is_gone_harms_nobody(engine: FakeEngine) -> None:
    engine.script = silent
    client = AsyncClient(engine.address)
    streams = []

    async def leave() -> None:
        streams.append(client.stream("a", rid="r"))

    asyncio.run(leave())
    engine.wait_for(Generate)
    engine.send(chunk("r", 0, "late"))
    engine.script = answer

    async def work() -> None:
        assert (await client.generate("abc")).text == "cba"
        await client.close()

    asyncio.run(work())
