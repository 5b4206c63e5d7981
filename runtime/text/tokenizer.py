"""Token ids to text and plain text to token ids, over the `tokenizers` library: all that the detokenizer needs.

Chats, and what a model folder says besides tokenizer.json, are `chat_tokenizer.py`'s. Knows nothing of requests,
streams or sockets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from vibe_sgl_lite.runtime.errors import RequestError, TokenizerError


class Tokenizer:
    """Safe to use from several threads once built.

    vocab_size: one more than the highest id that has a token, if the model's own vocabulary has no gaps (a look
    through all of it would take 0.1 s). special_ids: ids that `skip_special_tokens` leaves out.
    byte_level: ids stand for bytes of UTF-8 (GPT-2's alphabet), as in every Qwen3 checkpoint.
    """

    def __init__(self, backend: Backend, *, source: str = "tokenizer") -> None:
        """`source` names the tokenizer in errors. Raises TokenizerError for one that cannot turn ids into text."""
        if backend.decoder is None:
            raise TokenizerError(f"{source}: the tokenizer has no decoder, so ids cannot become text: repair its files")
        self._backend = backend
        self._source = source
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added), 0)
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_level: bool = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises TokenizerError naming the file."""
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {error}; download the file again") from error
        return cls(backend, source=str(path))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds the begin and end tokens that the model asks for, if any.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        try:
            # The batch call lets other threads run meanwhile; `encode` holds the interpreter lock throughout.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:
            raise RequestError("the text holds a lone surrogate, which is not Unicode", field="prompt") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids` in one go; bytes that form no character become U+FFFD, ids without a token nothing."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, in the tokenizer's own alphabet; None for an id that has no token."""
        if not 0 <= token_id < 2**31:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry in the tokenizer's own alphabet, such as an added token; None for no entry."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def write_json(self, path: Path) -> None:
        """Write what `from_file` reads; the file is there whole or not at all."""
        part = path.with_suffix(f".{os.getpid()}.part")
        self._backend.save(str(part), pretty=False)
        part.rename(path)
