"""The sampler: from a step's logits to one token a row, exact, the same on every rank and in any batch.

Order: penalties and bias, mask -> temperature -> top-k -> top-p (renormalised after top-k) -> min-p -> draw. Ties of
logits go to the lowest id everywhere: in the greedy argmax, in who is among the k best, in which of a nucleus's last
equals stay. The draw is Gumbel-max: argmax of logit / temperature + noise(seed, position, token id), see noise.py. So
a row's token depends on its own logits, parameters, seed and position, and on nothing else.

Greedy rows are one pass for their maximum. For filtered rows, one read of the logits finds every row's best blocks;
they are decided on a few sorted candidates, and only a row whose cut lies beyond them (or that has no filter) goes over
its vocabulary again. Ranks exchange candidates, histograms and winners, never the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import CpuDevice, Device
from vibe_sgl_lite.model_worker.sampling.adjust import LogitAdjuster
from vibe_sgl_lite.model_worker.sampling.candidates import (
    BlockMaxima,
    RowSet,
    argmax,
    argmax_column,
    pack,
    top_over_ranks,
    unpack,
)
from vibe_sgl_lite.model_worker.sampling.constraints import StepMask
from vibe_sgl_lite.model_worker.sampling.logprobs import Logprobs, token_logprobs
from vibe_sgl_lite.model_worker.sampling.noise import counters, gumbel, row_keys
from vibe_sgl_lite.model_worker.sampling.nucleus import (
    MAX_VOCAB,
    Cuts,
    find_cuts,
    prefix_lengths,
    total_masses,
)
from vibe_sgl_lite.model_worker.sampling.slots import FilterPlan, Filters, SamplingPlan, SlotSampling
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, spread
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

# [n, m] float32 or bfloat16, contiguous -> int64 [n], the column of each row's maximum, the lowest one of equals; in
# range also where there is a NaN.
ArgmaxFunction = Callable[[Tensor], Tensor]


class FusedDraw(Protocol):
    """Draws, where no row asks for more than a temperature, a seed and filters that it knows, without planning anything
    for the step."""

    def admit(self, slot: int, sampling: ResolvedSampling, filters: Filters | None, *, plain: bool) -> None:
        """A row comes to `slot`; plain: it asks for no more than its filters, if any."""
        ...

    def takes(self, slots: npt.NDArray[np.int32]) -> bool:
        """Whether these are such rows; then, what the device has to know of them is on its way there."""
        ...

    def __call__(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        tokens: Tensor,
        places: Tensor,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """int32 [rows], the tokens that `Sampler.sample` would draw, -1 where logits are NaN or infinite.

        All on the device, [rows] ints: slots, positions as for `Sampler.sample`; places, where in `tokens` the drawn
        ones go too. lengths: which are then made one longer, where they are not 0.
        """
        ...


@dataclass(frozen=True)
class SampleOutput:
    """token_ids: int64 [rows], on the logits' device. logprobs: of the rows that asked for them, else None."""

    token_ids: Tensor
    logprobs: Logprobs | None


class Sampler:
    """Sampling parameters of all slots of a rank, and the sampling of its steps.

    vocab_size: of the whole vocabulary, 262,144 at most. group: the ranks that share it.
    tokens: [max_slots, context_len] int32, the sequences of the slots; read, never written. When `sample` runs,
        tokens[slot, :position] must hold all tokens before the one to draw (only penalties read it).
    argmax: a faster one where the logits' device has it. fused: a draw of plain rows in one go over the same group, if
        the device has it.
    """

    def __init__(
        self,
        vocab_size: int,
        group: Group,
        tokens: Tensor,
        argmax: ArgmaxFunction | None = None,
        device: Device | None = None,
        fused: FusedDraw | None = None,
    ) -> None:
        self.device = device or CpuDevice()
        assert vocab_size <= MAX_VOCAB, f"a vocabulary of {vocab_size} is above {MAX_VOCAB}"
        self.vocab = spread(vocab_size, group)
        self.group = group
        self.slots = SlotSampling(tokens.shape[0], vocab_size, self.vocab, self.device)
        self.fused = fused
        self._argmax = argmax or argmax_column
        self._adjuster = LogitAdjuster(tokens, self.vocab)
        self._ids = torch.arange(self.vocab.start, self.vocab.stop, device=tokens.device)
        self._counters = counters(self._ids)

    def admit(self, slot: int, sampling: ResolvedSampling, num_prompt_tokens: int) -> None:
        """A row comes to `slot`, for the first time or again after a retraction. sampling.seed is the sample's own."""
        self.slots.admit(slot, sampling, num_prompt_tokens)
        if self.fused is not None:
            reads_hidden = sampling.prompt_logprobs or sampling.pooling is not None  # which the draw's graph spoils
            plain = self.slots.is_plain(slot) and not reads_hidden
            self.fused.admit(slot, sampling, self.slots.filters(slot), plain=plain)

    def release(self, slot: int) -> None:
        """The slot is free again."""
        self.slots.release(slot)

    def sample(
        self,
        logits: Tensor,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        mask: StepMask | None = None,
        device_positions: Tensor | None = None,
    ) -> SampleOutput:
        """Draw one token a row.

        logits: [rows, vocab / ranks] float32 or bfloat16, contiguous; overwritten by penalties, biases and the mask.
        slots: int64 [rows] on the host, each occupied. positions: int64 [rows] on the host, the index in the whole
        sequence (prompt and generated) of the token being drawn: the number of tokens known so far; device_positions:
        the same on the logits' device, where the caller has them there.
        Every rank of the group calls it with the same slots and positions. A row with NaN gives some id in range.
        """
        assert logits.shape == (len(slots), len(self._ids))
        assert logits.is_contiguous()
        plan = self.slots.plan(slots)
        raw = None if plan.logprob_index is None else logits[plan.logprob_index]
        if device_positions is None:
            device_positions = self.device.tensor(positions)
        adjusted = self._adjuster.adjust(logits, plan, device_positions, positions)
        if mask is not None:
            mask.apply(adjusted)
        token_ids = self._draw(adjusted, plan, device_positions)
        logprobs = None
        if raw is not None:
            chosen = token_ids[plan.logprob_index]
            logprobs = token_logprobs(
                raw, chosen, plan.logprob_rows, plan.top_counts, self.vocab, self.group, self.slots.vocab_size
            )
        return SampleOutput(token_ids, logprobs)

    def logprobs_of(self, logits: Tensor, token_ids: Tensor, top: int) -> Logprobs:
        """For prompt_logprobs: logits [n, vocab / ranks] at n positions and the tokens (int64 [n]) that follow them."""
        n = len(token_ids)
        return token_logprobs(
            logits, token_ids, list(range(n)), [top] * n, self.vocab, self.group, self.slots.vocab_size
        )

    def _draw(self, logits: Tensor, plan: SamplingPlan, positions: Tensor) -> Tensor:
        """int64 [rows], from the adjusted logits."""
        if plan.all_greedy:
            return self.draw_greedily(logits)
        token_ids = torch.empty_like(positions)
        if plan.greedy is not None:
            token_ids[plan.greedy] = self.draw_greedily(logits[plan.greedy])
        keys = row_keys(plan.seeds, positions)
        if plan.unfiltered is not None:
            token_ids[plan.unfiltered] = self._draw_widely(RowSet(logits, plan.unfiltered), plan, keys)
        if plan.filtered is not None:
            token_ids[plan.filtered.rows] = self._draw_filtered(logits, plan.filtered, plan, keys)
        return token_ids

    def draw_greedily(self, logits: Tensor) -> Tensor:
        """int64 [n], the most likely token of each row of `logits`, [n, vocab / ranks], over all ranks."""
        column = self._argmax(logits)
        if self.group.size == 1:
            return column
        best = logits.gather(1, column[:, None]).to(torch.float32)
        return unpack(self.group.all_reduce_max(pack(best, self._ids[column, None])))[1][:, 0]

    def _draw_filtered(self, logits: Tensor, filters: FilterPlan, plan: SamplingPlan, keys: Tensor) -> Tensor:
        """int64 [n], of the rows of `filters`."""
        maxima = BlockMaxima(logits, self.vocab.start)
        values, ids = unpack(top_over_ranks(maxima.top(filters.rows, filters.candidates), self.group))
        best, inverse = values[:, 0].contiguous(), plan.inverse_temperature[filters.rows]
        rows = RowSet(logits, filters.rows)
        total = torch.zeros_like(filters.rows)
        measured = filters.needs_total
        if len(measured):
            total[measured] = total_masses(rows.subset(measured), best[measured], inverse[measured], self.group)
        lengths, undecided = prefix_lengths(values, inverse, filters, total, self.slots.vocab_size)
        scores = values.to(torch.float64) * inverse[:, None] + gumbel(keys[filters.rows][:, None], counters(ids))
        outside = torch.arange(filters.candidates, device=ids.device) >= lengths[:, None]
        scores.masked_fill_(outside, float("-inf"))
        drawn = ids.masked_fill(scores < scores.amax(1, keepdim=True), self.slots.vocab_size - 1).amin(1)
        if filters.may_be_undecided:
            # All ranks must take the same way, also where two kinds of machine round a sum's last bit differently.
            rest = self.group.all_reduce_max(undecided.to(torch.int32)).nonzero()[:, 0]
            if len(rest):
                beyond, inverse = filters.subset(rest), inverse[rest]
                cuts = find_cuts(
                    rows.subset(rest), self.vocab.start, beyond, best[rest], total[rest], inverse, self.group,
                    self.slots.vocab_size,
                )  # fmt: skip
                drawn[rest] = self._draw_widely(rows.subset(rest), plan, keys, cuts)
        return drawn

    def _draw_widely(self, rows: RowSet, plan: SamplingPlan, keys: Tensor, cuts: Cuts | None = None) -> Tensor:
        """int64 [n]: with noise for every entry of `rows`, or for those that the cuts leave."""
        winners = torch.empty((1, 2, len(rows.rows)), dtype=torch.float64, device=keys.device)  # score and id
        for part in rows.parts():
            chunk, scores = rows.rows[part], rows.values(part)
            if cuts is not None:
                scores = cuts.drop(scores, self._ids, part)
            scores.mul_(plan.inverse_temperature[chunk, None]).add_(gumbel(keys[chunk, None], self._counters))
            winners[0, 0, part], column = argmax(scores)
            winners[0, 1, part] = self._ids[column].to(torch.float64)
        # Ranks hold ascending ids, and argmax takes the first: a tie goes to the lowest id.
        scores, ids = self.group.all_gather(winners).unbind(1)
        return ids.gather(0, scores.argmax(0, keepdim=True))[0].to(torch.int64)
