"""Numbers in JSON schemas: what comes out is what was asked for, also where the grammar library would round."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.grammar import compile_grammar, grammar_source, make_matcher
from vibe_sgl_lite.runtime.text.schema_numbers import make_exact

BYTES = LLTokenizer("byte")
BIG = st.one_of(st.integers(-(2**66), 2**66), st.sampled_from([2**53 + 1, 2**63 - 1, -(2**63), 10**400]))
NUMBERS = st.one_of(BIG, st.floats(allow_nan=False, allow_infinity=False))


def make(schema: Any) -> str:
    source = grammar_source(json.dumps(schema), None, None)
    assert source is not None
    return compile_grammar(source, BYTES, {})


def forced(schema: Any) -> str:
    """The only document that fits."""
    matcher = make_matcher(BYTES, make(schema))
    text = b""
    while ids := [token for token in matcher.compute_ff_tokens() if token < 256]:
        assert matcher.consume_tokens(ids)
        text += bytes(ids)
    return text.decode()


@settings(max_examples=150, deadline=None)
@given(NUMBERS)
def test_a_constant_comes_out_or_is_refused(number: float) -> None:
    few = isinstance(number, int) and abs(number) <= 2**53
    for schema in ({"const": number}, {"enum": [number]}, {"const": {"a": [number]}}):
        try:
            value = json.loads(forced(schema))
        except RequestError:
            assert not few
        else:
            value = value["a"][0] if isinstance(value, dict) else value
            assert (float(value) if isinstance(number, float) else value) == number


@settings(max_examples=150, deadline=None)
@given(st.integers(1 - 10**15, 10**15 - 1), st.integers(-22, -1))
def test_fifteen_digits_are_enough(figures: int, exponent: int) -> None:
    number = float(f"{figures}e{exponent}")
    assert float(forced({"const": number})) == number


@settings(max_examples=300, deadline=None)
@given(NUMBERS, st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]))
def test_bounds_move_inwards_alone_and_little(number: float, name: str) -> None:
    schema: dict[str, Any] = {name: number}
    up = name.endswith("inimum")
    try:
        make_exact(schema)
    except ValueError:
        assert number > 2**53 if up else number < -(2**53)
        return
    moved = schema[name]
    assert moved >= number if up else moved <= number
    if abs(number) <= 2**53:
        assert math.isclose(moved, number, rel_tol=1e-13, abs_tol=1e-21)
    once = dict(schema)
    make_exact(schema)
    assert schema == once


@pytest.mark.parametrize(
    ("schema", "fit", "unfit"),
    [
        (
            {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            ["0", "-5", str(2**53)],
            [str(2**63), str(2**80)],
        ),
        ({"type": "integer", "minimum": 0, "exclusiveMaximum": 2**64}, ["0", str(2**53 - 1)], ["-1", str(2**64)]),
        ({"type": "number", "minimum": 0, "maximum": 1.7976931348623157e308}, ["0", "1.5"], ["-1"]),
        ({"type": "integer", "minimum": 2**53 - 1, "maximum": 2**53}, [str(2**53), str(2**53 - 1)], [str(2**53 + 1)]),
        (
            {"type": "object", "properties": {"const": {"default": 2**80, "const": 1}}, "required": ["const"]},
            ['{"const": 1}'],
            ['{"const": 2}'],
        ),
    ],
)
def test_bounds_of_other_languages_types(schema: Any, fit: list[str], unfit: list[str]) -> None:
    grammar = make(schema)
    for text, right in [*((text, True) for text in fit), *((text, False) for text in unfit)]:
        matcher, data = make_matcher(BYTES, grammar), list(text.encode())
        assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) == right, text


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**80},
        {"const": -(2**63)},
        {"enum": [1, 0.12345678901234567]},
        {"type": "integer", "multipleOf": 2**70},
        {"type": "integer", "minimum": 2**80, "maximum": 2**80 + 5},
        {"type": "object", "properties": {"id": {"const": 2**60 + 1}}},
        {"$defs": {"minimum": {"anyOf": [{"type": "integer", "maximum": -(2**60)}]}}, "$ref": "#/$defs/minimum"},
    ],
)
def test_what_would_be_rounded_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match=r"would be rounded|is beyond \d+") as caught:
        make(schema)
    assert caught.value.field == "json_schema"
