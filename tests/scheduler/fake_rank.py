"""A rank without a model that catches wrong pages.

`FakeRank` mimics a model worker. A position's "KV" is a hash of the cache salt and of all tokens up to it; it is
written to and read back from the pages that the scheduler named. A row that reads a page whose content is not its own
prefix raises `Corruption`, and the next token is a function of what was read, so that any mistake in page tables, slots
or lengths also changes the output. `reference` computes the same tokens without pages or batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vibe_sgl_lite.runtime.messages import (
    FailedRow,
    ForwardBatch,
    RowPooled,
    StepResult,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

VOCAB = 50
NAN = -1  # the "KV" that a poisoned token leaves behind


def extend(state: int, token: int) -> int:
    return hash((state, token)) & 0x7FFFFFFF


def start(salt: object) -> int:
    state = 17
    for character in str(salt):
        state = extend(state, ord(character))
    return state


def next_token(state: int, seed: int) -> int:
    return extend(extend(state, 7), seed % 1009) % VOCAB


def reference(tokens: Sequence[int], params: ResolvedSampling, salt: object = "", seed_offset: int = 0) -> list[int]:
    """What a sample generates, computed alone; of one that is pooled, its last state."""
    state = start(salt)
    for token in tokens:
        state = extend(state, token)
    if params.pooling is not None:
        return [state]
    generated: list[int] = []
    ends = set(params.end_token_ids) | set(params.stop_token_ids)
    while len(generated) < params.max_new_tokens:
        generated.append(next_token(state, (params.seed + seed_offset) % 2**64))
        if generated[-1] in ends:
            break
        state = extend(state, generated[-1])
    return generated


class Corruption(AssertionError):
    """A rank was told to read or write the wrong place."""


@dataclass
class _Slot:
    uid: int
    tokens: list[int]
    computed: int
    pages: list[int]
    seed: int
    pools: bool = False
    hashes: list[int] = field(default_factory=list)  # of the first len(hashes) tokens
    failed: bool = False


class FakeRank:
    """salt_of: a sample's cache salt, by uid. poison: a token whose row fails and leaves NaN in its page.

    late: how often, at random, a row that samples yields nothing, as when a grammar's mask is late.

    Of the drafts that a row may have, it often proposes fewer, of which some hold and the rest do not, at random
    (`rng`). All of them leave their KV in the pages, as on a real rank.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        slots: int,
        salt_of: Callable[[int], object] = lambda uid: "",
        poison: int | None = None,
        epoch: int = 0,
        rng: random.Random | None = None,
        late: float = 0.0,
    ) -> None:
        self.late = late
        self.epoch = epoch
        self.rng = rng or random.Random(0)
        self.page_size = page_size
        self.num_slots = slots
        self.poison = poison
        self.pages: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.slots: dict[int, _Slot] = {}
        self.rows: tuple[list[int], list[int]] | None = None
        self.last_step: int | None = None
        self.used: dict[int, set[int]] = {}  # step -> the pages its rows read and write
        self.row_uids: dict[int, list[int]] = {}
        self.tokens_run = 0
        self.computed: dict[int, int] = {}  # by uid: leading tokens whose KV was computed and is finite
        self.counted: dict[int, int] = {}  # the same without a token that a late row is to compute again
        self.failed: set[int] = set()  # uids with a failed row
        self._salt_of = salt_of

    def run(self, batch: ForwardBatch) -> StepResult:
        """What rank 0 would answer. Ranks run steps in order, so the answer does not depend on when it is read."""
        check(batch.epoch == self.epoch, f"a batch of epoch {batch.epoch} for ranks of {self.epoch}")
        check(self.last_step in (None, batch.step - 1), f"step {batch.step} after {self.last_step}")
        self.last_step = batch.step
        for slot in unpack_ids(batch.released):
            check(slot in self.slots, f"slot {slot} released, but it is free")
            del self.slots[slot]
        for new in batch.new:
            check(0 <= new.slot < self.num_slots and new.slot not in self.slots, f"slot {new.slot} is taken")
            tokens = unpack_ids(new.token_ids)
            check(0 <= new.num_computed < len(tokens), "nothing left to compute")
            self.slots[new.slot] = _Slot(
                new.uid, tokens, new.num_computed, unpack_ids(new.pages), new.sampling.seed,
                new.sampling.pooling is not None,
            )  # fmt: skip
        updates = zip(
            unpack_ids(batch.page_slots), unpack_ids(batch.page_index), unpack_ids(batch.page_ids), strict=True
        )
        for slot, index, page in updates:
            check(slot in self.slots, f"pages for slot {slot}, which is free")
            table = self.slots[slot].pages
            check(index <= len(table), "a hole in the page table")
            table[index : index + 1] = [page]
        if batch.row_slots is not None and batch.row_tokens is not None:
            self.rows = unpack_ids(batch.row_slots), unpack_ids(batch.row_tokens)
        assert self.rows is not None
        slots, counts = self.rows
        check(len(slots) == len(set(slots)) > 0, "a slot twice in one step, or an empty step")
        self.used[batch.step] = set()
        self.row_uids[batch.step] = [self.slots[slot].uid for slot in slots]
        self._some_late, self._drafted = False, list[int]()
        rows = [
            self._row(self.slots[slot], count, self.used[batch.step]) for slot, count in zip(slots, counts, strict=True)
        ]
        failed = [FailedRow(row) for row, tokens in enumerate(rows) if tokens is None]
        drafted = pack_ids(self._drafted) if any(self._drafted) else b""
        pooled = [
            RowPooled(row, pack_ids(slot.hashes[-1:]))
            for row, slot in enumerate(map(self.slots.__getitem__, slots))
            if slot.pools and rows[row] is not None and slot.computed == len(slot.tokens)
        ]
        yielded = [tokens or [] for tokens in rows]
        if self._some_late or max(len(tokens) for tokens in yielded) > 1 or self.rng.random() < 0.1:
            packed, amounts = [token for tokens in yielded for token in tokens], [len(tokens) for tokens in yielded]
            return StepResult(
                batch.step, pack_ids(packed), failed, counts=pack_ids(amounts), epoch=self.epoch, drafted=drafted,
                pooled=pooled,
            )  # fmt: skip
        first = pack_ids([*tokens, -1][0] for tokens in yielded)
        return StepResult(batch.step, first, failed, epoch=self.epoch, drafted=drafted, pooled=pooled)

    def _row(self, slot: _Slot, count: int, used: set[int]) -> list[int] | None:
        """The tokens that a row yields; None when it fails."""
        known, end = len(slot.tokens), slot.computed + count
        check(count > 0, "a row without a token")
        check(not (slot.pools and end > known), "a row after a prompt that is only pooled")
        check(end <= known or slot.computed == known - 1, "drafts in the middle of a prompt")
        check(end <= len(slot.pages) * self.page_size, "a token without a page")
        if end > known and self.rng.random() < 0.3:
            end = self.rng.randint(known, end)
        self._drafted.append(max(0, end - known))
        held = self.rng.randint(0, max(0, end - known))
        self._draft(slot, end, held)
        table = slot.pages[: -(-end // self.page_size)]
        check(len(set(table)) == len(table), "a page twice in one table")
        used.update(table)
        while len(slot.hashes) < end:
            state = slot.hashes[-1] if slot.hashes else start(self._salt_of(slot.uid))
            slot.hashes.append(extend(state, slot.tokens[len(slot.hashes)]))
        for position in range(slot.computed):
            read = self.pages[table[position // self.page_size]][position % self.page_size]
            check(
                slot.failed or read == slot.hashes[position],
                f"uid {slot.uid}: position {position} of page table is not its own",
            )
        bad = slot.failed  # a later row of it reads what the failed one left behind
        for position in range(slot.computed, end):
            bad = bad or (self.poison is not None and slot.tokens[position] == self.poison)
            content = NAN if bad else slot.hashes[position]
            self.pages[table[position // self.page_size]][position % self.page_size] = content
        slot_computed, computed = slot.computed, min(end, known + held)
        del slot.tokens[known + held :], slot.hashes[computed:]
        slot.computed = computed
        self.tokens_run += end - slot_computed
        slot.failed = bad
        if bad:
            self.failed.add(slot.uid)
            if computed == len(slot.tokens) and not slot.pools:
                slot.tokens.append(0)
            return None
        self.computed[slot.uid] = max(computed, self.computed.get(slot.uid, 0))
        if self.late and not slot.pools and computed == end == known and self.rng.random() < self.late:
            self._some_late = True
            slot.computed = computed = computed - 1
            del slot.hashes[computed:]
        self.counted[slot.uid] = max(computed, self.counted.get(slot.uid, 0))
        if computed < len(slot.tokens) or slot.pools:
            return []
        slot.tokens.append(next_token(slot.hashes[-1], slot.seed))
        return slot.tokens[known:]

    def _draft(self, slot: _Slot, end: int, held: int) -> None:
        """Put drafts behind the known tokens, up to `end`: so many that hold, and then wrong ones."""
        known = len(slot.tokens)
        state = slot.hashes[-1] if slot.hashes else start(self._salt_of(slot.uid))
        for token in slot.tokens[len(slot.hashes) :] if end > known else []:
            state = extend(state, token)
        while len(slot.tokens) < end:
            token = next_token(state, slot.seed)
            if len(slot.tokens) >= known + held:
                token = (token + 1) % VOCAB
            slot.tokens.append(token)
            state = extend(state, token)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise Corruption(message)
