"""What may be asked for as structured output, and what is refused at arrival, by name."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

import vibe_sgl_lite
from tests.detokenizer.corpus import HAS_QWEN3, QWEN3, small_backend, small_tokenizer
from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.grammar import (
    added_tokens,
    compile_grammar,
    grammar_source,
    make_matcher,
    make_tokenizer,
)
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

BYTES = LLTokenizer("byte")


def make_grammar(json_schema: Any, regex: Any, choice: Any) -> str | None:
    source = grammar_source(json_schema, regex, choice)
    return None if source is None else compile_grammar(source, BYTES, {})


def matches(grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = make_matcher(BYTES, grammar)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def test_nothing_asked_for_is_no_grammar() -> None:
    assert make_grammar(None, None, None) is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("{}", "a", None), "regex"),
        ((None, "a", ["b"]), "choice"),
        (("no json", None, None), "json_schema"),
        (("[1]", None, None), "json_schema"),
        (("false", None, None), "json_schema"),
        (('{"type": "strin"}', None, None), "json_schema"),
        (('{"type": "string", "not": {}}', None, None), "json_schema"),
        (('{"$ref": "http://example.com/x"}', None, None), "json_schema"),
        (('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', None, None), "json_schema"),
        (('{"type": "string", "minLength": 5, "maxLength": 3}', None, None), "json_schema"),
        (('{"type": "array", "items": ' * 2000 + "{}" + "}" * 2000, None, None), "json_schema"),
        (("[" * 200_000, None, None), "json_schema"),
        (('"' + "x" * 300_000 + '"', None, None), "json_schema"),
        ((None, "(a", None), "regex"),
        ((None, "(?=a)b", None), "regex"),
        ((None, "x" * 20_000, None), "regex"),
        ((None, None, []), "choice"),
        ((None, None, ["a", ""]), "choice"),
        ((None, None, ["a"] * 1025), "choice"),
        ((None, None, ["a" * 70_000]), "choice"),
    ],
)
def test_what_cannot_be_followed_is_refused(arguments: tuple[Any, Any, Any], field: str) -> None:
    start = time.process_time()
    with pytest.raises(RequestError, match=field) as caught:
        make_grammar(*arguments)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 2


def test_a_hard_regular_expression_takes_no_time() -> None:
    start = time.process_time()
    make_grammar(None, "(a{1000}){1000}", None)
    assert time.process_time() - start < 1.5


def test_a_schema_has_one_way_to_write_a_document() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}}
    grammar = make_grammar(json.dumps(schema), None, None)
    value = {"a": 1, "b": None}
    assert matches(grammar, json.dumps(value))
    assert not matches(grammar, json.dumps(value, indent=1))
    assert not matches(grammar, json.dumps(value, separators=(",", ":")))


def test_a_regular_expression_matches_all_of_the_output() -> None:
    grammar = make_grammar(None, "[a-c]+\\d?", None)
    assert all(matches(grammar, text) for text in ("abc", "a1"))
    assert not any(matches(grammar, text) for text in ("", "1", "a12", "xa"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6), st.text(max_size=6))
def test_a_choice_is_one_of_the_texts(choice: list[str], other: str) -> None:
    grammar = make_grammar(None, None, choice)
    assert all(matches(grammar, text) for text in choice)
    assert matches(grammar, other) == (other in choice)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"regex needs the grammar extra.*vibe-sgl-lite\[grammar\]"):
        make_grammar(None, "a", None)


def tiny() -> Path:
    return Path(vibe_sgl_lite.__file__).parent / "models" / "tiny" / "tokenizer.json"


@cache
def views() -> list[tuple[Tokenizer, LLTokenizer, int]]:
    """Tokenizers and what the library sees of them; the last one's special tokens stand in its own vocabulary."""
    small = small_tokenizer()
    pairs = [(Tokenizer.from_file(tiny()), tiny().read_text(), 2041), (small, small_backend().to_str(), 0)]
    if HAS_QWEN3:
        file = Path(QWEN3) / "tokenizer.json"
        pairs.append((Tokenizer.from_file(file), file.read_text(), 151645))
    return [(tokenizer, make_tokenizer(text, tokenizer.vocab_size, [end]), end) for tokenizer, text, end in pairs]


PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<|", "<é｜>", "x",
    "e\u0301", "\u0958", "nai\u0308ve", "\ufb01", "\u1112\u1161\u11ab", "\u212b", "\u0344", "\U0010ffff",
    " a b ", " ", "\n", "é", "{}",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join), st.integers(0, 2**32))
def test_what_a_grammar_forces_comes_out(text: str, seed: int) -> None:
    """Whatever the text: names of added tokens, and what Unicode's normal forms would change."""
    for tokenizer, view, end in views():
        matcher = make_matcher(view, make_grammar(None, None, [text]) or "")
        chooser = random.Random(seed)
        ids: list[int] = []
        while True:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits).tolist()
            assert not matcher.is_error(), matcher.get_error()
            if end in allowed:
                break
            ids.append(chooser.choice(allowed))
            assert matcher.consume_token(ids[-1])
        assert tokenizer.decode(ids) == text


def test_what_a_grammar_forces_in_every_field() -> None:
    tag = "<tool_call>e\u0301<|im_end|>"
    for arguments, wanted in (
        ((None, re.escape(tag), None), tag),
        ((json.dumps({"const": tag}), None, None), json.dumps(tag, ensure_ascii=False)),
        ((json.dumps({"enum": [tag]}), None, None), json.dumps(tag, ensure_ascii=False)),
        (
            (json.dumps({"type": "object", "properties": {tag: {"const": 1}}, "required": [tag]}), None, None),
            json.dumps({tag: 1}, ensure_ascii=False),
        ),
    ):
        tokenizer, view, end = views()[0]
        matcher = make_matcher(view, make_grammar(*arguments) or "")
        ids: list[int] = []
        while (forced := matcher.compute_ff_tokens()) and end not in forced:
            assert matcher.consume_tokens(forced)
            ids += forced
        assert tokenizer.decode(ids).startswith(wanted.removesuffix("}"))


@pytest.mark.parametrize(
    ("lark", "ids"),
    [
        ("start: <tool_call> </tool_call>", [2042, 2043]),
        ('start: call // <think>\ncall: <tool_call>"a</tool_call>"i?</tool_call>', [2042, 2043]),
        ('start: <tool_call> %json {"const": "<tool_call>"} </tool_call>', [2042, *b'"<tool_call>"', 2043]),
        ("start: <tool_call> /<think>/ </tool_call>", [2042, *b"<think>", 2043]),
        ("start: <[2042]> <unknown>", [2042, *b"<unknown>"]),
        ("start: <|im_end|>", [*b"<|im_end|>"]),  # an end token cannot stand within an output
    ],
)
def test_names_of_added_tokens_in_a_grammar(lark: str, ids: list[int]) -> None:
    """ids: in which a byte stands for itself, as one of the tokens of this text."""
    text = tiny().read_text()
    tokenizer, view, end = views()[0]
    source = grammar_source(None, None, None, lark)
    assert source is not None
    matcher = make_matcher(view, compile_grammar(source, view, added_tokens(text, [end])))
    for number in ids:
        token = [number] if number > 255 else tokenizer.encode(chr(number))
        assert matcher.consume_tokens(token), (number, matcher.get_error())
    assert matcher.is_accepting()


KINDS = {
    "circle": {
        "type": "object",
        "properties": {"kind": {"const": "circle"}, "r": {"type": "integer"}},
        "required": ["kind", "r"],
    },
    "group": {
        "type": "object",
        "properties": {"kind": {"const": "group"}, "of": {"type": "array", "items": {"$ref": "#/$defs/shape"}}},
        "required": ["kind", "of"],
    },
    "shape": {"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/group"}]},
}


def test_one_of_whose_branches_exclude_each_other() -> None:
    """As pydantic writes unions told apart by a field: references, which may lead back to the union."""
    schema = {"$ref": "#/$defs/shape", "$defs": KINDS}
    grammar = make_grammar(json.dumps(schema), None, None)
    circle = {"kind": "circle", "r": 1}
    for value, right in (
        (circle, True),
        ({"kind": "group", "of": [circle, {"kind": "group", "of": []}]}, True),
        ({"kind": "square", "r": 1}, False),
        ({"kind": "group", "of": [1]}, False),
    ):
        assert matches(grammar, json.dumps(value)) == right
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == right
    for branches in (
        [{"type": "integer"}, {"type": "number"}],
        [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/circle"}],
        [{"$ref": "#/$defs/shape"}, {"$ref": "#/$defs/circle"}],
        [{"$ref": "#/$defs/nobody"}, {"type": "null"}],
    ):
        with pytest.raises(RequestError, match="json_schema cannot be followed"):
            make_grammar(json.dumps({"oneOf": branches, "$defs": KINDS}), None, None)
