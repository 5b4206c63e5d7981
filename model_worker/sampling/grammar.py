"""Grammars of the llguidance library at work on a rank: which tokens may come next, given those that have come.

All that costs time is done in `Grammar.fill`, so that its caller can choose the thread. The library's tables of the
tokenizer (0.8 s and 80 MB with Qwen3's vocabulary) are made when the first grammar needs them.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vibe_sgl_lite.runtime.text.grammar import first_line, make_matcher

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)


class GrammarLibrary:
    """The library's view of a tokenizer. vocab_size: of the model. end_token_ids: what may follow a whole output."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, end_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self._file = tokenizer_file
        self._tokenizer: LLTokenizer | None = None

    @property
    def tokenizer(self) -> "LLTokenizer":
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            text = self._file.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=self.vocab_size, eos_token=list(self.end_token_ids))
        return self._tokenizer


class Grammar:
    """One output on its way through its grammar. error: why it can go no further; then only its end is allowed."""

    def __init__(self, library: GrammarLibrary, text: str) -> None:
        self.error: str | None = None
        self._library = library
        self._text = text
        self._matcher: LLMatcher | None = None
        self._tokens: list[int] = []  # drawn, but not told to the matcher yet

    def follow(self, token: int) -> None:
        """`token`, no end token, was drawn."""
        self._tokens.append(token)

    def fill(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Set True in `allowed`, [vocabulary], what may come next; an end token where the output may be whole."""
        if self._matcher is None:
            self._matcher = make_matcher(self._library.tokenizer, self._text)
        if self._tokens:
            self._matcher.consume_tokens(self._tokens)
            self._tokens.clear()
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed |= np.unpackbits(bits, bitorder="little")[: len(allowed)].view(np.bool_)
        if self._matcher.is_error():
            if self.error is None:
                self.error = first_line(self._matcher.get_error())
                log.error("a grammar cannot be followed any further: %s", self.error)
            allowed[list(self._library.end_token_ids)] = True
