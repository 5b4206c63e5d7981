"""A JSON file of a model folder, whose values are taken by tables of fields; errors name file, field and value."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vibe_sgl_lite.runtime.errors import UserError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.schema import Unfit, shown, table

_OTHERWISE = re.compile(r"[-+.\d]+(e[-+]?\d+)?|true|false|null|nan|[-+]?inf(inity)?|\s+", re.IGNORECASE)
S = TypeVar("S", bound=msgspec.Struct)

log = logging.getLogger(__name__)


class JsonFile:
    """kind: the error to raise. values: the file's, or a part of them."""

    def __init__(self, path: Path, values: Mapping[str, Any], kind: type[UserError]) -> None:
        self.path = path
        self.values = values
        self._kind = kind

    @classmethod
    def read(cls, path: Path, kind: type[UserError]) -> JsonFile:
        """Raises `kind` where it is no JSON object."""
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise kind(f"{path} cannot be read as JSON: {one_line(error)}; download the file again") from error
        if not isinstance(values, dict):
            raise kind(f"{path} must hold a JSON object, not {type(values).__name__}; download the file again")
        return cls(path, values, kind)

    @classmethod
    def read_if_there(cls, path: Path, kind: type[UserError]) -> JsonFile:
        """Without values where there is no such file."""
        return cls.read(path, kind) if path.is_file() else cls(path, {}, kind)

    def part(self, values: Mapping[str, Any]) -> JsonFile:
        """Values within this file's, for `take` and `make`."""
        return JsonFile(self.path, values, self._kind)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def error(self, key: str, value: object, problem: str) -> UserError:
        """Texts that could be taken for something else are quoted: "2" is no whole number."""
        quoted = isinstance(value, str) and (not value or _OTHERWISE.fullmatch(value))
        return self._kind(f"{self.path}: {key}={json.dumps(value) if quoted else shown(value)} {problem}", field=key)

    def missing(self, key: str, why: str) -> UserError:
        return self._kind(f"{self.path}: {key} is missing; {why}", field=key)

    def take(self, struct: type[msgspec.Struct], names: list[str] | None = None) -> dict[str, Any]:
        """The values of `struct`'s fields, or of those called `names`, that the file has and that are not null."""
        taken: dict[str, Any] = {}
        for name, field in table(struct).items():
            key = next((key for key in (name, *field.spec.aliases) if self.get(key) is not None), None)
            if key is None or (names is not None and name not in names):
                continue
            try:
                taken[name] = field.take(self.values[key])
            except Unfit as unfit:
                raise self.error(key, self.values[key], unfit.problem) from None
        return taken

    def make(self, struct: type[S], values: Mapping[str, Any]) -> S:
        """A `struct` of `values`; raises for what is missing."""
        for info in msgspec.structs.fields(struct):
            if info.required and info.name not in values:
                raise self.missing(info.name, "the model cannot be built without it")
        return struct(**values)

    def warn_of_others(self, known: set[str]) -> None:
        others = sorted(key for key, value in self.values.items() if key not in known and value is not None)
        if others:
            log.warning("%s: not known and not used: %s", self.path, one_line(", ".join(others))[:500])
