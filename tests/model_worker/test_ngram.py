"""Prompt lookup against a search through all of a slot's tokens."""

import numpy as np
import pytest

from tests.model_worker.lookup import search
from vibe_sgl_lite.model_worker.batch import DraftRow
from vibe_sgl_lite.model_worker.ngram import CANDIDATES, NgramDrafter


@pytest.mark.parametrize("vocab", [2, 4, 30])
def test_it_finds_what_a_search_finds(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    drafter, found = NgramDrafter(9), 0
    for slot in range(6):
        tokens = rng.integers(0, vocab, 150).astype(np.int32)
        known = 1
        while known < len(tokens):
            most = int(rng.integers(1, 10))
            expected = search(tokens[:known].tolist(), most, CANDIDATES)
            assert drafter.propose([DraftRow(slot, tokens[:known], most)]) == [expected]
            found += bool(expected)
            known += int(rng.integers(1, 6))
    assert found > 10


def test_a_slot_begins_anew() -> None:
    drafter = NgramDrafter(4)
    again = np.array([5, 6, 7, 8, 5, 6], np.int32)
    assert drafter.propose([DraftRow(3, again, 3)]) == [[7, 8, 5]]
    drafter.release(3)
    drafter.release(9)
    assert drafter.propose([DraftRow(3, again[:4], 3), DraftRow(4, again, 1)]) == [[], [7]]
