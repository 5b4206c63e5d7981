"""One slot's grammar and thinking budget at work: what its tokens so far allow as its next one."""

import copy
import logging
from collections import deque
from concurrent.futures import Future
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from vibe_sgl_lite.model_worker.sampling.grammar import Grammar
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, ThinkingRules

log = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]


class _Phase(Enum):
    START = auto()  # a thinking block may begin with the next token
    THINKING = auto()
    OUTPUT = auto()  # the grammar holds, if there is one
    ENDED = auto()  # an end token was drawn; what follows is thrown away


class SlotConstraint:
    """One slot's state. grammar: None for a thinking budget alone. error: why it can go no further, once it cannot.
    forbidden: [vocabulary], for the next token, where it is done or under way. drawn: tokens accepted so far."""

    def __init__(self, sampling: ResolvedSampling, grammar: Grammar | None) -> None:
        self.grammar = grammar
        self.forbidden: Future[BoolArray | None] | None = None
        self.error: str | None = None
        self.drawn = 0
        self._ends = {*sampling.end_token_ids, *sampling.stop_token_ids}
        self._thinking = sampling.thinking
        self._forced: deque[int] = deque()
        self._spent = 0
        if sampling.thinking is None:
            self._phase = _Phase.OUTPUT
        elif sampling.thinking.inside:
            self._phase = _Phase.THINKING
            self._spend(sampling.thinking, 0)
        else:
            self._phase = _Phase.START

    @property
    def is_free(self) -> bool:
        """Any token may come next."""
        if self._forced:
            return False
        return self.grammar is None or self._phase is _Phase.ENDED

    @property
    def is_quick(self) -> bool:
        """The grammar is not asked."""
        return bool(self._forced) or self._phase is _Phase.THINKING

    def copy(self) -> "SlotConstraint":
        """One that goes its own way from here."""
        other = copy.copy(self)
        other.forbidden = None
        other._forced = self._forced.copy()
        other.grammar = None if self.grammar is None else self.grammar.copy()
        return other

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        thinking, self.forbidden = self._thinking, None
        self.drawn += 1
        if self._phase is _Phase.ENDED:
            return
        if self._forced:
            self._forced.popleft()
            if thinking is not None and token == thinking.end:
                self._phase = _Phase.OUTPUT
        elif thinking is not None and self._phase is _Phase.START and token == thinking.start:
            self._phase = _Phase.THINKING
            self._spend(thinking, 0)
        elif thinking is not None and self._phase is _Phase.THINKING:
            if token == thinking.end:
                self._phase = _Phase.OUTPUT
                if self.grammar is not None:
                    self._forced.extend(thinking.tail)
            elif token in self._ends:
                self._phase = _Phase.ENDED
            else:
                self._spend(thinking, 1)
        else:
            self._phase = _Phase.ENDED if token in self._ends else _Phase.OUTPUT
            if self.grammar is not None and self._phase is _Phase.OUTPUT:
                self.grammar.follow(token)

    def fill(self, allowed: BoolArray) -> None:
        """Write which tokens may come next, [vocabulary]; all False before. Not to be called when `is_free`.

        Whatever goes wrong in the grammar is this slot's `error`, not the rank's; then anything may come.
        """
        try:
            self._fill(allowed)
        except BaseException as error:  # a panic of the library is no Exception
            log.exception("a mask could not be made")
            self.error = f"{type(error).__name__}: {error}"
            allowed[:] = True
        if self.grammar is not None and self.grammar.error is not None:
            self.error = self.grammar.error

    def _fill(self, allowed: BoolArray) -> None:
        if self._forced:
            allowed[self._forced[0]] = True
            return
        assert self.grammar is not None
        if self._phase is _Phase.THINKING:
            allowed[:] = True  # the block must be closed before the output can end
            allowed[list(self._ends)] = False
            return
        self.grammar.fill(allowed)
        if self._thinking is not None and self._phase is _Phase.START:
            allowed[self._thinking.start] = True

    def _spend(self, thinking: ThinkingRules, tokens: int) -> None:
        self._spent += tokens
        if thinking.limit is not None and self._spent >= thinking.limit:
            self._forced.extend(thinking.close)
