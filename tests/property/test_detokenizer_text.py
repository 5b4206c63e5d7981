"""Joined pieces of incremental text equal the one-shot decode, whatever the ids and however they are cut."""

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.detokenizer.corpus import (
    CORPUS,
    HAS_QWEN3,
    byte_fallback_tokenizer,
    qwen3_tokenizer,
    small_tokenizer,
)
from vibe_sgl_lite.detokenizer.incremental import MAX_HELD_TOKENS, TextStream, Vocabulary, WindowStream
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

BYTE_LEVEL = [
    "small",
    pytest.param("qwen3", marks=pytest.mark.skipif(not HAS_QWEN3, reason="needs QWEN3_MODEL with tokenizer.json")),
]


def tokenizer_of(name: str) -> Tokenizer:
    return {"small": small_tokenizer, "fallback": byte_fallback_tokenizer, "qwen3": qwen3_tokenizer}[name]()


def cut(ids: Sequence[int], sizes: Iterator[int]) -> Iterator[Sequence[int]]:
    start = 0
    while start < len(ids):
        size = next(sizes)
        yield ids[start : start + size]
        start += size


def joined(stream: TextStream, pieces: Iterator[Sequence[int]]) -> str:
    return "".join(map(stream.add, pieces)) + stream.flush()


def check(tokenizer: Tokenizer, ids: Sequence[int], skip: bool, sizes: Iterator[int]) -> None:
    stream = Vocabulary(tokenizer).open(skip)
    assert joined(stream, cut(ids, sizes)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("script", CORPUS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_corpus(name: str, script: str, size: int) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(CORPUS[script])
    for skip in (False, True):
        check(tokenizer, ids, skip, iter(lambda: size, 0))


@pytest.mark.parametrize("script", [name for name in CORPUS if name != "special"])
def test_corpus_through_the_window(script: str) -> None:
    """The window algorithm: on a byte-fallback tokenizer, and on the byte-level one as a second opinion."""
    for tokenizer in (byte_fallback_tokenizer(), small_tokenizer()):
        ids = tokenizer.encode(CORPUS[script])
        stream = WindowStream(tokenizer, skip_special_tokens=True)
        assert joined(stream, cut(ids, iter(lambda: 1, 0))) == tokenizer.decode(ids, skip_special_tokens=True)


@given(
    ids=st.lists(st.integers(0, 440) | st.sampled_from([-1, 2**31 - 1]), max_size=40),
    skip=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_ids_of_the_small_vocabulary(ids: list[int], skip: bool, seed: int) -> None:
    chance = random.Random(seed)
    stream = Vocabulary(small_tokenizer()).open(skip)
    expected = small_tokenizer().decode([i for i in ids if 0 <= i < 2**31 - 1], skip_special_tokens=skip)
    assert joined(stream, cut(ids, iter(lambda: chance.randint(1, 5), 0))) == expected


def test_many_random_sequences() -> None:
    many_random_sequences(small_tokenizer(), 440, 50_000)


@pytest.mark.skipif(not HAS_QWEN3, reason="needs QWEN3_MODEL with tokenizer.json")
def test_many_random_sequences_of_qwen3() -> None:
    many_random_sequences(qwen3_tokenizer(), 151_936, 50_000)


def many_random_sequences(tokenizer: Tokenizer, size: int, cases: int) -> None:
    """Half of the ids are ones whose bytes are no whole characters, where it is easy to go wrong."""
    chance = random.Random(20)
    vocabulary = Vocabulary(tokenizer)
    broken = [i for i in range(size) if "\ufffd" in vocabulary.text(i)]
    for _ in range(cases):
        ids = [
            chance.choice(broken) if chance.random() < 0.5 else chance.randrange(size)
            for _ in range(chance.randint(1, 12))
        ]
        skip = chance.random() < 0.5
        text = joined(vocabulary.open(skip), cut(ids, iter(lambda: chance.randint(1, 4), 0)))
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "fallback"])
def test_text_of_every_single_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    vocabulary = Vocabulary(tokenizer)
    for token_id in range(tokenizer.vocab_size + 3):
        assert vocabulary.text(token_id) == tokenizer.decode([token_id], skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 440), min_size=1, max_size=60))
@example(ids=[172, 97])  # ED A0, which begins no character, is held as two bytes and settles as two U+FFFD
def test_what_is_kept_back_is_less_than_a_character(ids: list[int]) -> None:
    stream = Vocabulary(small_tokenizer()).open(False)
    text = ""
    for place, token_id in enumerate(ids, 1):
        text += stream.add([token_id])
        settled = small_tokenizer().decode(ids[:place], skip_special_tokens=False)
        assert settled.startswith(text)
        assert len(settled) - len(text) <= 3  # bytes
        assert set(settled[len(text) :]) <= {"\ufffd"}


def test_the_window_stays_short_on_endless_broken_bytes() -> None:
    tokenizer = byte_fallback_tokenizer()
    stream = WindowStream(tokenizer, skip_special_tokens=True)
    text = ""
    for _ in range(1000):
        text += stream.add([1 + 0x80])
        assert len(stream._ids) <= 2 * (MAX_HELD_TOKENS + 1)
    text += stream.flush()
    assert text == "\ufffd" * 1000


@given(ids=st.lists(st.integers(0, 440), max_size=40))
def test_skipping_is_the_streams_own_setting(ids: list[int]) -> None:
    """Two streams of one vocabulary, one skipping and one not, do not disturb each other."""
    tokenizer = small_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    streams = {skip: vocabulary.open(skip) for skip in (False, True)}
    texts = {False: "", True: ""}
    for token_id in ids:
        for skip, stream in streams.items():
            texts[skip] += stream.add([token_id])
    for skip, stream in streams.items():
        assert texts[skip] + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
