"""What may be asked for as structured output, and what is refused at arrival, by name."""

from __future__ import annotations

import builtins
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.grammar import make_grammar, make_matcher

BYTES = LLTokenizer("byte")


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
    start = time.monotonic()
    with pytest.raises(RequestError, match=field) as caught:
        make_grammar(*arguments)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500
    assert time.monotonic() - start < 2


def test_a_hard_regular_expression_takes_no_time() -> None:
    start = time.monotonic()
    make_grammar(None, "(a{1000}){1000}", None)
    assert time.monotonic() - start < 1.5


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
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"regex needs the grammar extra.*vibe-sgl-lite\[grammar\]"):
        make_grammar(None, "a", None)
