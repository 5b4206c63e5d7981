"""Structured output: what a request asks for, as a grammar of the llguidance library, and a matcher that follows it.

The library is the optional extra `grammar`, imported when the first request needs it. It is native code that recurses
and may take long: the tokenizer manager tries a grammar in a process that can be killed (grammar_compiler.py) before
the ranks follow it. Knows nothing of batches and tensors.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.disjoint import Disjointness
from vibe_sgl_lite.runtime.text.schema_numbers import make_exact

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

FIELDS = ("json_schema", "regex", "choice", "grammar")
_MAX_CHARS = {"json_schema": 256 * 1024, "regex": 16 * 1024, "grammar": 256 * 1024}
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 64 * 1024  # all of them together
# Work is counted, not timed, so that all ranks stop at the same point. A mask takes at most about 20 ms with these.
_START_FUEL = 500_000
_STEP_FUEL = 50_000
_LEXER_STATES = 50_000  # about 2 KB each
_ADDED = "\U0010ffff"  # stands before an added token's id in its place; no character
# One way to write each document: with free white space, nothing would bound its length.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# In Lark's syntax: texts, comments and regular expressions, which are left as they are, and <names>.
_LARK = re.compile(r'"(?:\\.|[^"\\])*+"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])++/|<([^\s<>\[\]"]+)>')
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name


class GrammarSource(msgspec.Struct, frozen=True):
    """field: json_schema (JSON text; documents come without line breaks, as `json.dumps` writes them), regex (Rust's
    syntax, without look-around; the whole output matches it), choice (the output is one of the texts) or grammar (in
    Lark's syntax, with the library's additions)."""

    field: str
    value: str | tuple[str, ...]


def grammar_source(
    json_schema: str | None, regex: str | None, choice: Sequence[str] | None, lark: str | None = None
) -> GrammarSource | None:
    """What is asked for, None for nothing. Raises RequestError for too much of it, and without the library."""
    values = (json_schema, regex, choice, lark)
    given = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
    if not given:
        return None
    field, *others = given
    if others:
        raise RequestError(f"give one of {', '.join(FIELDS)}, not {' and '.join(given)}", field=others[0])
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            f"{field} needs the grammar extra where the engine runs: pip install 'vibe-sgl-lite[grammar]'", field=field
        )
    if choice is not None:
        if not choice or "" in choice:
            raise RequestError("choice must be one or more texts, none of them empty", field="choice")
        _check_size("choice", "texts", len(choice), MAX_CHOICES)
        _check_size("choice", "characters", sum(map(len, choice)), MAX_CHOICE_CHARS)
        return GrammarSource(field, tuple(choice))
    text = given[field]
    assert isinstance(text, str)
    _check_size(field, "characters", len(text), _MAX_CHARS[field])
    return GrammarSource(field, text)


def compile_grammar(source: GrammarSource, tokenizer: LLTokenizer, added: Mapping[str, int]) -> str:
    """The grammar, tried out. Raises RequestError for what no output could follow.

    added: ids of the added tokens that a grammar in Lark's syntax may name, as <tool_call>; other names are texts.
    May overflow the native stack, take long and take much memory: for a process that can be killed.
    """
    from llguidance import LLMatcher

    if source.field == "json_schema":
        grammar = _from_schema(str(source.value))
    elif source.field == "grammar":
        grammar = str(LLMatcher.grammar_from_lark(_with_ids(str(source.value), added)))
    elif source.field == "regex":
        grammar = str(LLMatcher.grammar_from_regex(str(source.value)))
    else:
        grammar = str(LLMatcher.grammar_from_regex("|".join(map(_literal, source.value))))
    matcher = make_matcher(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise RequestError(f"{source.field} cannot be followed: {first_line(matcher.get_error())}", field=source.field)
    return grammar


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at its beginning; `is_error` tells when the grammar is bad."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=_START_FUEL,
        step_lexer_fuel=_STEP_FUEL,
        max_lexer_states=_LEXER_STATES,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def make_tokenizer(tokenizer_json: str, vocab_size: int, end_token_ids: Sequence[int]) -> LLTokenizer:
    """The library's view of a tokenizer (tokenizer.json's text); end_token_ids may follow a whole output.

    The library tokenizes the text that a grammar forces. So that the tokens spell this text and nothing else, added
    tokens have no text in this view, and there is no normalizer.
    """
    from llguidance import LLTokenizer

    view = json.loads(tokenizer_json)
    vocabulary = view["model"]["vocab"]
    for token in view.get("added_tokens", ()):
        name = f"{_ADDED}{token['id']}"
        if isinstance(vocabulary, dict) and token["content"] in vocabulary:
            vocabulary[name] = vocabulary.pop(token["content"])
        token.update(content=name, special=True, normalized=False)
    view |= {"normalizer": None, "post_processor": None}
    return LLTokenizer(json.dumps(view), n_vocab=vocab_size, eos_token=list(end_token_ids))


def added_tokens(tokenizer_json: str, end_token_ids: Sequence[int]) -> dict[str, int]:
    """Ids of a tokenizer's added tokens (tokenizer.json's text), without those that end an output."""
    tokens = json.loads(tokenizer_json).get("added_tokens", ())
    return {token["content"]: token["id"] for token in tokens if token["id"] not in end_token_ids}


def first_line(error: str) -> str:
    """Of the library's message, without the source that it quotes."""
    return " ".join(error.strip().split("<non-verbose/>")[0].split())[:300] or "it is too complex"


def _from_schema(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is no JSON: {error}", field="json_schema") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RequestError(f"json_schema is a {type(schema).__name__}: must be an object", field="json_schema")
    try:
        _prepare(schema, Disjointness(schema))
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"json_schema cannot be followed: {first_line(str(error))}", field="json_schema") from error


def _with_ids(lark: str, added: Mapping[str, int]) -> str:
    """Names of tokens as the library reads them, by id: its view of the tokenizer has other names (make_tokenizer)."""

    def replaced(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return f"<[{added[match[0]]}]>" if match[0] in added else json.dumps(match[0])

    return _LARK.sub(replaced, lark)


def _prepare(value: Any, apart: Disjointness, *, names: bool = False) -> None:
    """Make a schema one that the library follows rightly, in place: `oneOf`, and numbers.

    A `oneOf` whose branches exclude each other is an `anyOf`; what is left is for the library, which follows it where
    it sees as much itself. names: `value` holds schemas by names of the caller's choice. Raises ValueError.
    """
    if isinstance(value, list):
        for inner in value:
            _prepare(inner, apart)
    elif isinstance(value, dict):
        if not names:
            make_exact(value)
            branches = value.get("oneOf")
            if isinstance(branches, list) and "anyOf" not in value and apart.all_apart(branches):
                value["anyOf"] = value.pop("oneOf")
        for name, inner in value.items():
            if names or name not in ("const", "enum"):
                _prepare(inner, apart, names=not names and name in _NAMED)


def _literal(text: str) -> str:
    """A regular expression, in Rust's syntax, that matches `text` alone."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text)


def _check_size(field: str, unit: str, size: int, most: int) -> None:
    if size > most:
        raise RequestError(f"{field} has {size} {unit}: at most {most}", field=field)
