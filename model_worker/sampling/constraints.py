"""What a slot's tokens so far allow as its next one: a spent thinking budget forces the block's end, a grammar masks.

The state lives per slot on every rank: each follows the same tokens, so all mask alike. It depends on the last token,
which the host has when a step is done; what the grammar library computes for the next step runs in threads while the
forward does, and is waited for only before sampling, only by steps with such rows. A grammar is compiled in a thread
from its row's admission on. Rows without constraints, and steps without such rows, pay nothing.

A mask that takes longer than the forward, and as long again, is late: rank 0 says so to the others, the row yields no
token in this step, and its mask goes on being made for the next one. So no grammar holds up other rows for long.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vibe_sgl_lite.model_worker.device import CpuDevice, Device
from vibe_sgl_lite.model_worker.sampling.grammar import Grammar, GrammarLibrary
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, ThinkingRules

log = logging.getLogger(__name__)

THREADS = 4
PATIENCE_S = 0.005  # with masks, at least, once the forward is done; where that took longer, as long as it did
ALONE_S = 0.1  # where every row of the step waits for its mask
STACK_BYTES = 64 * 1024**2  # address space; grammars were tried out with the usual 8 MiB

BoolArray = npt.NDArray[np.bool_]


class _Phase(Enum):
    START = auto()  # a thinking block may begin with the next token
    THINKING = auto()
    OUTPUT = auto()  # the grammar holds, if there is one
    ENDED = auto()  # an end token was drawn; what follows is thrown away


class SlotConstraint:
    """One slot's state. grammar: None for a thinking budget alone. error: why it can go no further, once it cannot.
    forbidden: [vocabulary], for the next token, where it is done or under way."""

    def __init__(self, sampling: ResolvedSampling, grammar: Grammar | None) -> None:
        self.grammar = grammar
        self.forbidden: Future[BoolArray] | None = None
        self.error: str | None = None
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

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        thinking, self.forbidden = self._thinking, None
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


@dataclass
class StepMask:
    """Of one step: `rows` of its sampling rows are masked. late: those of them that yield nothing, after `settle`.
    failed: those whose constraint has an error, after `apply`."""

    rows: list[int]
    vocab: slice
    forbidden: "list[Future[BoolArray]]"  # [vocabulary] of each row
    constraints: list[SlotConstraint]
    device: Device
    late: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def settle(self, group: Group, patience_s: float, *, alone: bool) -> None:
        """Wait for the masks, but not for ever: what rank 0 of `group`, all of which call this, finds late is `late`.

        alone: no other row is in the step, so one mask at least may take longer.
        """
        late = np.zeros(len(self.rows), dtype=np.int32)
        if group.rank == 0:
            done = wait(self.forbidden, max(PATIENCE_S, patience_s)).done
            if alone and not done:
                done = wait(self.forbidden, ALONE_S, FIRST_COMPLETED).done
            late[:] = [future not in done for future in self.forbidden]
        if group.size > 1:
            late = group.all_reduce_max(self.device.tensor(late)).cpu().numpy()
        self.late = [row for row, is_late in zip(self.rows, late.tolist(), strict=True) if is_late]

    def apply(self, logits: Tensor) -> None:
        """logits [sampling rows, local vocabulary]: -inf where a token is not allowed, in place, but for late rows."""
        kept = [place for place, row in enumerate(self.rows) if row not in self.late]
        if not kept:
            return
        forbidden = self.device.tensor(np.stack([self.forbidden[place].result()[self.vocab] for place in kept]))
        if len(kept) == len(logits):
            logits.masked_fill_(forbidden, float("-inf"))
        else:
            rows = self.device.tensor(np.array([self.rows[place] for place in kept]))
            logits[rows] = logits[rows].masked_fill_(forbidden, float("-inf"))
        self.failed = [self.rows[place] for place in kept if self.constraints[place].error is not None]


Constrained = list[tuple[int, SlotConstraint]]  # (sampling row, its constraint)


class Constraints:
    """Constraints of all slots of a rank. vocab: this rank's range of a vocabulary of `vocab_size` ids."""

    def __init__(
        self, vocab_size: int, vocab: slice, library: GrammarLibrary | None, device: Device | None = None
    ) -> None:
        self._device = device or CpuDevice()
        self._vocab_size = vocab_size
        self._vocab = vocab
        self._library = library
        self._slots: dict[int, SlotConstraint] = {}
        self._threads: ThreadPoolExecutor | None = None

    def admit(self, slot: int, sampling: ResolvedSampling, generated: Iterable[int]) -> None:
        """A row comes to `slot`; generated: the tokens that it had drawn before a retraction."""
        self._slots.pop(slot, None)
        if sampling.grammar is None and sampling.thinking is None:
            return
        grammar = None
        if sampling.grammar is not None:
            assert self._library is not None, "a grammar came to a rank without a tokenizer"
            grammar = Grammar(self._library, sampling.grammar)
        constraint = self._slots[slot] = SlotConstraint(sampling, grammar)
        for token in generated:
            constraint.accept(token)
        if grammar is not None:
            self._pool().submit(grammar.prepare)

    def release(self, slot: int) -> None:
        """The slot is free; releasing a free one is no error."""
        self._slots.pop(slot, None)

    def of(self, slots: npt.NDArray[np.int64]) -> Constrained:
        """The constraints of a step that samples these slots, in order. Whoever has them tells them what was drawn."""
        if not self._slots:
            return []
        found = [(row, self._slots.get(slot)) for row, slot in enumerate(slots.tolist())]
        return [(row, constraint) for row, constraint in found if constraint is not None]

    def begin(self, constrained: Constrained) -> StepMask | None:
        """Start to compute the mask of a step, when these know all tokens before it; None if all may draw freely."""
        masked = [(row, constraint) for row, constraint in constrained if not constraint.is_free]
        if not masked:
            return None
        constraints = [constraint for _, constraint in masked]
        forbidden = []
        for constraint in constraints:
            if constraint.forbidden is None and constraint.is_quick:
                constraint.forbidden = Future()
                constraint.forbidden.set_result(self._forbidden(constraint))
            elif constraint.forbidden is None:
                constraint.forbidden = self._pool().submit(self._forbidden, constraint)
            forbidden.append(constraint.forbidden)
        return StepMask([row for row, _ in masked], self._vocab, forbidden, constraints, self._device)

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            before = threading.stack_size(STACK_BYTES)
            self._threads = ThreadPoolExecutor(THREADS, "masks")
            for ready in [self._threads.submit(threading.get_ident) for _ in range(THREADS)]:
                ready.result()
            threading.stack_size(before)
        return self._threads

    def _forbidden(self, constraint: SlotConstraint) -> BoolArray:
        """[vocabulary]; in a thread, unless it is quick."""
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        constraint.fill(allowed)
        return np.logical_not(allowed, out=allowed)
