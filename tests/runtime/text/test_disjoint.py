"""Schemas that exclude each other, against the jsonschema library: no document fits both."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.disjoint import Disjointness
from vibe_sgl_lite.runtime.text.grammar import compile_grammar, grammar_source, make_matcher

BYTES = LLTokenizer("byte")
DOCUMENTS: list[Any] = [
    None, True, False, 0, 1, 1.0, 1.5, 2, 3, -1, 2**53, 2**53 + 1, "", "a", "ab", "abc", "b", "ba", "a.b", [], [1],
    ["a"], [1, "a"], ["a", 1], [1, 2, 3], {}, {"a": 1}, {"a": "a"}, {"b": 1}, {"a": 1, "b": 1}, {"kind": "x"},
    {"kind": "y", "a": 1}, {"a": {"kind": "x"}},
]  # fmt: skip
DEFINITIONS = {
    "x": {"type": "object", "properties": {"kind": {"const": "x"}}, "required": ["kind"]},
    "y": {"type": "object", "properties": {"kind": {"const": "y"}}, "required": ["kind"]},
    "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/x"}]},
}
COUNTS = st.integers(0, 3)
NUMBERS = st.sampled_from([-1, 0, 1, 1.5, 2, 3, 2**53, 2**53 + 1])
VALUES = st.sampled_from(DOCUMENTS)
PATTERNS = ["^a", "^b", "^ab?", "^ab*$", "^a\\.b", "^(a|b)", "a", "^a|b", "^abc$", "^[ab]", "^a{0}b"]
KINDS = ["null", "boolean", "integer", "number", "string", "array", "object"]
PLAIN = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(st.sampled_from(KINDS), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)),
        "const": VALUES,
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "minLength": COUNTS,
        "maxLength": COUNTS,
        "pattern": st.sampled_from(PATTERNS),
        "minimum": NUMBERS,
        "maximum": NUMBERS,
        "exclusiveMinimum": NUMBERS,
        "exclusiveMaximum": NUMBERS,
        "minItems": COUNTS,
        "maxItems": COUNTS,
        "minProperties": COUNTS,
        "maxProperties": COUNTS,
        "required": st.lists(st.sampled_from(["a", "b", "kind"]), max_size=2, unique=True),
        "additionalProperties": st.booleans(),
        "not": st.just({}),
        "format": st.just("date"),
    },
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.tuples(
            PLAIN,
            st.fixed_dictionaries(
                {},
                optional={
                    "allOf": lists, "anyOf": lists, "oneOf": lists, "prefixItems": lists, "items": inner,
                    "properties": st.dictionaries(st.sampled_from(["a", "b", "kind"]), inner, max_size=2),
                    "patternProperties": st.just({"^a": True}),
                },
            ),
        ).map(lambda parts: parts[0] | parts[1]),
        inner,
    )  # fmt: skip


SCHEMAS = st.recursive(
    st.one_of(PLAIN, st.booleans(), st.sampled_from([{"$ref": f"#/$defs/{name}"} for name in ("x", "y")])),
    larger,
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, SCHEMAS)
def test_no_document_fits_both(one: Any, other: Any) -> None:
    if Disjointness({"$defs": DEFINITIONS}).apart(one, other):  # about one pair in three
        both = jsonschema.Draft202012Validator({"allOf": [one, other], "$defs": DEFINITIONS})
        assert not [document for document in DOCUMENTS if both.is_valid(document)]


def record(name: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: value}, "required": [name], **more}


@pytest.mark.parametrize(
    ("branches", "fit", "unfit"),
    [
        (
            [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 4, "maxLength": 5}],
            ["ab", "abcd"],
            ["abc"],
        ),
        (
            [{"type": "string", "pattern": "^a[0-9]$"}, {"type": "string", "pattern": "^b\\.[0-9]$"}],
            ["a1", "b.2"],
            ["c1"],
        ),
        ([{"const": "x"}, {"const": "y"}, {"type": "null"}], ["x", None], ["z", 1]),
        ([{"enum": [1, 2]}, {"type": "integer", "minimum": 3, "maximum": 9}], [1, 7], [10, "x"]),
        (
            [
                {"type": "integer", "maximum": 0, "minimum": -9},
                {"type": "integer", "exclusiveMinimum": 0, "maximum": 9},
            ],
            [0, 1],
            [10],
        ),
        (
            [record("a", {"type": "integer", "maximum": 5, "minimum": 0}), record("a", {"const": "x"})],
            [{"a": 1}, {"a": "x"}],
            [{"a": "y"}],
        ),
        (
            [
                record("a", {"const": 1}, additionalProperties=False),
                record("b", {"const": 1}, additionalProperties=False),
            ],
            [{"a": 1}, {"b": 1}],
            [{"a": 1, "b": 1}, {}],
        ),
        (
            [
                {"type": "array", "items": {"const": 1}, "maxItems": 1},
                {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 3},
            ],
            [[], [1, 1]],
            [[1, 1, 1, 1]],
        ),
        ([{"$ref": "#/$defs/x"}, {"allOf": [{"$ref": "#/$defs/y"}]}], [{"kind": "x"}, {"kind": "y"}], [{"kind": "z"}]),
        ([{"anyOf": [{"const": 1}, {"const": 2}]}, {"oneOf": [{"const": "1"}, {"type": "null"}]}], [1, None], [3]),
    ],
)
def test_one_of_that_is_followed(branches: list[Any], fit: list[Any], unfit: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFINITIONS}
    source = grammar_source(json.dumps(schema), None, None)
    assert source is not None
    grammar = compile_grammar(source, BYTES, {})
    for value, right in [*((value, True) for value in fit), *((value, False) for value in unfit)]:
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == right
        data = list(json.dumps(value).encode())
        matcher = make_matcher(BYTES, grammar)
        assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) == right, value


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 2}],
        [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^ab"}],
        [{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "object", "properties": {"a": {"const": 2}}}],
        [{"const": 1}, {"const": 1.0}],
        [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}],
    ],
)
def test_one_of_that_two_branches_may_fit_is_refused(branches: list[Any]) -> None:
    source = grammar_source(json.dumps({"oneOf": branches, "$defs": DEFINITIONS}), None, None)
    assert source is not None
    with pytest.raises(RequestError, match="json_schema cannot be followed"):
        compile_grammar(source, BYTES, {})
