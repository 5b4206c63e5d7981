"""What changes single logits before the distribution is shaped: penalties, then logit_bias, then held-back end tokens.

Nothing here goes over the vocabulary: a penalty touches only tokens of the row's own sequence, which the rank keeps per
slot anyway. Counts are made from that sequence in each step, so there is no state to update, to replay after a
retraction or to get wrong with two steps in flight.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.slots import PenaltyPlan, SamplingPlan

_ROWS_AT_ONCE = 32  # bounds the count tables: rows x local vocabulary x 4 bytes each


class LogitAdjuster:
    """tokens: [max_slots, context_len] int32, every slot's sequence, written by its owner before each sampling.
    vocab: this rank's range of the vocabulary."""

    def __init__(self, tokens: Tensor, vocab: slice) -> None:
        self._tokens = tokens
        self._vocab = vocab
        # Zero between uses. Made when the first penalised row comes.
        self._generated_counts: Tensor | None = None
        self._seen_counts: Tensor | None = None

    def adjust(
        self, logits: Tensor, plan: SamplingPlan, positions: Tensor, host_positions: npt.NDArray[np.int64]
    ) -> Tensor:
        """logits [rows, local vocabulary]: changed in place if float32, else converted. positions: int64 [rows]."""
        if plan.penalties is None and plan.bias is None and plan.held_back is None:
            return logits
        logits = logits.to(torch.float32)
        if plan.penalties is not None:
            self._penalise(logits, plan.penalties, positions, host_positions)
        if plan.bias is not None:
            logits[plan.bias.rows, plan.bias.columns] += plan.bias.values
        if plan.held_back is not None:
            rows, columns = plan.held_back.rows, plan.held_back.columns
            held = positions[rows] < plan.held_back.values
            logits[rows, columns] = logits[rows, columns].masked_fill(held, float("-inf"))
        return logits

    def _penalise(
        self, logits: Tensor, plan: PenaltyPlan, positions: Tensor, host_positions: npt.NDArray[np.int64]
    ) -> None:
        """Repetition as in transformers (CTRL, Keskar et al. 2019), then frequency and presence as in OpenAI's API."""
        ends = host_positions[plan.host_rows]
        lengths = ends if plan.over_prompt else ends - plan.host_prompt_lens
        for begin in range(0, len(ends), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            longest = int(lengths[part].max())
            if longest > 0:
                self._penalise_part(logits, plan, positions, part, longest)

    def _penalise_part(self, logits: Tensor, plan: PenaltyPlan, positions: Tensor, part: slice, longest: int) -> None:
        rows, slots, prompt_lens = plan.rows[part], plan.slots[part, None], plan.prompt_lens[part, None]
        steps = torch.arange(longest, device=logits.device)
        index = steps.expand(len(rows), -1) if plan.over_prompt else prompt_lens + steps
        known = index < positions[rows][:, None]
        ids = self._tokens[slots, index.clamp(max=self._tokens.shape[1] - 1)].to(torch.int64)
        inside = known & (ids >= self._vocab.start) & (ids < self._vocab.stop)
        # What lies outside becomes column 0 with a count of zero added: harmless, since the new value of a column
        # follows from its counts alone, however often the column is listed.
        columns = torch.where(inside, ids - self._vocab.start, 0)
        generated = inside & (index >= prompt_lens)
        self._generated_counts = _table(self._generated_counts, len(rows), logits)
        counts = _count(self._generated_counts, columns, generated)
        flat = columns + rows[:, None] * logits.shape[1]
        old = logits.view(-1)[flat]
        new = old
        if plan.over_prompt:
            self._seen_counts = _table(self._seen_counts, len(rows), logits)
            seen = _count(self._seen_counts, columns, inside) > 0
            repetition = plan.repetition[part, None]
            new = torch.where(seen, torch.where(old > 0, old / repetition, old * repetition), old)
        new = new - plan.frequency[part, None] * counts - plan.presence[part, None] * (counts > 0)
        logits.view(-1)[flat] = new


def _table(table: Tensor | None, rows: int, logits: Tensor) -> Tensor:
    if table is not None and table.shape[0] >= rows:
        return table
    return torch.zeros((rows, logits.shape[1]), dtype=torch.int32, device=logits.device)


def _count(table: Tensor, columns: Tensor, which: Tensor) -> Tensor:
    """columns int64 [n, m], which bool [n, m] -> int32 [n, m]: how often row i's `which` columns hold columns[i, j].

    `table` [>= n, vocabulary] is all zero before and after.
    """
    table = table[: len(columns)]
    counts = table.scatter_add_(1, columns, which.to(torch.int32)).gather(1, columns)
    table.scatter_(1, columns, 0)
    return counts
