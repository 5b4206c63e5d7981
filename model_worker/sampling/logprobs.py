"""Log-probabilities of the raw model distribution (before penalties, bias and temperature), without gathering it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.candidates import BlockMaxima, RowSet, top_over_ranks, unpack
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.messages import TokenLogprob

UNITS = 2.0**44  # of a probability over the highest one; times a vocabulary they are an int64


@dataclass(frozen=True)
class Logprobs:
    """Of n rows, on the device. The same on every rank.

    rows: indices of the batch. token_ids: int64 [n]; logprobs: float32 [n], of these tokens.
    top_ids int64, top_logprobs float32: [n, k], best first; row i wants top_counts[i] of them.
    """

    rows: list[int]
    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    top_counts: list[int]

    def packed(self) -> Tensor:
        """float64 [n, 2 + 2 k]: id, logprob, top ids, top logprobs, for one copy to the host; see `entries`."""
        columns = (self.token_ids[:, None], self.logprobs[:, None], self.top_ids, self.top_logprobs)
        return torch.cat([column.to(torch.float64) for column in columns], dim=1)

    def entries(self, packed: npt.NDArray[np.float64] | None = None) -> list[tuple[int, TokenLogprob]]:
        """(row of the batch, what a message carries), in the order of `rows`. packed: `packed()`, on the host already;
        without it, this waits for the device."""
        if packed is None:
            packed = self.packed().cpu().numpy()
        k = self.top_ids.shape[1]
        ids, top_ids = packed[:, 0].astype(np.int64).tolist(), packed[:, 2 : 2 + k].astype(np.int64).tolist()
        values, top_values = packed[:, 1].tolist(), packed[:, 2 + k :].tolist()
        return [
            (row, TokenLogprob(ids[i], values[i], tuple(zip(top_ids[i][:n], top_values[i][:n], strict=True))))
            for i, (row, n) in enumerate(zip(self.rows, self.top_counts, strict=True))
        ]


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    rows: list[int],
    top_counts: list[int],
    vocab: slice,
    group: Group,
    vocab_size: int,
) -> Logprobs:
    """logits: raw, [n, local vocabulary], float32 or bfloat16; token_ids: int64 [n] of the whole vocabulary.

    vocab: this rank's range of all vocab_size. rows, top_counts: see `Logprobs`. Every rank of the group calls it with
    the same n.
    """
    maxima = BlockMaxima(logits, vocab.start)
    best = group.all_reduce_max(maxima.maxima.amax(1).to(torch.float32))
    column = token_ids - vocab.start
    here = (column >= 0) & (column < logits.shape[1])
    chosen = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].to(torch.float64)
    mass = torch.empty_like(chosen)
    every = torch.arange(len(rows), device=logits.device)
    row_set = RowSet(logits, every)
    for part in row_set.parts():
        masses = row_set.values(part).sub_(best[part, None]).exp_()
        if logits.device.type == "cpu":
            mass[part] = masses.sum(1)
        else:  # in units of which a sum is exact: a GPU's order of sums depends on how many rows there are
            mass[part] = masses.mul_(UNITS).round_().to(torch.int64).sum(1).to(torch.float64) / UNITS
    sums = group.all_reduce(torch.stack([mass, torch.where(here, chosen, 0.0)]))
    log_sum = best.to(torch.float64) + sums[0].log()
    k = min(max(top_counts, default=0), vocab_size)
    if k == 0:
        top_ids = token_ids.new_empty((len(rows), 0))
        top_values = best.new_empty((len(rows), 0))
    else:
        keys = top_over_ranks(maxima.top(every, k), group)
        top_values, top_ids = unpack(keys)
    return Logprobs(
        rows=rows,
        token_ids=token_ids,
        logprobs=(sums[1] - log_sum).to(torch.float32),
        top_ids=top_ids,
        top_logprobs=(top_values - log_sum[:, None]).to(torch.float32),
        top_counts=top_counts,
    )
