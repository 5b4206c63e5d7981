"""Token ids of one sample to text, as they come: joined, the pieces equal the one-shot decode of all ids.

Two ways to the same text:

- `ByteStream`, for byte-level vocabularies (every Qwen3 checkpoint): each token stands for some bytes of UTF-8, so a
  stateless UTF-8 decoder that keeps an unfinished character (3 bytes at most) back is exact for any id sequence, and a
  token costs one table look-up.
- `WindowStream`, for any other tokenizer: decode(ids[surr:]) minus decode(ids[surr:read]), held back while it ends in
  U+FFFD. The window is a few tokens long, whatever the length of the sample.

Knows nothing of stop strings and of messages.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8  # an unfinished character is 4 byte tokens at most; more than this is not going to be one


class TextStream(Protocol):
    """Incremental text of one sample."""

    def add(self, ids: Sequence[int]) -> str:
        """Text that the next ids bring; what may still change is kept back."""

    def flush(self) -> str:
        """What was kept back, as it is now. Nothing is added afterwards."""


class Vocabulary:
    """Text of single tokens, and a `TextStream` for each sample. Not thread-safe (tables fill as ids come up)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._all = _TokenBytes(tokenizer, frozenset())
        self._plain = _TokenBytes(tokenizer, tokenizer.special_ids)

    def open(self, skip_special_tokens: bool) -> TextStream:
        if self._tokenizer.byte_level:
            return ByteStream(self._plain if skip_special_tokens else self._all)
        return WindowStream(self._tokenizer, skip_special_tokens)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that stands for `text`."""
        token_id = self._tokenizer.token_id(text)
        return token_id if token_id in self._tokenizer.special_ids else None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._tokenizer.special_ids

    def text(self, token_id: int) -> str:
        """Text of one token on its own, special ones too; "" for an id without a token."""
        if self._tokenizer.byte_level:
            return self._all[token_id].decode("utf-8", "replace")
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class ByteStream:
    def __init__(self, table: _TokenBytes) -> None:
        self._table = table
        self._pending = b""

    def add(self, ids: Sequence[int]) -> str:
        data = self._pending
        table = self._table
        for token_id in ids:
            data += table[token_id]
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text


class WindowStream:
    """`_ids` is ids[surr:], `_read` how many of them are already in the text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._read = 0

    def add(self, ids: Sequence[int]) -> str:
        pieces = []
        for token_id in ids:
            # Ids without text never enter the window, so that a run of them cannot make it grow.
            if token_id not in self._skipped and self._tokenizer.token(token_id) is not None:
                self._ids.append(token_id)
                pieces.append(self._advance(len(self._ids) - self._read > MAX_HELD_TOKENS))
        return "".join(pieces)

    def flush(self) -> str:
        return self._advance(True)

    def _advance(self, whatever_it_is: bool) -> str:
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and not whatever_it_is:
            return ""
        shown = self._decode(self._ids[: self._read])
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(shown) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _TokenBytes(dict[int, bytes]):
    """Bytes of each token, worked out when first asked for; b"" for `skipped` ids and for ids without a token."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._bytes_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        if token is None:
            data = b""
        elif all(character in self._bytes_of for character in token):
            data = bytes(map(self._bytes_of.__getitem__, token))
        else:
            data = (
                token.encode()
            )  # an added token with characters that are no letters of the alphabet stands for itself
        self[token_id] = data
        return data


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}
