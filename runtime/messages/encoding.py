"""How clients' messages are checked and encoded where msgspec alone does not do."""

from __future__ import annotations

from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.messages.client import Generate
from vibe_sgl_lite.runtime.settings.schema import plain, settle

BIG_INT = 1  # msgpack's extension type of whole numbers beyond 64 bits, as decimal digits
MAX_DIGITS = 4300  # Python's own limit


def check_fields(message: Generate) -> None:
    """What the fields' specs say; values of other libraries become plain ones. Raises RequestError."""
    settle(message, lambda name, unfit: RequestError(f"{name}={unfit.value}: {unfit.problem}", field=name))


def encode_request(message: Generate) -> bytes:
    """Messages, tools and the like may hold other libraries' scalars and any whole number.

    Raises TypeError, ValueError, OverflowError or RecursionError for what cannot be sent.
    """
    try:
        return msgspec.msgpack.encode(message, enc_hook=_simple)
    except OverflowError:
        return encode_values(
            msgspec.structs.replace(
                message, messages=_mark_big(message.messages), template_kwargs=_mark_big(message.template_kwargs)
            )
        )


def encode_values(values: Any) -> bytes:
    """`values` as they are sent. Raises as `encode_request` does."""
    return msgspec.msgpack.encode(_mark_big(values), enc_hook=_simple)


def decode_extension(code: int, data: memoryview) -> int:
    """`ext_hook` of whoever decodes requests. Raises ValueError."""
    if code != BIG_INT or len(data) > MAX_DIGITS:
        raise ValueError(f"extension {code} of {len(data)} bytes is not known here")
    return int(bytes(data))


def _simple(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    simple = plain(value)
    if simple is value:
        raise TypeError(f"it holds a {type(value).__name__}")
    return simple


def _mark_big(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mark_big(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mark_big(inner) for inner in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(BIG_INT, str(value).encode())
    return value


def join_chunks(payloads: list[bytes]) -> bytes:
    """An encoded `Chunks` of encoded chunks, none of which is decoded for it."""
    return b"".join((_CHUNKS_HEAD, len(payloads).to_bytes(4, "big"), *payloads))


_CHUNKS_HEAD = b"\x92\xa6Chunks\xdd"  # a list of the tag and a list, whose length is in 4 bytes
