"""The exact top k of each row, ordered by (logit descending, id ascending), over all ranks.

A logit and its id are packed into one int64 *key*, the order-preserving bits of the float32 above the complement of the
id. Keys are unique, so a plain maximum or top-k of keys has exactly one answer, ties of logits included, however the
vocabulary is cut into blocks or ranks.

Only a fraction of the vocabulary is packed: the k best entries lie in the k blocks with the best (maximum, lowest
block) pairs, because each of these blocks holds an entry that beats every entry of a block left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.parallel_state import Group

BLOCK = 64  # vocabulary entries a block
_ID_MASK = (1 << 32) - 1
NO_KEY = -(1 << 63)  # below the key of every logit, -inf too


def pack(logits: Tensor, ids: Tensor) -> Tensor:
    """logits: float32; ids: int64 in 0 .. 2**32 - 1, of a shape that broadcasts -> int64 keys."""
    return (ordered_bits(logits).to(torch.int64) << 32) | (_ID_MASK - ids)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: (logits float32, ids int64). `NO_KEY` gives NaN and the largest id."""
    return from_ordered_bits((keys >> 32).to(torch.int32)), _ID_MASK - (keys & _ID_MASK)


def ordered_bits(x: Tensor) -> Tensor:
    """float32 -> int32 that compares as the floats do (-0.0 as 0.0; NaN above infinity)."""
    bits = (x + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_ordered_bits(ordered: Tensor) -> Tensor:
    """The inverse of `ordered_bits`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


@dataclass(frozen=True)
class RowSet:
    """Some rows (int64 [n], ascending, none twice) of logits [batch, local vocabulary], float32 or bfloat16."""

    logits: Tensor
    rows: Tensor

    def parts(self) -> list[slice]:
        """The n rows in parts whose temporaries stay in cache on CPU, and are few launches on GPU."""
        elements = (1 << 18) if self.logits.device.type == "cpu" else (1 << 24)
        step = max(1, elements // self.logits.shape[1])
        return [slice(i, i + step) for i in range(0, len(self.rows), step)]

    def values(self, part: slice) -> Tensor:
        """float64 [m, local vocabulary], a copy."""
        everything = len(self.rows) == len(self.logits)
        return (self.logits[part] if everything else self.logits[self.rows[part]]).to(torch.float64)

    def subset(self, index: Tensor) -> "RowSet":
        """Rows `index` (int64, ascending) of the n."""
        return RowSet(self.logits, self.rows[index])


class BlockMaxima:
    """The maximum of each block of each row of `logits`: one pass over them, shared by every top-k of the step.

    logits: [rows, local vocabulary] contiguous, float32 or bfloat16. first_id: id of the first column.
    """

    def __init__(self, logits: Tensor, first_id: int) -> None:
        self.logits = logits
        self.first_id = first_id
        self.maxima = block_maxima(logits)

    def top(self, rows: Tensor, k: int) -> Tensor:
        """Keys [n, k] of the k best local entries of `rows` (int64 [n]), best first; padded with NO_KEY."""
        columns = self._columns_of_best_blocks(rows, k)
        inside = columns < self.logits.shape[1]
        columns.clamp_(max=self.logits.shape[1] - 1)
        flat = columns + rows[:, None] * self.logits.shape[1]
        keys = pack(self.logits.view(-1)[flat].to(torch.float32), columns + self.first_id)
        keys.masked_fill_(~inside, NO_KEY)
        best = _largest(keys, min(k, keys.shape[1]))
        return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=NO_KEY)

    def _columns_of_best_blocks(self, rows: Tensor, k: int) -> Tensor:
        """int64 [n, m], the columns of the k best blocks of each row; the last block may reach past the end."""
        maxima = self.maxima[rows].to(torch.float32)
        blocks = torch.arange(maxima.shape[1], device=rows.device)
        best = unpack(_largest(pack(maxima, blocks), min(k, len(blocks))))[1]
        offsets = torch.arange(BLOCK, device=rows.device)
        return (best[:, :, None] * BLOCK + offsets).flatten(1)


def block_maxima(x: Tensor) -> Tensor:
    """[n, m] of any dtype -> [n, ceil(m / BLOCK)], the maximum of each block of columns."""
    blocks, rest = divmod(x.shape[1], BLOCK)
    whole = blocks * BLOCK
    parts = [x[:, :whole].view(len(x), blocks, BLOCK).amax(-1)] if blocks else []
    if rest:
        parts.append(x[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] -> (maxima [n], their columns int64 [n], the lowest one of equals).

    What torch.argmax gives, several times faster on CPU, where only a plain maximum is vectorised.
    """
    maxima = block_maxima(x)
    first = maxima.argmax(1, keepdim=True) * BLOCK
    columns = (first + torch.arange(BLOCK, device=x.device)).clamp_(max=x.shape[1] - 1)
    column = columns.gather(1, x.gather(1, columns).argmax(1, keepdim=True))
    return x.gather(1, column)[:, 0], column[:, 0]


def argmax_column(x: Tensor) -> Tensor:
    """[n, m] -> int64 [n], the column of each row's maximum, the lowest one of equals. An `ArgmaxFunction`."""
    return argmax(x)[1]


def top_over_ranks(local: Tensor, group: Group) -> Tensor:
    """Each rank's keys [n, k], best first -> the k best of all ranks, the same on every rank."""
    if group.size == 1:
        return local
    if local.shape[1] == 1:
        return group.all_reduce_max(local.contiguous())
    gathered = group.all_gather(local[None])
    return _largest(gathered.transpose(0, 1).flatten(1), local.shape[1])


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.amax(1, keepdim=True) if k == 1 else keys.topk(k, dim=1).values
