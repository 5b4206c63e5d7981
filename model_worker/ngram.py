"""Drafts by prompt lookup: what followed when a slot's last tokens came before, in its prompt or its output.

Every pair of tokens is linked to its last occurrence, as a chain (that of LZ77 compressors); of the nearest few, the
one whose tokens before agree the farthest back is continued. Where it overlaps what it continues, the output repeats
itself, and so does the draft. It depends on the slot's tokens alone, so all ranks propose the same.

Prompt lookup decoding: Saxena 2023; n-gram speculation in vLLM and SGLang.
"""

from collections.abc import Sequence

from vibe_sgl_lite.model_worker.batch import DraftRow

CANDIDATES = 8  # occurrences that are looked at
LONGEST_MATCH = 16  # tokens that are compared
KEY_BITS = 20  # vocabularies are smaller


class NgramDrafter:
    """A `vibe_sgl_lite.model_worker.batch.Drafter`. most: drafts of a row."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._slots: dict[int, _Chains] = {}

    def propose(self, rows: Sequence[DraftRow]) -> Sequence[Sequence[int]]:
        drafts = []
        for slot, tokens, most in rows:
            chains = self._slots.setdefault(slot, _Chains())
            chains.add(tokens[len(chains.tokens) :].tolist())
            drafts.append(chains.follow(most))
        return drafts

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)


class _Chains:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._last: dict[int, int] = {}  # pair -> where it ended last
        self._before: list[int] = []  # by the end of a pair: where the same one ended before, or -1

    def add(self, tokens: list[int]) -> None:
        last, before, previous = self._last, self._before, self.tokens[-1] if self.tokens else -1
        for place, token in enumerate(tokens, len(self.tokens)):
            pair = previous << KEY_BITS | token  # negative of the first token, which ends none
            before.append(last.get(pair, -1))
            last[pair] = place
            previous = token
        self.tokens += tokens

    def follow(self, most: int) -> list[int]:
        tokens, longest, best = self.tokens, 0, -1
        end = len(tokens) - 1
        candidate = self._before[end]
        for _ in range(CANDIDATES):
            if candidate < 0 or longest == LONGEST_MATCH:
                break
            length = 2
            while length < min(LONGEST_MATCH, candidate + 1) and tokens[candidate - length] == tokens[end - length]:
                length += 1
            if length > longest:
                longest, best = length, candidate
            candidate = self._before[candidate]
        if best < 0:
            return []
        found = tokens[best + 1 : best + 1 + most]
        return (found * (-(-most // len(found))))[:most]
