"""What a slot's tokens so far allow as its next one: a spent thinking budget forces the block's end, a grammar masks.

The state lives per slot on every rank: each follows the same tokens, so all mask alike. It depends on the last token,
which the host has when a step is done; what the grammar library computes for the next step runs in threads while the
forward does, and is waited for only before sampling, only by steps with such rows. A grammar is compiled in a thread
from its row's admission on. Rows without constraints, and steps without such rows, pay nothing.

A mask that takes longer than the forward, and as long again, is late: rank 0 says so to the others, the row yields no
token in this step, and its mask goes on being made for the next one. So no grammar holds up other rows for long.

A row with drafts has a mask for each of its places, made one after the other of a copy of its state that follows the
drafts; the state itself moves on only by the tokens that count. What follows a draft that is not allowed cannot hold:
those places have no mask and are treated as late, as are those of a row that still waits for its first one.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vibe_sgl_lite.model_worker.device import CpuDevice, Device
from vibe_sgl_lite.model_worker.sampling.grammar import Grammar, GrammarLibrary
from vibe_sgl_lite.model_worker.sampling.slot_constraint import BoolArray, SlotConstraint
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

THREADS = 4
PATIENCE_S = 0.005  # with masks, at least, once the forward is done; where that took longer, as long as it did
ALONE_S = 0.1  # where every row of the step waits for its mask
STACK_BYTES = 64 * 1024**2  # address space; grammars were tried out with the usual 8 MiB


@dataclass
class StepMask:
    """Of one step: `rows` of its sampled places are masked. late: those of them that yield nothing, after `settle`.
    failed: those whose constraint has an error, after `apply`."""

    rows: list[int]
    vocab: slice
    forbidden: "list[Future[BoolArray | None]]"  # [vocabulary] of each row; None where there is no mask
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
            late[:] = [future not in done or future.result() is None for future in self.forbidden]
        if group.size > 1:
            late = group.all_reduce_max(self.device.tensor(late)).cpu().numpy()
        self.late = [row for row, is_late in zip(self.rows, late.tolist(), strict=True) if is_late]

    def apply(self, logits: Tensor) -> None:
        """logits [sampling rows, local vocabulary]: -inf where a token is not allowed, in place, but for late rows."""
        kept = [place for place, row in enumerate(self.rows) if row not in self.late]
        if not kept:
            return
        masks = [mask[self.vocab] for place in kept if (mask := self.forbidden[place].result()) is not None]
        assert len(masks) == len(kept)
        forbidden = self.device.tensor(np.stack(masks))
        if len(kept) == len(logits):
            logits.masked_fill_(forbidden, float("-inf"))
        else:
            rows = self.device.tensor(np.array([self.rows[place] for place in kept]))
            logits[rows] = logits[rows].masked_fill_(forbidden, float("-inf"))
        self.failed = [self.rows[place] for place in kept if self.constraints[place].error is not None]


Constrained = list[tuple[int, SlotConstraint]]  # (the first place that a row samples, its constraint)


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
        """The constraints of a step that samples these slots, in order, one as often as its row has places. Whoever has
        them tells them what was drawn."""
        if not self._slots:
            return []
        firsts = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
        found = [(place, self._slots.get(slot)) for place, slot in zip(firsts, slots[firsts].tolist(), strict=True)]
        return [(place, constraint) for place, constraint in found if constraint is not None]

    def begin(self, constrained: Constrained, drafts: Mapping[int, Sequence[int]] = {}) -> StepMask | None:
        """Start to compute the masks of a step, when these know all tokens before it; None if all may draw freely.

        drafts: of the rows that have some, by their first place.
        """
        mask = StepMask([], self._vocab, [], [], self._device)
        for first, constraint in constrained:
            masks = self._masks(constraint, drafts.get(first, ()))
            for place, forbidden in enumerate(masks, first):
                if forbidden is not None:
                    mask.rows.append(place)
                    mask.forbidden.append(forbidden)
                    mask.constraints.append(constraint)
        return mask if mask.rows else None

    def _masks(self, constraint: SlotConstraint, drafts: Sequence[int]) -> "list[Future[BoolArray | None] | None]":
        """Of each place of a row; None where any token may come."""
        ahead: list[Future[BoolArray | None] | None]
        if constraint.grammar is None and drafts:
            ahead, walk = [], constraint.copy()
            for token in drafts:
                walk.accept(token)
                ahead.append(None if walk.is_free else _done(self._forbidden(walk)))
        else:
            ahead = [Future() for _ in drafts]
        waiting = [future for future in ahead if future is not None] if constraint.grammar is not None else []
        if constraint.is_free:
            for future in waiting:
                future.set_result(None)
            return [None, *ahead]
        if constraint.forbidden is not None:
            for future in waiting:
                future.set_result(None)
        elif constraint.is_quick and not waiting:
            constraint.forbidden = _done(self._forbidden(constraint))
        else:
            constraint.forbidden = Future()
            self._pool().submit(self._walk, constraint, drafts, [constraint.forbidden, *waiting])
        return [constraint.forbidden, *ahead]

    def _walk(
        self, constraint: SlotConstraint, drafts: Sequence[int], masks: "Sequence[Future[BoolArray | None]]"
    ) -> None:
        """In a thread: the mask of the next token, and of those behind the drafts as far as they can hold."""
        drawn = constraint.drawn
        try:
            last = self._forbidden(constraint)
            walk = constraint.copy()  # before the first mask is there, with which the state itself may move on
            masks[0].set_result(last)
            for token, mask in zip(drafts, masks[1:], strict=False):
                if last[token] or walk.error is not None or constraint.drawn != drawn:
                    break
                walk.accept(token)
                if walk.is_free:
                    break  # the output has ended
                last = self._forbidden(walk)
                mask.set_result(last if walk.error is None else None)
        except BaseException as error:
            if masks[0].done():
                raise
            masks[0].set_exception(error)
        finally:
            for mask in masks:
                if not mask.done():
                    mask.set_result(None)

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


def _done(forbidden: BoolArray) -> "Future[BoolArray | None]":
    future: Future[BoolArray | None] = Future()
    future.set_result(forbidden)
    return future
