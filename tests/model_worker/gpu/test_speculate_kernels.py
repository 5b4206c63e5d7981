"""Drafts on the device: looked up, laid out and accepted as plain Python does it."""

import numpy as np
import pytest
import torch

from tests.model_worker.lookup import search
from vibe_sgl_lite.model_worker.gpu.kernels import speculate
from vibe_sgl_lite.model_worker.gpu.kernels.expand_rows import expand_rows
from vibe_sgl_lite.model_worker.gpu.kernels.speculate import accept, expand_drafts, look_up

SLOTS, WIDTH, MOST, PAGE, PADDING_PAGE = 5, 90, 5, 4, 77


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_look_up_finds_what_a_search_finds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "BLOCK", 32)
    rng, found = np.random.default_rng(1), 0
    for vocab in (2, 3, 6, 40):
        tokens = torch.from_numpy(rng.integers(0, vocab, (SLOTS, WIDTH)).astype(np.int32)).to(device)
        before = tokens.cpu()
        lengths = [int(n) for n in rng.integers(1, WIDTH - MOST, SLOTS)]
        lengths[0] = 0
        rooms = [3, 0, MOST, 2, MOST]
        slots = longs(4, 2, 0, 3, 1).to(device)
        by_row = [lengths[slot] for slot in slots.tolist()]
        known = [-1, by_row[1], 0, -1, by_row[4]]
        row_lengths, drafted = (torch.full((SLOTS,), 99, dtype=torch.int32, device=device) for _ in range(2))
        told = ints(*known).to(device)
        look_up(slots, told, ints(*rooms).to(device), ints(*lengths).to(device), tokens, row_lengths, drafted, MOST)
        assert row_lengths.tolist() == by_row
        for row, slot in enumerate(slots.tolist()):
            own = before[slot, : by_row[row]].tolist()
            expected = search(own, rooms[row]) if rooms[row] else []
            assert drafted[row] == len(expected)
            assert tokens[slot, : by_row[row] + len(expected)].tolist() == own + expected
            rest = by_row[row] + len(expected)
            assert torch.equal(tokens[slot, rest:].cpu(), before[slot, rest:])
            found += len(expected)
    assert found > 20


def test_rows_with_drafts_are_laid_out_as_rows_of_one_token_each(device: torch.device) -> None:
    """Each token as if it were a decode row of its own."""
    tokens = torch.arange(SLOTS * WIDTH, dtype=torch.int32, device=device).view(SLOTS, WIDTH)
    table = torch.arange(SLOTS * 23, dtype=torch.int32, device=device).view(SLOTS, 23)
    slots, lengths, drafted, wide = longs(2, 0, 3, 4), ints(7, 9, 16, 0), ints(2, 0, 4, 0), 5

    def outputs(rows: int) -> list[torch.Tensor]:
        small = [torch.full((rows,), -5, dtype=torch.int32, device=device) for _ in range(2)]
        return small + [torch.full((rows,), -5, dtype=torch.int64, device=device) for _ in range(4)]

    token_ids, positions, mapping, sampled, places, owners = outputs(4 * wide)
    pages, contexts = torch.zeros((4, 23), dtype=torch.int32, device=device), ints(0, 0, 0, 0).to(device)
    expand_drafts(
        slots.to(device), lengths.to(device), drafted.to(device), tokens, table, token_ids, positions, mapping, pages,
        contexts, sampled, places, owners, PAGE, PADDING_PAGE,
    )  # fmt: skip
    assert contexts.tolist() == [9, 9, 20, 0]
    for row in range(4):
        for index in range(wide):
            real = lengths[row] > 0 and index <= drafted[row]
            slot, length = (int(slots[row]), int(lengths[row]) + index) if real else (SLOTS - 1, 0)
            one = outputs(1)
            own_pages = torch.zeros((1, 23), dtype=torch.int32, device=device)
            expand_rows(
                longs(slot).to(device), ints(length).to(device), tokens, table, one[0], one[1], one[2], own_pages,
                one[3], one[4], PAGE, PADDING_PAGE,
            )  # fmt: skip
            at = row * wide + index
            got = [x[at].item() for x in (positions, mapping, sampled, places, owners)]
            assert got == [one[1].item(), one[2].item(), one[3].item(), one[4].item(), slot]
            assert not real or token_ids[at] == one[0]
    assert pages[2, :5].tolist() == table[3, :5].tolist()


def test_tokens_count_up_to_the_first_that_is_no_draft(device: torch.device) -> None:
    rng, kept = np.random.default_rng(2), set[int]()
    for _ in range(10):
        wide, rows = int(rng.integers(2, 8)), 4
        token_ids = rng.integers(0, 2, (rows, wide)).astype(np.int32)
        sampled = rng.integers(-1, 2, (rows, wide)).astype(np.int32)
        drafted = rng.integers(0, wide, rows).astype(np.int32)
        lengths = np.array([5, 1, 0, 30], np.int32)
        slots, known = longs(3, 0, 4, 1), torch.zeros(SLOTS, dtype=torch.int32, device=device)
        result = torch.full((rows * (wide + 2),), -9, dtype=torch.int32, device=device)
        given = [torch.from_numpy(x.reshape(-1)).to(device) for x in (sampled, token_ids, lengths, drafted)]
        accept(given[0], given[1], slots.to(device), given[2], given[3], known, result)
        yields = result[rows * (wide + 1) :].tolist()
        assert result[: rows * wide].tolist() == sampled.reshape(-1).tolist()
        assert result[rows * wide : rows * (wide + 1)].tolist() == drafted.tolist()
        for row in range(rows):
            expected = 1
            while expected <= drafted[row] and sampled[row, expected - 1] == token_ids[row, expected]:
                expected += 1
            expected = 0 if lengths[row] == 0 else expected
            assert yields[row] == expected
            assert known[slots[row]] == lengths[row] + expected
            kept.add(expected)
    assert len(kept) > 3
