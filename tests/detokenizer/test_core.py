"""The detokenizer object: chunks, repeats, terminal events, logprobs, cost."""

import random
import time
from array import array
from typing import Any

import msgspec
import pytest

from tests.detokenizer.corpus import small_tokenizer
from vibe_sgl_lite.detokenizer.core import Detokenizer
from vibe_sgl_lite.runtime.messages import (
    Chunk,
    ChunkBatch,
    ErrorInfo,
    Finish,
    LogprobEntry,
    NextTokens,
    OpenText,
    StepOutput,
    StopMatched,
    TokenLogprob,
    TokenOutput,
    Usage,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.messages.parts import TextFormat

TOKENIZER = small_tokenizer()
END = 2  # <|im_end|>


def opened(uid: int = 1, **options: Any) -> Detokenizer:
    detokenizer = Detokenizer(TOKENIZER)
    detokenizer.open(open_text(uid, **options))
    return detokenizer


def open_text(uid: int, **options: Any) -> OpenText:
    fields: dict[str, Any] = {"uid": uid, "rid": f"r{uid}", "index": 0, "prompt_tokens": 9, "stop": ()}
    fields |= {"include_stop": False, "skip_special_tokens": True, "cached_tokens": 3}
    return OpenText(**fields | options)


def run(detokenizer: Detokenizer, *outputs: TokenOutput) -> tuple[list[Chunk], list[StopMatched]]:
    batch, matches = detokenizer.step(StepOutput(list(outputs)))
    chunks = [msgspec.msgpack.decode(chunk.payload, type=Chunk) for chunk in batch.chunks]
    for routed, chunk in zip(batch.chunks, chunks, strict=True):
        assert routed.terminal == (chunk.finish is not None)
        assert routed.num_tokens == chunk.first + len(chunk.token_ids) // 4
    return chunks, matches


def out(first: int, ids: list[int], uid: int = 1, **fields: Any) -> TokenOutput:
    return TokenOutput(uid, first, pack_ids(ids), **fields)


def test_chunks_are_deltas() -> None:
    detokenizer = opened(index=2)
    ids = TOKENIZER.encode("naïve 你")
    text = ""
    for place, token_id in enumerate(ids):
        [chunk], _ = run(detokenizer, out(place, [token_id]))
        assert (chunk.rid, chunk.index, chunk.first, chunk.token_ids) == ("r1", 2, place, pack_ids([token_id]))
        assert chunk.finish is None
        assert chunk.usage is None
        text += chunk.text
    assert text == "naïve 你"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("The naïve café. 你好, 世界!", {}),
        ("The cafe is zzz open", {"stop": ("is open", "zzzz")}),
        ("x </think> <tool_call>{}</tool_call> y", {"text_format": TextFormat(think=True, inside=True, tools=True)}),
        ("<think>a</think>b <", {"text_format": TextFormat(think=True), "stop": ("never",)}),
    ],
)
@pytest.mark.parametrize("together", [1, 3])
def test_what_a_client_has_is_not_said_again(text: str, options: dict[str, Any], together: int) -> None:
    """From any token on, the chunks are those that come without an interruption."""
    ids = TOKENIZER.encode(text)

    def chunks(start: int) -> list[Chunk]:
        detokenizer = opened(resume_ids=pack_ids(ids[:start]), **options)
        pieces = []
        for place in range(start, len(ids), together):
            new = ids[place : place + together]
            finish = Finish("length") if place + together >= len(ids) else None
            pieces += run(detokenizer, out(place, new, finish=finish))[0]
        return pieces

    whole = chunks(0)
    assert len(whole) > 2
    assert whole[0].weight_versions == ((0, "default"),)
    for start in range(0, len(ids), together):
        resumed = chunks(start)
        assert resumed[0].weight_versions == ((start, "default"),)
        resumed[0] = msgspec.structs.replace(resumed[0], weight_versions=whole[start // together].weight_versions)
        assert resumed == whole[start // together :]


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_ordinary_stop_token_is_in_the_ids_and_not_in_the_text(stop: tuple[str, ...]) -> None:
    """As in vLLM and SGLang, unless the stop is to be included; it can complete no stop string either."""
    ids = TOKENIZER.encode("The cafe!")
    assert TOKENIZER.decode(ids[-1:]) == "!"
    for include, stopped, text in ((False, (*stop, "!"), "The cafe"), (True, stop, "The cafe!")):
        detokenizer = opened(include_stop=include, stop=stopped)
        [chunk], _ = run(detokenizer, out(0, ids, finish=Finish("stop", matched=ids[-1]), logprobs=logprobs_of(ids)))
        assert chunk.text == text
        assert (unpack_ids(chunk.token_ids), chunk.finish) == (ids, Finish("stop", matched=ids[-1]))
        assert chunk.logprobs is not None
        assert len(chunk.logprobs) == len(ids)
    detokenizer = opened(stop=stop)
    [chunk], _ = run(detokenizer, out(0, ids, finish=Finish("length")))
    assert chunk.text == "The cafe!"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_that_is_a_special_token(skip: bool, include: bool) -> None:
    """Its text is left out of what is shown, and it matches all the same; also when the scheduler ends the sample."""
    start = TOKENIZER.token_id("<|im_start|>")
    assert start is not None
    ids = [*TOKENIZER.encode("na"), start, *TOKENIZER.encode("more")]
    options: dict[str, Any] = {"stop": ("zz", "<|im_start|>"), "skip_special_tokens": skip, "include_stop": include}
    [chunk], matches = run(opened(**options), out(0, ids))
    assert chunk.text == ("na<|im_start|>" if include else "na")
    assert (chunk.finish, unpack_ids(chunk.token_ids)) == (
        Finish("stop", matched="<|im_start|>"),
        ids[: ids.index(start) + 1],
    )
    assert [match.uid for match in matches] == [1]
    ended = [*TOKENIZER.encode("na z"), END]
    [chunk], _ = run(
        opened(**options | {"stop": ("zz", "<|im_end|>")}), out(0, ended, finish=Finish("stop", matched=END))
    )
    assert chunk.text == ("na z<|im_end|>" if include else "na z")
    assert chunk.finish == Finish("stop", matched="<|im_end|>")


def logprobs_of(ids: list[int]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token_id, -1.0) for token_id in ids)


def test_end_token_is_in_the_ids_and_not_in_the_text() -> None:
    ids = [*TOKENIZER.encode("hi"), END]
    finish = Finish("stop", matched=END)
    for skip, text in ((True, "hi"), (False, "hi<|im_end|>")):
        detokenizer = opened(skip_special_tokens=skip)
        [chunk], matches = run(detokenizer, out(0, ids, finish=finish, usage=Usage(9, 3, 8)))
        assert (chunk.text, unpack_ids(chunk.token_ids), chunk.finish) == (text, ids, finish)
        assert chunk.usage == Usage(9, len(ids), 8)
        assert matches == []
        assert detokenizer.num_samples == 0


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_the_last_chunk_flushes(reason: Any) -> None:
    """An unfinished character and a held back beginning of a stop string come out at the end, and alone if need be."""
    error = ErrorInfo("numerical_error", "NaN") if reason == "error" else None
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.encode("你")[0]]
    detokenizer = opened(stop=("b\ufffd!",))
    [chunk], _ = run(detokenizer, out(0, ids))
    assert chunk.text == "a"
    [chunk], matches = run(detokenizer, out(3, [], finish=Finish(reason, error=error)))
    assert (chunk.text, chunk.first, chunk.token_ids) == ("b\ufffd", 3, b"")
    assert chunk.finish == Finish(reason, error=error)
    assert chunk.usage == Usage(9, 3, 3)
    assert matches == []


def test_stop_string_across_tokens_and_steps() -> None:
    detokenizer = opened(stop=("never", "lo w"))
    text = ""
    for place, piece in enumerate(["h", "e", "l", "l", "o"]):
        [chunk], matches = run(detokenizer, out(place, TOKENIZER.encode(piece)))
        text += chunk.text
        assert matches == []
    assert text == "hel"  # "lo" may be the beginning of "lo w"
    ids = [*TOKENIZER.encode(" "), *TOKENIZER.encode("w"), *TOKENIZER.encode("x"), *TOKENIZER.encode("y")]
    logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in ids)
    [chunk], matches = run(detokenizer, out(5, ids, logprobs=logprobs))
    assert chunk.text == ""
    assert unpack_ids(chunk.token_ids) == ids[:2]
    assert chunk.finish == Finish("stop", matched="lo w")
    assert chunk.usage == Usage(9, 7, 3)
    assert chunk.logprobs is not None
    assert [entry.text for entry in chunk.logprobs] == [" ", "w"]
    assert matches == [StopMatched(1)]
    assert run(detokenizer, out(9, ids), out(13, [], finish=Finish("abort"))) == ([], [])
    assert detokenizer.late == 2


def test_stop_wins_over_what_the_scheduler_says_of_the_same_tokens() -> None:
    """No StopMatched then: the scheduler has ended the sample itself."""
    ids = [TOKENIZER.encode(letter)[0] for letter in "abc"]
    detokenizer = opened(stop=("b",), include_stop=True)
    [chunk], matches = run(detokenizer, out(0, ids, finish=Finish("length"), usage=Usage(9, 3, 4)))
    assert (chunk.text, unpack_ids(chunk.token_ids)) == ("ab", ids[:2])
    assert chunk.finish == Finish("stop", matched="b")
    assert chunk.usage == Usage(9, 2, 4)
    assert matches == []


def test_stop_string_that_the_flush_completes() -> None:
    detokenizer = opened(stop=("a\ufffd",))
    ids = [*TOKENIZER.encode("xa"), TOKENIZER.encode("你")[0]]
    [chunk], _ = run(detokenizer, out(0, ids, finish=Finish("length")))
    assert (chunk.text, chunk.finish) == ("x", Finish("stop", matched="a\ufffd"))


def test_repeats_are_dropped() -> None:
    detokenizer = opened()
    ids = [TOKENIZER.encode(letter)[0] for letter in "abcdef"]
    logprobs = tuple(TokenLogprob(token_id, float(-place)) for place, token_id in enumerate(ids))
    run(detokenizer, out(0, ids[:3], logprobs=logprobs[:3]))
    assert run(detokenizer, out(1, ids[1:3])) == ([], [])
    [chunk], _ = run(detokenizer, out(1, ids[1:5], logprobs=logprobs[1:5]))
    assert (chunk.first, chunk.text, unpack_ids(chunk.token_ids)) == (3, "de", ids[3:5])
    assert chunk.logprobs is not None
    assert [entry.logprob for entry in chunk.logprobs] == [-3.0, -4.0]
    [chunk], _ = run(detokenizer, out(0, ids[:5], finish=Finish("length")))
    assert (chunk.first, chunk.text, chunk.token_ids) == (5, "", b"")
    detokenizer.open(open_text(2))
    run(detokenizer, out(0, ids[:1], uid=2))
    detokenizer.open(open_text(2))  # again: the stream goes on
    [chunk], _ = run(detokenizer, out(1, ids[1:2], uid=2))
    assert chunk.first == 1


def test_unknown_samples_are_ignored() -> None:
    detokenizer = opened()
    assert run(detokenizer, out(0, [5], uid=77)) == ([], [])
    assert detokenizer.late == 1


def test_logprobs_get_their_texts() -> None:
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    entry = TokenLogprob(a, -0.5, ((a, -0.5), (END, -1.5), (999, -2.5)))
    [chunk], _ = run(opened(), out(0, [a], logprobs=(entry,), prompt_logprobs=(None, TokenLogprob(b, -2.0))))
    top = (LogprobEntry(a, -0.5, "a"), LogprobEntry(END, -1.5, "<|im_end|>"), LogprobEntry(999, -2.5, ""))
    assert chunk.logprobs == (LogprobEntry(a, -0.5, "a", top, 0),)
    assert chunk.prompt_logprobs == (None, LogprobEntry(b, -2.0, "b"))


def test_logprobs_tell_where_their_text_begins() -> None:
    """Offsets count decoded characters; the bytes of one character all begin where it does."""
    ids = [*TOKENIZER.encode("a你b"), END, *TOKENIZER.encode("c")]
    for stop in ((), ("never",)):
        detokenizer = opened(stop=stop)
        offsets = []
        for place in range(0, len(ids), 2):
            some = ids[place : place + 2]
            [chunk], _ = run(detokenizer, out(place, some, logprobs=tuple(TokenLogprob(i, -1.0) for i in some)))
            assert chunk.logprobs is not None
            offsets += [entry.text_offset for entry in chunk.logprobs]
        assert offsets == [len(TOKENIZER.decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids))]


def test_chats_are_parsed_behind_stop_strings() -> None:
    text = '<think>\nwhy\n</think>\n\nhi\n<tool_call>\n{"name": "f"}\n</tool_call>\nEND more'
    ids = TOKENIZER.encode(text)
    detokenizer = opened(stop=("END",), text_format=TextFormat(think=True, tools=True))
    chunks: list[Chunk] = []
    for place, token_id in enumerate(ids):
        chunks += run(detokenizer, out(place, [token_id]))[0]
    assert "".join(chunk.reasoning for chunk in chunks) == "why"
    assert "".join(chunk.text for chunk in chunks) == "hi"
    assert [raw for chunk in chunks for raw in chunk.tool_calls] == ['{"name": "f"}']
    assert chunks[-1].finish == Finish("stop", matched="END")


def test_next_tokens_are_outputs_of_one_token() -> None:
    """They follow what a sample has, whatever came how; one that is not open is late."""
    whole, told = Detokenizer(TOKENIZER), Detokenizer(TOKENIZER)
    for uid in (1, 2**40):
        whole.open(open_text(uid, stop=("never",)))
        told.open(open_text(uid, stop=("never",)))
    rng = random.Random(0)
    for place in range(50):
        tokens = {uid: rng.randrange(3, 400) for uid in (1, 2**40)}
        expected = whole.step(StepOutput([out(place, [token], uid) for uid, token in tokens.items()]))
        packed = NextTokens(array("q", tokens).tobytes(), pack_ids(tokens.values()))
        step = StepOutput([], packed)
        if place % 7 == 3:
            step = StepOutput([out(place, [tokens[1]])], NextTokens(packed.uids[8:], packed.token_ids[4:]))
        assert told.step(msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepOutput)) == expected
    assert told.late == 0
    assert told.step(StepOutput([], NextTokens(array("q", [3]).tobytes(), pack_ids([5])))) == (ChunkBatch([]), [])
    assert told.late == 1


def test_many_streams_cost_little() -> None:
    """256 streams of one token a step; typically 3 us a token (5 with a stop string), checked with much room."""
    detokenizer = Detokenizer(TOKENIZER)
    for uid in range(256):
        detokenizer.open(open_text(uid, stop=("\n\nUser:",) if uid % 2 else ()))
    steps = [StepOutput([out(place, [3 + (uid * 7 + place) % 400], uid) for uid in range(256)]) for place in range(40)]
    start = time.perf_counter()
    for step in steps:
        detokenizer.step(step)
    microseconds = (time.perf_counter() - start) / (256 * 40) * 1e6
    assert microseconds < 60
