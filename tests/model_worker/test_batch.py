"""SlotStates against a plain model of the message: lists of tokens and pages, one Python loop a token."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vibe_sgl_lite.model_worker.batch import SlotStates, StepInput
from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids
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


def test_a_row_beyond_the_known_tokens_is_our_mistake() -> None:
    slots = states()
    slots.apply(ForwardBatch(0, new=[new_slot(1, [5], [0])], row_slots=pack_ids([1]), row_tokens=pack_ids([2])))
    with pytest.raises(AssertionError, match="not known"):
        slots.prepare()


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
