"""SlotStates against a plain model of the message: lists of tokens and pages, one Python loop a token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vibe_sgl_lite.model_worker.batch import DraftRow, SlotStates
from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.model_worker.step_input import StepInput
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, RowAttributes, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, resolve

PAGE = 4
CONTEXT = 40
SLOTS = 6
PADDING = 999


def greedy_sampling() -> ResolvedSampling:
    return resolve(
        SamplingParams(temperature=0.0, seed=0, max_new_tokens=1),
        model_defaults={},
        end_token_ids=(),
        prompt_tokens=1,
        context_length=CONTEXT,
        vocab_size=100,
    )


def new_slot(slot: int, ids: list[int], pages: list[int], computed: int = 0) -> NewSlot:
    return NewSlot(slot, slot, pack_ids(ids), len(ids), computed, pack_ids(pages), greedy_sampling())


def states() -> SlotStates:
    return SlotStates(SLOTS, CONTEXT, PAGE, PADDING, CpuDevice())


def test_a_chunk_and_a_decode_row_are_packed_in_order() -> None:
    slots = states()
    slots.apply(
        ForwardBatch(
            0,
            new=[new_slot(2, [10, 11, 12, 13, 14, 15], [7, 3], computed=4), new_slot(0, [20, 21, 22], [5])],
            row_slots=pack_ids([2, 0]),
            row_tokens=pack_ids([2, 2]),
        )
    )
    step = slots.prepare()
    assert step.batch.token_ids.tolist() == [14, 15, 20, 21]
    assert step.batch.positions.tolist() == [4, 5, 0, 1]
    assert step.batch.slot_mapping.tolist() == [12, 13, 20, 21]
    assert step.batch.query_start.tolist() == [0, 2, 4]
    assert step.batch.context_lengths.tolist() == [6, 2]
    assert step.batch.page_table.tolist() == [[7, 3], [5, PADDING]]
    assert step.sampling_rows.tolist() == [0]
    assert step.last_tokens.tolist() == [1]
    assert step.sampling_positions.tolist() == [6]
    slots.append(step, torch.tensor([16]))

    slots.apply(ForwardBatch(1, row_slots=pack_ids([2, 0]), row_tokens=pack_ids([1, 1])))
    step = slots.prepare()
    assert step.batch.token_ids.tolist() == [16, 22]
    assert step.sampling_slots.tolist() == [2, 0]


def test_unchanged_rows_are_remembered_and_steps_need_no_earlier_result() -> None:
    slots = states()
    slots.apply(ForwardBatch(0, new=[new_slot(1, [5], [0])], row_slots=pack_ids([1]), row_tokens=pack_ids([1])))
    for position in range(3):
        step = slots.prepare()
        assert step.batch.positions.tolist() == [position]
        slots.append(step, torch.tensor([50 + position]))
        slots.apply(ForwardBatch(position + 1))
    assert slots.tokens[1, :4].tolist() == [5, 50, 51, 52]


def test_a_row_with_room_but_no_drafts_runs_what_is_known() -> None:
    slots = states()
    slots.apply(ForwardBatch(0, new=[new_slot(1, [5, 6], [0])], row_slots=pack_ids([1]), row_tokens=pack_ids([4])))
    assert not slots.waits(None)
    step = slots.prepare()
    assert step.batch.token_ids.tolist() == [5, 6]
    assert step.sampling_positions.tolist() == [2]


def test_a_row_of_a_slot_without_tokens_is_our_mistake() -> None:
    slots = states()
    slots.apply(ForwardBatch(0, row_slots=pack_ids([1]), row_tokens=pack_ids([1])))
    with pytest.raises(AssertionError, match="no token to run"):
        slots.prepare()


class Drafts:
    """Proposes the same tokens ever."""

    most = 3

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[tuple[int, int, int]] = []

    def propose(self, rows: Sequence[DraftRow]) -> Sequence[Sequence[int]]:
        self.asked += [(slot, len(tokens), most) for slot, tokens, most in rows]
        return [self.tokens for _ in rows]

    def release(self, slot: int) -> None: ...


def test_drafts_are_run_and_settled() -> None:
    slots = SlotStates(SLOTS, CONTEXT, PAGE, PADDING, CpuDevice(), max_drafts=3)
    drafter = Drafts(30, 31, 32, 33)
    new = [new_slot(1, [5, 6], [0, 1]), new_slot(2, [7, 8, 9], [2]), new_slot(3, [10], [3])]
    slots.apply(ForwardBatch(0, new=new, row_slots=pack_ids([3, 1, 2]), row_tokens=pack_ids([1, 5, 2])))
    assert slots.waits(drafter)
    step = slots.prepare(drafter)
    assert drafter.asked == [(1, 2, 3)]
    assert step.drafts == {1: [30, 31, 32]}
    assert step.batch.token_ids.tolist() == [10, 5, 6, 30, 31, 32, 7, 8]
    assert step.batch.context_lengths.tolist() == [1, 5, 2]
    assert step.batch.num_decode_rows == 1
    assert step.batch.slot_mapping.tolist() == [12, 0, 1, 2, 3, 4, 8, 9]
    assert step.sampling_rows.tolist() == [0, 1, 1, 1, 1]
    assert step.sampling_positions.tolist() == [1, 2, 3, 4, 5]
    assert step.last_tokens.tolist() == [0, 2, 3, 4, 5]
    assert step.entries(1) == slice(1, 5)
    slots.append(step, torch.tensor([11, 30, 31, 40, 41]))
    slots.apply(ForwardBatch(1, row_slots=pack_ids([1, 2]), row_tokens=pack_ids([1, 1])))
    assert slots.waits(None)
    slots.settle(step, 1, 3)
    assert not slots.waits(None)
    step = slots.prepare()
    assert step.batch.token_ids.tolist() == [40, 9]
    assert step.batch.positions.tolist() == [4, 2]
    assert slots.tokens[1, :5].tolist() == [5, 6, 30, 31, 40]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Torch's, by name, with what they were given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(f"{func} {[tuple(one.shape) if isinstance(one, torch.Tensor) else one for one in args]}")
        return func(*args, **(kwargs or {}))


def test_a_step_in_which_nothing_is_proposed_is_a_plain_one() -> None:
    """The same batch by the same operations: on a CPU, each of them costs what a look-up does."""
    steps, seen = [], []
    for drafter, room in ((None, 0), (Drafts(), 3)):
        slots = SlotStates(SLOTS, CONTEXT, PAGE, PADDING, CpuDevice(), max_drafts=3)
        new = [new_slot(slot, [1, 2, 3 + slot], [slot], computed=2) for slot in range(2)]
        slots.apply(ForwardBatch(0, new=new, row_slots=pack_ids([0, 1]), row_tokens=pack_ids([1 + room] * 2)))
        with Operations() as operations:
            steps.append(slots.prepare(drafter))
        seen.append(operations.seen)
        assert slots.num_tokens[:2].tolist() == [4, 4]
        assert slots.num_computed[:2].tolist() == [3, 3]
    plain, other = steps
    assert seen[0] == seen[1] != []
    for name in ("token_ids", "positions", "slot_mapping", "query_start", "context_lengths", "page_table"):
        assert getattr(plain.batch, name).tolist() == getattr(other.batch, name).tolist(), name
    for name in ("num_decode_rows", "width", "max_context", "fills_bucket"):
        assert getattr(plain.batch, name) == getattr(other.batch, name), name
    assert not other.drafts
    assert not other.rows_with_drafts


def test_a_step_settles_nothing_of_who_came_to_its_slot_later() -> None:
    slots = SlotStates(SLOTS, CONTEXT, PAGE, PADDING, CpuDevice(), max_drafts=3)
    row, count = pack_ids([1]), pack_ids([3])
    slots.apply(ForwardBatch(0, new=[new_slot(1, [5], [0])], row_slots=row, row_tokens=count))
    old = slots.prepare(Drafts(30, 31))
    slots.apply(ForwardBatch(1, released=row, new=[new_slot(1, [6], [1])], row_slots=row, row_tokens=count))
    assert slots.waits(Drafts())
    new = slots.prepare(Drafts(40, 41))
    slots.settle(old, 0, 1)
    slots.settle(new, 0, 3)
    assert slots.num_tokens[1] == 4
    assert slots.num_computed[1] == 3


def test_attributes_are_those_of_each_token() -> None:
    slots = states()
    adapted = msgspec.structs.replace(new_slot(2, [7, 8, 9], [2]), attributes=RowAttributes(adapter=6))
    batch = ForwardBatch(
        0, new=[new_slot(1, [5, 6], [0]), adapted], row_slots=pack_ids([1, 2]), row_tokens=pack_ids([2, 2])
    )
    slots.apply(batch)
    attributes = slots.prepare().attributes
    assert attributes is not None
    assert attributes.adapter.tolist() == [0, 0, 6, 6]
    slots.apply(ForwardBatch(1, row_slots=pack_ids([1]), row_tokens=pack_ids([1])))
    slots.num_tokens[1] += 1
    assert slots.prepare().attributes is None
    slots.apply(ForwardBatch(2, new=[new_slot(2, [7], [2])], row_slots=pack_ids([2]), row_tokens=pack_ids([1])))
    assert slots.prepare().attributes is None


@dataclass
class Model:
    """One slot as lists."""

    tokens: list[int]
    computed: int
    pages: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(20))
def test_random_steps_equal_the_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    slots, models = states(), dict[int, Model]()
    next_page = iter(range(10_000))
    for number in range(60):
        released = [slot for slot in models if rng.random() < 0.1]
        for slot in released:
            del models[slot]
        new = []
        for slot in range(SLOTS):
            if slot not in models and rng.random() < 0.3:
                ids = [rng.randrange(100) for _ in range(rng.randint(1, 12))]
                computed = rng.randrange(len(ids))
                pages = [next(next_page) for _ in range(-(-len(ids) // PAGE))]
                models[slot] = Model(ids, computed, pages)
                new.append(new_slot(slot, ids, pages, computed))
        rows = [(slot, m) for slot, m in models.items() if rng.random() < 0.8 and len(m.tokens) < CONTEXT]
        rng.shuffle(rows)
        counts = [rng.randint(1, len(m.tokens) - m.computed) for _, m in rows]
        updates = []
        for (slot, m), count in zip(rows, counts, strict=True):
            while len(m.pages) * PAGE < m.computed + count:
                m.pages.append(next(next_page))
                updates.append((slot, len(m.pages) - 1, m.pages[-1]))
            if rng.random() < 0.2:  # a duplicate page gives way to the shared one
                m.pages[0] = next(next_page)
                updates.append((slot, 0, m.pages[0]))
        slots.apply(
            ForwardBatch(
                number,
                released=pack_ids(released),
                new=new,
                page_slots=pack_ids(u[0] for u in updates),
                page_index=pack_ids(u[1] for u in updates),
                page_ids=pack_ids(u[2] for u in updates),
                row_slots=pack_ids(slot for slot, _ in rows),
                row_tokens=pack_ids(counts),
            )
        )
        step = slots.prepare()
        sampled = _check(step, rows, counts)
        slots.append(step, torch.tensor(sampled, dtype=torch.int64))


def _check(step: StepInput, rows: list[tuple[int, Model]], counts: list[int]) -> list[int]:
    """Compare, advance the models, and return made-up sampled tokens."""
    tokens, positions, cache, sampled, last = [], [], [], [], []
    for (_, m), count in zip(rows, counts, strict=True):
        for position in range(m.computed, m.computed + count):
            tokens.append(m.tokens[position])
            positions.append(position)
            cache.append(m.pages[position // PAGE] * PAGE + position % PAGE)
        m.computed += count
        if m.computed == len(m.tokens):
            m.tokens.append((len(m.tokens) * 7) % 100)
            sampled.append(m.tokens[-1])
            last.append(len(tokens) - 1)
    assert step.batch.token_ids.tolist() == tokens
    assert step.batch.positions.tolist() == positions
    assert step.batch.slot_mapping.tolist() == cache
    assert step.last_tokens.tolist() == last
    assert step.batch.context_lengths.tolist() == [m.computed for _, m in rows]
    for row, (_, m) in enumerate(rows):
        pages = -(-m.computed // PAGE)
        assert step.batch.page_table[row, :pages].tolist() == m.pages[:pages]
    assert np.array_equal(step.slots, [slot for slot, _ in rows])
    return sampled
