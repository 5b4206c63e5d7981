"""Requests that fail, and what the sync client raises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.runtime.client.fake_engine import FakeEngine, accepted, answer, chunk, failing, silent
from vibe_sgl_lite import Client
from vibe_sgl_lite.runtime.errors import (
    EngineDeadError,
    EngineError,
    KVExhaustedError,
    NumericalError,
    OverloadedError,
    RequestError,
)
from vibe_sgl_lite.runtime.messages import Abort, ErrorInfo, Finish, Generate, Refused


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("overloaded", OverloadedError),
        ("kv_exhausted", KVExhaustedError),
        ("numerical_error", NumericalError),
        ("engine_dead", EngineDeadError),
        ("whatever", EngineError),
    ],
)
def test_a_failure_raises_its_error_with_what_there_was(
    client: Client, engine: FakeEngine, code: str, kind: type[EngineError]
) -> None:
    engine.script = failing(code, "ab")
    with pytest.raises(kind, match=f"because of {code}") as caught:
        client.generate("x")
    assert vars(caught.value)["output"].text == "ab"
    assert vars(caught.value)["output"].finish_reason == "error"
    with pytest.raises(kind, match=f"because of {code}"):
        list(client.stream("x"))


def test_an_invalid_request_raises_by_name(client: Client, engine: FakeEngine) -> None:
    info = ErrorInfo(code="invalid_request", message="top_p=3 is too much", field="top_p")
    engine.script = lambda r: [Refused(error=info, rid=r.rid)]
    for call in (lambda: client.generate("a"), lambda: list(client.stream("a")), lambda: client.generate(["a", "b"])):
        with pytest.raises(RequestError, match="too much") as caught:
            call()
        assert caught.value.field == "top_p"


def test_an_invalid_one_in_a_list_aborts_the_others(client: Client, engine: FakeEngine) -> None:
    info = ErrorInfo(code="invalid_request", message="no", field="prompt")
    engine.script = lambda r: [Refused(error=info, rid=r.rid)] if r.prompt == "bad" else silent(r)
    with pytest.raises(RequestError):
        client.generate(["a", "bad", "c"], rid=["1", "2", "3"])
    engine.wait_for(Abort, 2)
    assert sorted(engine.aborted()) == ["1", "3"]


def test_failures_in_a_list_are_outputs(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: failing("kv_exhausted", "")(r) if r.prompt == "big" else answer(r)
    small, big = client.generate(["ab", "big"])
    assert (small.finish_reason, small.text) == ("stop", "ba")
    assert big.finish_reason == "error"
    assert isinstance(big.error, KVExhaustedError)


def test_abort_is_an_ordinary_end(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda r: [accepted(r), chunk(r.rid, 0, "par")]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "x", rid="r")
        engine.wait_for(Generate)
        client.abort("r")
        client.abort("unknown")
        engine.wait_for(Abort)
        engine.send(chunk("r", 3, "", Finish(reason="abort")))
        out = future.result(30)
    assert (out.text, out.finish_reason) == ("par", "abort")
    assert engine.aborted() == ["r"]


@pytest.mark.parametrize("rid", [5, None, b"r", ["r"]])
def test_what_is_no_rid_cannot_be_aborted(client: Client, rid: Any) -> None:
    with pytest.raises(RequestError, match=r"rid=.* must be a text"):
        client.abort(rid)
    client.abort("\ud800")  # nobody's


def test_a_rid_in_flight_is_refused_until_it_has_ended(client: Client, engine: FakeEngine) -> None:
    engine.script = silent
    stream = client.stream("x", rid="r")
    with pytest.raises(RequestError, match="still in flight") as caught:
        client.generate("y", rid="r")
    assert caught.value.field == "rid"
    engine.wait_for(Generate)
    stream.close()
    with pytest.raises(RequestError, match="still in flight"):  # its end has not come yet
        client.generate("y", rid="r")
    engine.script = answer
    engine.send(chunk("r", 0, "", Finish(reason="abort")))
    client.stats()
    assert client.generate("y", rid="r").text == "y"
