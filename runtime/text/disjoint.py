"""Whether two JSON schemas exclude each other: whether no document can be valid against both.

A `oneOf` whose branches all do is an `anyOf`, which grammars can follow. The answer is True only where it is certain;
what is not looked at (formats, multipleOf, not, ...) can only make less valid, so it never makes a True wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any
from urllib.parse import unquote

MAX_STEPS = 20_000  # for all of a schema's pairs together: references may lead anywhere, and back
MAX_DEPTH = 16
MAX_ITEMS = 16  # of arrays that are compared item by item
EXCLUSIVE = ("exclusiveMinimum", "exclusiveMaximum")  # in the draft of 2013 booleans, which count for nothing here
Range = tuple[tuple[float, int], tuple[float, int]]  # lowest and highest, each with 1 or -1 where itself is excluded
# Of each type, what counts its size, and the keywords that bound it.
SIZES: Mapping[str, tuple[Callable[[Any], float], str, str]] = {
    "string": (len, "minLength", "maxLength"),
    "array": (len, "minItems", "maxItems"),
    "object": (len, "minProperties", "maxProperties"),
}
_LITERAL_START = re.compile(r"\^((?:[^\\^$.|?*+()\[\]{}]|\\[^0-9A-Za-z])*)")


class Disjointness:
    """For the schemas of one document, `root`, within which local references point."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def all_apart(self, schemas: list[Any]) -> bool:
        """Whether every two of them exclude each other."""
        return all(self.apart(one, other) for one, other in combinations(schemas, 2))

    def apart(self, one: Any, other: Any, depth: int = 0) -> bool:
        self._steps += 1
        if depth > MAX_DEPTH or self._steps > MAX_STEPS:
            return False
        if one is False or other is False:
            return True
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        for schema, against in ((one, other), (other, one)):
            if "$ref" in schema:  # what stands beside it counts in some drafts only
                return any(self.apart(target, against, depth + 1) for target in self._target(schema["$ref"]))
        return (
            self._parts_apart(one, other, depth)
            or self._parts_apart(other, one, depth)
            or not _types(one) & _types(other)
            or self._values_apart(one, other)
            or self._values_apart(other, one)
            or self._shapes_apart(one, other, depth)
        )

    def _parts_apart(self, one: dict[str, Any], other: Any, depth: int) -> bool:
        """Whether one of the schemas that `one` is made of excludes `other`."""
        if any(self.apart(part, other, depth + 1) for part in _list(one.get("allOf"))):
            return True
        unions = [_list(one.get(key)) for key in ("anyOf", "oneOf")]
        return any(union and all(self.apart(part, other, depth + 1) for part in union) for union in unions)

    def _target(self, reference: Any) -> Iterator[Any]:
        if not (isinstance(reference, str) and reference.startswith("#/")):
            return
        found: Any = self._root
        for part in reference[2:].split("/"):
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if not (isinstance(found, dict) and name in found):
                return
            found = found[name]
        yield found

    def _values_apart(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether `one` has only a few values, none of which `other` takes."""
        values = _values(one)
        if values is None:
            return False
        others = _values(other)
        return all((others is not None and not _has(others, value)) or not _takes(other, value) for value in values)

    def _shapes_apart(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether, for each type that both have, sizes, first letters, required properties or items differ."""
        return all(self._shape_apart(kind, one, other, depth) for kind in _types(one) & _types(other))

    def _shape_apart(self, kind: str, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        if kind in ("integer", "number"):
            return _ranges_apart(_number_range(one), _number_range(other))
        if kind not in SIZES:
            return False
        _, low, high = SIZES[kind]
        if _ranges_apart(_range(one, low, high), _range(other, low, high)):
            return True
        if kind == "string":
            first, second = _start(one), _start(other)
            return not (first.startswith(second) or second.startswith(first))
        if kind == "array":
            count = int(min(_range(one, low, high)[0][0], _range(other, low, high)[0][0], MAX_ITEMS))
            return any(self.apart(_item(one, i), _item(other, i), depth + 1) for i in range(count))
        return self._objects_apart(one, other, depth) or self._objects_apart(other, one, depth)

    def _objects_apart(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether a property that `one` requires is forbidden in `other`, or required with another value."""
        ours, theirs = one.get("properties") or {}, other.get("properties") or {}
        closed = other.get("additionalProperties") is False and not other.get("patternProperties")
        if not (isinstance(ours, dict) and isinstance(theirs, dict)):
            return False
        for name in _list(one.get("required")):
            if not isinstance(name, str):
                return False
            if closed and name not in theirs:
                return True
            if name in ours and name in theirs and self.apart(ours[name], theirs[name], depth + 1):
                return True
        return False


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that a valid document may have; "number" stands beside "integer"."""
    values = _values(schema)
    if values is not None:
        return frozenset(name for value in values for name in _type(value))
    given = schema.get("type")
    names = {given} if isinstance(given, str) else set(_list(given)) if given is not None else None
    if names is None or not all(isinstance(name, str) for name in names):
        return frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
    return frozenset(names | ({"integer"} if "number" in names else set()))


def _type(value: Any) -> tuple[str, ...]:
    if value is None or isinstance(value, bool):
        return ("null",) if value is None else ("boolean",)
    if isinstance(value, int | float):
        return ("integer", "number") if value == math.floor(value) else ("number",)
    return ("string",) if isinstance(value, str) else ("array",) if isinstance(value, list) else ("object",)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """All that `const` or `enum` allow; None where neither is there."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _takes(schema: Mapping[str, Any], value: Any) -> bool:
    """False where `schema` cannot take `value`, for its type or its size."""
    kinds = _type(value)
    if not _types(schema) & set(kinds):
        return False
    if kinds[-1] in SIZES:
        size, low, high = SIZES[kinds[-1]]
        return not _ranges_apart(_range(schema, low, high), _only(size(value)))
    return kinds[-1] != "number" or not _ranges_apart(_number_range(schema), _only(value))


def _has(values: list[Any], value: Any) -> bool:
    """JSON's equality: numbers by value, and true is not 1."""
    return any(_plain(other) == _plain(value) for other in values)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _start(schema: Mapping[str, Any]) -> str:
    """What every text that fits `pattern` begins with, as far as it is plain to see."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or "|" in pattern:
        return ""
    found = _LITERAL_START.match(pattern)
    if found is None:
        return ""
    letters: list[str] = re.findall(r"\\?(.)", found[1], re.DOTALL)
    if pattern[found.end() : found.end() + 1] in ("?", "*", "+", "{"):  # it is the last letter's
        del letters[-1:]
    return "".join(letters)


def _item(schema: Mapping[str, Any], place: int) -> Any:
    first = _list(schema.get("prefixItems"))
    return first[place] if place < len(first) else schema.get("items", True)


def _range(schema: Mapping[str, Any], low: str, high: str) -> Range:
    return (_number(schema.get(low), 0), 0), (_number(schema.get(high), math.inf), 0)


def _number_range(schema: Mapping[str, Any]) -> Range:
    low = max((_number(schema.get(name), -math.inf), beyond) for beyond, name in enumerate(("minimum", EXCLUSIVE[0])))
    high = min((_number(schema.get(name), math.inf), -beyond) for beyond, name in enumerate(("maximum", EXCLUSIVE[1])))
    return low, high


def _only(value: float) -> Range:
    return (value, 0), (value, 0)


def _ranges_apart(one: Range, other: Range) -> bool:
    return one[1] < other[0] or other[1] < one[0]


def _number(value: Any, otherwise: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
