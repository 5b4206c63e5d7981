"""Stop strings against a brute-force model that sees one character at a time."""

import random
from array import array
from collections.abc import Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.detokenizer.corpus import CORPUS, small_tokenizer
from vibe_sgl_lite.detokenizer.core import Detokenizer
from vibe_sgl_lite.detokenizer.incremental import Vocabulary
from vibe_sgl_lite.detokenizer.stop import StopMatcher
from vibe_sgl_lite.runtime.messages import (
    Chunk,
    NextTokens,
    OpenText,
    StepOutput,
    TokenOutput,
    Usage,
    pack_ids,
    unpack_ids,
)

ALPHABET = "ab\u0301你"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3)


def brute_force(text: str, stops: Sequence[str], include: bool) -> tuple[str, int, str | None]:
    """(text shown in the end, characters needed to know it, the match)."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], end, stop
    return text, len(text), None


@given(text=st.text(ALPHABET, max_size=30), stops=STOPS, include=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=500)
def test_matcher(text: str, stops: list[str], include: bool, seed: int) -> None:
    matcher_case(text, stops, include, random.Random(seed))


def test_matcher_many() -> None:
    chance = random.Random(7)
    for _ in range(50_000):
        text = "".join(chance.choice("ab你") for _ in range(chance.randint(0, 14)))
        stops = [
            "".join(chance.choice("ab你") for _ in range(chance.randint(1, 5))) for _ in range(chance.randint(1, 3))
        ]
        matcher_case(text, stops, chance.random() < 0.3, chance)


def matcher_case(text: str, stops: list[str], include: bool, chance: random.Random) -> None:
    expected, _, expected_match = brute_force(text, stops, include)
    matcher = StopMatcher(stops, include)
    shown, matched, given_so_far = "", None, 0
    while given_so_far < len(text) and matched is None:
        size = chance.randint(1, 4)
        piece, matched = matcher.add(text[given_so_far : given_so_far + size])
        given_so_far = min(len(text), given_so_far + size)
        shown += piece
        assert expected.startswith(shown)  # nothing shown is ever taken back
        if matched is None:
            assert len(shown) >= given_so_far - (max(map(len, stops)) - 1)  # never more is held back
    if matched is None:
        shown += matcher.flush()
    assert (shown, matched) == (expected, expected_match)


@given(
    script=st.sampled_from(sorted(CORPUS)),
    places=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), min_size=1, max_size=3),
    include=st.booleans(),
    skip=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_whole_samples(script: str, places: list[tuple[int, int]], include: bool, skip: bool, seed: int) -> None:
    """Tokens in, chunks out: text, ids, usage and logprobs cut exactly; stop strings taken from the text itself."""
    chance = random.Random(seed)
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(CORPUS[script])
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    stops = tuple(filter(None, (whole[start : start + size] for start, size in places))) or ("never",)
    expected, needed, match = brute_force(whole, stops, include)
    detokenizer = Detokenizer(tokenizer)
    detokenizer.open(OpenText(1, "r", 0, 5, stops, include, skip))
    chunks, matches, first = [], 0, 0
    while first < len(ids):
        part = ids[first : first + chance.randint(1, 5)]
        output = TokenOutput(1, first, pack_ids(part))
        first += len(part)
        if first == len(ids):
            output = msgspec.structs.replace(output, usage=Usage(5, first, 2))
        step = StepOutput([output])
        if len(part) == 1 and output.usage is None:
            step = StepOutput([], NextTokens(array("q", [1]).tobytes(), pack_ids(part)))
        batch, found = detokenizer.step(step)
        matches += len(found)
        chunks += [msgspec.msgpack.decode(chunk.payload, type=Chunk) for chunk in batch.chunks]
    got = [token_id for chunk in chunks for token_id in unpack_ids(chunk.token_ids)]
    text = "".join(chunk.text for chunk in chunks)
    finish = chunks[-1].finish
    if finish is None:
        assert expected.startswith(text)
        # Only a match that hangs on the unfinished character at the very end is still open.
        assert match is None or whole[needed - 1] == "\ufffd"
        assert got == ids
        return
    assert matches == 1
    assert finish.reason == "stop"
    assert (text, finish.matched) == (expected, match)
    stream = Vocabulary(tokenizer).open(skip)
    lengths = [len(stream.add([token_id])) for token_id in ids]
    completing = next(i for i in range(len(ids)) if sum(lengths[: i + 1]) >= needed)
    assert got == ids[: completing + 1]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == completing + 1
    assert detokenizer.num_samples == 0
