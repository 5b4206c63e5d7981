"""Fields described once: what each may be, what it means, and how a wrong value is refused.

What people set is a `msgspec.Struct` whose annotations carry a `Spec`:

    class ServerArgs(msgspec.Struct):
        page_size: Annotated[int, Spec("a page of the KV cache", unit="tokens", low=1, high=4096)] = 16

Checks, errors, `--help` (runtime/settings/cli.py) and the tables of the documentation (docs/tables.py) come from it.
Values of other libraries (numpy's scalars and arrays, subclasses of int and str) are taken where they convert exactly.
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
import os
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from vibe_sgl_lite.runtime.settings.elsewhere import ABSENT

SHOWN_CHARS = 80  # of a wrong value, in its error


class Spec(msgspec.Struct, frozen=True):
    """One field, beside its type and its default.

    help: what it means, in Markdown; more: what only the documentation says; group: its section there.
    default: what stands in where the struct's own default is UNSET. unset: what None stands for, in words.
    low, high: of a number, or of each number in a container; above_low: `low` itself is not allowed; also: numbers that
    are allowed beside these. items: most entries. chars: most characters of a text, which must then not be empty.
    check: called with the converted value; raises. path: `os.PathLike` is taken too. allowed: the range, in words.
    aliases: what other engines call the same; like: what they call something close to it. values: their words for the
    choices, each with ours.
    """

    help: str
    more: str = ""
    group: str = ""
    default: Any = UNSET
    unit: str = ""
    unset: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    also: tuple[float, ...] = ()
    items: int | None = None
    chars: int | None = None
    check: Callable[[Any], None] | None = None
    path: bool = False
    allowed: str = ""
    aliases: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()


class Unfit(ValueError):
    """A value that a field does not take. value: as it may be shown; problem: `must be ...`."""

    def __init__(self, value: object, problem: str) -> None:
        self.value = shown(value)
        super().__init__(f"{self.value} {problem}")
        self.problem = problem


class Field(msgspec.Struct, frozen=True):
    """kinds: int, float, bool, str, list[int], list[str], dict[int, float]; more than one where any of them will do."""

    name: str
    kinds: tuple[Any, ...]
    optional: bool
    default: Any
    spec: Spec

    def take(self, value: Any) -> Any:
        """The value as plain int, float, bool, str, tuple or dict; raises Unfit."""
        if value is None and self.optional:
            return None
        if type(value) not in (int, float, bool, str):
            value = plain(value)
        spec, kind = self.spec, self.kinds[-1]
        if kind == list[str]:
            words = "a text or a list of texts" if str in self.kinds else "a list of texts"
            taken: Any = self._items(value, str, words)
        elif kind == list[int]:
            taken = self._items(value, int, "a list of token ids")
        elif kind == dict[int, float]:
            taken = self._numbers_by_id(value)
        elif kind is str:
            taken = self._text(value)
        elif kind is bool:
            more = f"; {self.range_words}" if spec.allowed else ""
            taken = value if isinstance(value, bool) else _refuse(value, f"must be true or false{more}")
        else:
            taken = self._in_range(_whole(value) if kind is int else _number(value))
        if spec.check is not None:
            spec.check(taken)
        return taken

    @property
    def unset_by_none(self) -> bool:
        """Whether None is as if the field were left out: it may be, and None has no meaning of its own."""
        return self.spec.default is not UNSET and not self.optional

    @property
    def range_words(self) -> str:
        """`at least 1 and at most 1024 (ranks)`."""
        spec = self.spec
        if spec.allowed:
            return spec.allowed.replace("`", "")
        low = None if spec.low is None else f"{'above' if spec.above_low else 'at least'} {_shown_number(spec.low)}"
        high = None if spec.high is None else f"at most {_shown_number(spec.high)}"
        return " and ".join(filter(None, (low, high))) + (f" ({spec.unit})" if spec.unit else "")

    def _in_range(self, value: float) -> float:
        spec = self.spec
        low = spec.low is None or (value > spec.low if spec.above_low else value >= spec.low)
        if (low and (spec.high is None or value <= spec.high)) or value in spec.also:
            return value
        return _refuse(value, f"must be {self.range_words}")

    def _text(self, value: Any) -> str:
        spec = self.spec
        if spec.path and isinstance(value, os.PathLike):
            value = os.fsdecode(value)
        text = _text(value)
        text = dict(spec.values).get(text, text)
        if spec.choices and text not in spec.choices:
            _refuse(
                text, f"must be one of {', '.join(spec.choices)}" + (f"; {self.range_words}" if spec.allowed else "")
            )
        if spec.chars is not None and not 0 < len(text) <= spec.chars:
            _refuse(text, f"must have 1 to {spec.chars} characters, not {len(text)}")
        return text

    def _items(self, value: Any, kind: type, words: str) -> tuple[Any, ...]:
        if isinstance(value, str) and str in self.kinds:
            value = (value,)
        if not is_list(value):
            _refuse(value, f"must be {words}")
        if self.spec.items is not None and len(value) > self.spec.items:
            _refuse(f"{len(value)} entries", f"may have at most {self.spec.items}")
        try:
            return tuple(self._text(item) if kind is str else self._in_range(_whole(item)) for item in value)
        except Unfit as error:
            _refuse(error.value, f"{error.problem}; the field takes {words}")

    def _numbers_by_id(self, value: Any) -> dict[int, float]:
        most = self.spec.items
        if not isinstance(value, Mapping):
            _refuse(value, "must be a dict of token ids and numbers")
        if most is not None and len(value) > most:
            _refuse(f"{len(value)} entries", f"may have at most {most}")
        try:
            ids = [
                int(key) if isinstance(key, str) and key.isdecimal() else _whole(key) for key in value
            ]  # JSON's keys
        except Unfit as error:
            _refuse(error.value, "must be a token id: keys are whole numbers")
        for key in ids:
            if not 0 <= key < 2**31:
                _refuse(key, "must be a token id, from 0 to 2**31 - 1")
        return {key: self._in_range(_number(number)) for key, number in zip(ids, value.values(), strict=True)}


@functools.cache
def table(struct: type[msgspec.Struct]) -> Mapping[str, Field]:
    """The fields of `struct` that have a `Spec`, by name, in order."""
    fields = {}
    for info in msgspec.structs.fields(struct):
        if get_origin(info.type) is not Annotated:
            continue
        kind, *notes = get_args(info.type)
        spec = next((note for note in notes if isinstance(note, Spec)), None)
        if spec is None:
            continue
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        kinds = tuple(_kind(part) for part in parts if part not in (UnsetType, types.NoneType))
        default = info.default if spec.default is UNSET else spec.default
        fields[info.name] = Field(info.name, kinds, types.NoneType in parts, default, spec)
    return fields


def settle(struct: msgspec.Struct, refuse: Callable[[str, Unfit], Exception]) -> None:
    """Check every field that is set, and replace its value by the plain one; for `__post_init__`.

    refuse: the error to raise, from the field's name and what is wrong with it.
    """
    for name, field in table(type(struct)).items():
        value = getattr(struct, name)
        if value is UNSET:
            continue
        try:
            taken = UNSET if value is None and field.unset_by_none else field.take(value)
        except Unfit as problem:
            raise refuse(name, problem) from None
        if taken is not value:
            msgspec.structs.force_setattr(struct, name, taken)


def our_names(
    values: Mapping[str, Any], struct: type[msgspec.Struct], noun: str, error: Callable[..., Exception]
) -> dict[str, Any]:
    """`values` under the names of `struct`'s fields: dashes are underscores, aliases are taken.

    Raises `error(message, field=...)` for an unknown name and for a field that is named twice. noun: of a field.
    """
    fields = table(struct)
    aliases = {alias: name for name, field in fields.items() for alias in field.spec.aliases}
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name not in fields:
            known = f"known: {', '.join(fields)}"
            raise error(f"{key} is not a {noun}; {hint(name, fields) or known}", field=key)
        if name in named:
            raise error(f"{name} is set twice, under two names ({key} is one); keep one", field=key)
        named[name] = value
    return named


def hint(name: str, fields: Mapping[str, Field], spell: Callable[[str], str] = str) -> str | None:
    """What to say of an unknown name, if anything. spell: how a name is shown."""
    close = next((ours for ours, field in fields.items() if name in field.spec.like), None)
    if close is not None:
        return f"{spell(close)} is the nearest to it, but not the same"
    if name in ABSENT:
        return ABSENT[name]
    known = [*fields, *(alias for field in fields.values() for alias in field.spec.aliases)]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {spell(near[0])}?" if near else None


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def shown(value: object) -> str:
    """A wrong value for an error message, on one line and not longer than needed."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split("\n"))
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def plain(value: Any) -> Any:
    """numpy's and torch's scalars as Python's, their arrays as lists, torch's dtypes as their names; else as it is."""
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    dimensions = getattr(value, "ndim", None)
    if dimensions == 0 and hasattr(value, "item"):
        return value.item()
    if dimensions and hasattr(value, "tolist"):
        return value.tolist()
    return value


def _whole(value: Any) -> int:
    value = plain(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    return _refuse(value, "must be a whole number")


def _number(value: Any) -> float:
    """NaN and what is beyond a float come back as such: no range has them in it."""
    value = plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        _refuse(value, "must be a number")
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    if math.isfinite(number) and number != value:
        _refuse(value, "must be a number that a 64-bit float holds exactly")
    return number


def _text(value: Any) -> str:
    value = plain(value)
    if not isinstance(value, str):
        _refuse(value, "must be a text")
    text = str.__str__(value)  # of a subclass, too
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _refuse(text, f"must be Unicode text: its character {error.start} is half of a surrogate pair")
    return text


def _kind(annotation: Any) -> Any:
    if get_origin(annotation) is Sequence:
        return list[str] if get_args(annotation) == (str,) else list[int]
    return annotation


def _shown_number(value: float) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _refuse(value: object, problem: str) -> NoReturn:
    raise Unfit(value, problem)
