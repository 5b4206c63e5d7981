"""Grammars of the llguidance library at work on a rank: which tokens may come next, given those that have come.

All that costs time is done in `Grammar.fill`, so that its caller can choose the thread. The library's tables of the
tokenizer (1 s and 80 MB with Qwen3's vocabulary) are made when the first grammar needs them. What a mask may cost is
bounded by counting (runtime/text/grammar.py), so that all ranks give up at the same token.
"""

import copy
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vibe_sgl_lite.runtime.text.grammar import first_line, make_matcher, make_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED = 32  # grammars that samples and later requests begin with

log = logging.getLogger(__name__)


class GrammarLibrary:
    """The library's view of a tokenizer, and matchers made with it.

    tokenizer_file: a tokenizer.json. vocab_size: of the model. end_token_ids: what may follow a whole output.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, end_token_ids: tuple[int, ...]) -> None:
        self.end_token_ids = end_token_ids
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._made: OrderedDict[str, _Made] = OrderedDict()

    def matcher(self, grammar: str) -> "LLMatcher":
        """One at its beginning. Each grammar is compiled once: copies share what the library learns of it."""
        with self._lock:
            if self._tokenizer is None:
                text = self._file.read_text(encoding="utf-8")
                self._tokenizer = make_tokenizer(text, self._vocab_size, self.end_token_ids)
            made = self._made.setdefault(grammar, _Made())
            self._made.move_to_end(grammar)
            if len(self._made) > CACHED:
                self._made.popitem(last=False)
        with made.lock:  # its own: others do not wait while this one is compiled
            if made.matcher is None:
                made.matcher = make_matcher(self._tokenizer, grammar)
            return made.matcher.deep_copy()


class _Made:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.matcher: LLMatcher | None = None


class Grammar:
    """One output on its way through its grammar. error: why it can go no further; then only its end is allowed."""

    def __init__(self, library: GrammarLibrary, text: str) -> None:
        self.error: str | None = None
        self._library = library
        self._text = text
        self._matcher: LLMatcher | None = None
        self._tokens: list[int] = []  # drawn, but not told to the matcher yet

    def copy(self) -> "Grammar":
        """One that goes its own way from here."""
        other = copy.copy(self)
        other._matcher = None if self._matcher is None else self._matcher.deep_copy()
        other._tokens = self._tokens.copy()
        return other

    def follow(self, token: int) -> None:
        """`token`, no end token, was drawn."""
        self._tokens.append(token)

    def prepare(self) -> None:
        """Compile the grammar, ahead of the first mask; what goes wrong is found again by `fill`."""
        self._library.matcher(self._text)

    def fill(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Set True in `allowed`, [vocabulary], what may come next; an end token where the output may be whole."""
        if self._matcher is None:
            self._matcher = self._library.matcher(self._text)
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
