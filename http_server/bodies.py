"""From a request's bytes to its typed fields. `null` means absent; what is unknown is taken, logged once and counted;
what is known, not supported and would change the output is refused by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import TypeVar

import msgspec

from vibe_sgl_lite.http_server.errors import bad_request
from vibe_sgl_lite.http_server.metrics import Metrics
from vibe_sgl_lite.http_server.openai_types import INSTEAD

T = TypeVar("T", bound=msgspec.Struct)

MAX_UNKNOWN_NAMES = 64  # counted under their own names; clients may make up any number
OFF: tuple[object, ...] = (None, False, [], {}, "")  # asks for nothing

log = logging.getLogger(__name__)


class BodyReader:
    def __init__(self, metrics: Metrics) -> None:
        self._counts = metrics.unknown_fields

    def read(
        self,
        body: bytes,
        kind: type[T],
        refused: Mapping[str, tuple[object, ...]],
        ignored: Collection[str] = (),
        *,
        strict: bool = False,
    ) -> T:
        """Raises ApiError naming the field.

        refused: fields that are not supported, with values besides OFF that ask for nothing. ignored: fields that
        change nothing of the output, by their nature. strict: refuse unknown fields too.
        """
        try:
            fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise bad_request(f"the body must be a JSON object: {error}", code="invalid_json") from error
        known = kind.__struct_encode_fields__
        for name, raw in fields.items():
            if name in known or name in ignored:
                continue
            if name not in refused:
                if strict:
                    raise bad_request(f"{name:.80} is no field of this call", name[:80], "unknown_parameter")
                self._note_unknown(name)
            elif not _asks_for_nothing(raw, name, refused[name]):
                told = f"use {INSTEAD[name]}" if name in INSTEAD else "leave it out"
                raise bad_request(f"{name} is not supported: {told}", name, "unsupported_parameter")
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
            found = re.search(r"`\$\.(\w+)", str(error))
            raise bad_request(str(error), found[1] if found else None, "invalid_type") from error

    def _note_unknown(self, name: str) -> None:
        if name not in self._counts:
            if len(self._counts) >= MAX_UNKNOWN_NAMES:
                name = "(others)"
            else:
                log.warning("unknown field %.80r in a request's body; such fields change nothing", name)
        self._counts[name] = self._counts.get(name, 0) + 1


def _asks_for_nothing(raw: msgspec.Raw, name: str, nothing: Collection[object]) -> bool:
    """Raises ApiError for what is no value: texts and numbers were not looked into so far."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_request(f"{name}: {error}", name, "invalid_json") from error
    return value in OFF or value in nothing
