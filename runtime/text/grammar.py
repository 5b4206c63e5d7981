"""Structured output: what a request asks for, as a grammar of the llguidance library, and a matcher that follows it.

The library is the optional extra `grammar`, imported when the first request needs it. The tokenizer manager refuses
what it cannot follow; every rank follows it. Knows nothing of batches and tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from vibe_sgl_lite.runtime.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

FIELDS = ("json_schema", "regex", "choice", "grammar")
MAX_SCHEMA_CHARS = 256 * 1024
MAX_REGEX_CHARS = 16 * 1024
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 64 * 1024  # all of them together
# A matcher for the worst regular expressions that these limits let through takes 0.15 s to make; 3 s with the default.
_START_FUEL = 100_000
# One way to write each document: with free white space, nothing would bound its length.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def make_grammar(
    json_schema: str | None, regex: str | None, choice: Sequence[str] | None, lark: str | None = None
) -> str | None:
    """The grammar of what is asked for, None for nothing. Raises RequestError for what no output could follow.

    json_schema: JSON text; documents come without line breaks, as `json.dumps` writes them. regex: Rust's syntax,
    without look-around; the whole output matches it. choice: the output is one of the texts. lark: a grammar in Lark's
    syntax, with the library's additions.
    """
    fields = [name for name, value in zip(FIELDS, (json_schema, regex, choice, lark), strict=True) if value is not None]
    if not fields:
        return None
    if len(fields) > 1:
        raise RequestError(f"give one of {', '.join(FIELDS)}, not {' and '.join(fields)}", field=fields[1])
    library = _library(fields[0])
    if json_schema is not None:
        grammar = _from_schema(library, json_schema)
    elif regex is not None:
        _check_size("regex", "characters", len(regex), MAX_REGEX_CHARS)
        grammar = str(library.LLMatcher.grammar_from_regex(regex))
    elif lark is not None:
        _check_size("grammar", "characters", len(lark), MAX_GRAMMAR_CHARS)
        grammar = str(library.LLMatcher.grammar_from_lark(lark))
    else:
        assert choice is not None
        grammar = _from_choice(library, choice)
    # Whether it can be followed does not depend on the tokenizer: bytes are enough to find out.
    matcher = make_matcher(library.LLTokenizer("byte"), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise RequestError(f"{fields[0]} cannot be followed: {first_line(matcher.get_error())}", field=fields[0])
    return grammar


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at its beginning; `is_error` tells when the grammar is bad."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=_START_FUEL, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def first_line(error: str) -> str:
    """Of the library's message, without the source that it quotes."""
    return " ".join(error.strip().split("<non-verbose/>")[0].split())[:300] or "it is too complex"


def _library(field: str) -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            f"{field} needs the grammar extra where the engine runs: pip install 'vibe-sgl-lite[grammar]'", field=field
        ) from error
    return llguidance


def _from_schema(library: ModuleType, text: str) -> str:
    _check_size("json_schema", "characters", len(text), MAX_SCHEMA_CHARS)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is no JSON: {error}", field="json_schema") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RequestError(f"json_schema is a {type(schema).__name__}: must be an object", field="json_schema")
    try:
        return str(library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))
    except ValueError as error:
        raise RequestError(f"json_schema cannot be followed: {first_line(str(error))}", field="json_schema") from error


def _from_choice(library: ModuleType, choice: Sequence[str]) -> str:
    if not choice or "" in choice:
        raise RequestError("choice must be one or more texts, none of them empty", field="choice")
    _check_size("choice", "texts", len(choice), MAX_CHOICES)
    _check_size("choice", "characters", sum(map(len, choice)), MAX_CHOICE_CHARS)
    return str(library.LLMatcher.grammar_from_regex("|".join(map(_literal, choice))))


def _literal(text: str) -> str:
    """A regular expression, in Rust's syntax, that matches `text` alone."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text)


def _check_size(field: str, unit: str, size: int, most: int) -> None:
    if size > most:
        raise RequestError(f"{field} has {size} {unit}: at most {most}", field=field)
