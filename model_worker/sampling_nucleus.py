"""Where top-k, top-p and min-p cut a row's distribution, decided exactly and the same on every rank.

What a filter keeps is always a prefix of the row ordered by (logit descending, id ascending). A token's *distance* is
(best logit - logit) / temperature, its *mass* exp(-distance) as an integer multiple of 2**-44. Integers add up to the
same sum in any order, so a prefix's mass depends neither on the batch nor on how the vocabulary is split over ranks,
and the two ways here give the same answer: sorted candidates where the prefix is short (`prefix_lengths`), and
histograms of count and mass, summed over ranks and refined within the one bucket that holds the cut (`find_cuts`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.sampling_candidates import from_ordered_bits, ordered_bits
from model_worker.sampling_slots import FilterPlan
from qwen3.parallel import Group

_MASS_BITS = 44
MAX_VOCAB = 1 << (62 - _MASS_BITS)  # so that a whole row's mass fits an int64

_BUCKETS = 2048
_BUCKETS_PER_NAT = 64.0  # of the first histogram: distances up to 32 nats, the rest in the last bucket
_KEY_SHIFTS = (21, 10, 0)  # then by the bits of the logit: 11, 11 and 10 of them
_LARGEST_ORDERED = (1 << 31) - 1
_FAR = 1 << 62  # no limit


def distances(logits: Tensor, best: Tensor, inverse_temperature: Tensor) -> Tensor:
    """logits [n, m] float32; best, inverse_temperature [n] -> float64 [n, m], 0 for the best logit, growing."""
    return (best[:, None].to(torch.float64) - logits.to(torch.float64)) * inverse_temperature[:, None]


def masses(distance: Tensor) -> Tensor:
    """float64 -> int64: exp(-distance) in units of 2**-44."""
    return torch.exp(-distance).mul_(2.0**_MASS_BITS).round_().to(torch.int64)


def total_masses(logits: Tensor, rows: Tensor, best: Tensor, inverse_temperature: Tensor, group: Group) -> Tensor:
    """int64 [n], the mass of the whole vocabulary. logits: [batch, local vocabulary]; rows and the others: [n]."""
    totals = torch.zeros_like(rows)
    for part in row_parts(rows, logits.shape[1]):
        chunk = logits[rows[part]].to(torch.float32)
        totals[part] = masses(distances(chunk, best[part], inverse_temperature[part])).sum(1)
    return group.all_reduce(totals)


def prefix_lengths(distance: Tensor, plan: FilterPlan, total: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """How many of the sorted candidates each row keeps.

    distance: float64 [n, k], ascending, of the k best entries. total: int64 [n], used where plan.needs_total says so.
    Returns (int64 [n] lengths, at least 1; bool [n] where the cut may lie beyond the candidates).
    """
    k = distance.shape[1]
    cumulative = masses(distance).cumsum_(1)
    by_top_k = plan.top_k
    within_top_k = cumulative.gather(1, (by_top_k.clamp(max=k) - 1)[:, None])[:, 0]
    measured = torch.zeros_like(by_top_k, dtype=torch.bool)
    measured[plan.needs_total] = True
    limit = torch.where(measured, total, within_top_k)
    reached = (cumulative < nucleus_target(plan.top_p, limit)[:, None]).sum(1) + 1
    # The nucleus is unknown past the candidates, and with a top-k past them, whose mass nobody has added up.
    hidden = (reached > k) | (~measured & (by_top_k > k))
    by_top_p = torch.where(plan.top_p >= 1.0, _FAR, torch.where(hidden, -1, reached))
    near = (distance <= plan.max_distance[:, None]).sum(1)
    by_min_p = torch.where((plan.max_distance == float("inf")) | (near == k), _FAR, near)
    other = torch.minimum(by_top_k, by_min_p)
    # A hidden nucleus is longer than the candidates only when measured: then a shorter min-p prefix still decides.
    longer = (by_top_p == -1) & measured & (other <= k)
    length = torch.where((by_top_p == -1), torch.where(longer, other, _FAR), torch.minimum(by_top_p, other))
    undecided = (length > k) if k < vocab_size else torch.zeros_like(measured)
    return length.clamp(min=1, max=k), undecided


def nucleus_target(top_p: Tensor, limit: Tensor) -> Tensor:
    """Mass that a nucleus must reach, int64 [n]: top_p (float64) of `limit` (int64), rounded up, 1 .. limit."""
    target = torch.ceil(top_p * limit.to(torch.float64)).to(torch.int64)
    return torch.minimum(target, limit).clamp_(min=1)


@dataclass(frozen=True)
class Cuts:
    """Where rows are cut: kept is logit > value, or logit == value and id <= last_id. value float32, last_id int64."""

    value: Tensor
    last_id: Tensor

    def keep(self, logits: Tensor, ids: Tensor, part: slice) -> Tensor:
        """bool [m, ids] for rows `part` with float32 logits [m, ids]."""
        value, last_id = self.value[part, None], self.last_id[part, None]
        return (logits > value) | ((logits == value) & (ids <= last_id))


def find_cuts(
    logits: Tensor, first_id: int, plan: FilterPlan, best: Tensor, total: Tensor, inverse: Tensor, group: Group
) -> Cuts:
    """The cut of top-k and top-p of each row, by search; rows with neither keep everything.

    logits: [n, local vocabulary] float32, the rows of `plan` alone. best (float32), total (int64, as for
    `prefix_lengths`), inverse (float64, of the temperature): [n].
    """
    search = _Search(logits, first_id, best, inverse, group)
    cuts = Cuts(torch.full_like(best, float("-inf")), torch.full_like(plan.top_k, _FAR))
    limit = total.clone()
    limited = torch.ones_like(plan.top_k, dtype=torch.bool)
    limited[plan.needs_total] = False
    limited &= plan.top_k < search.vocab_size
    rows = limited.nonzero()[:, 0]
    if len(rows):
        limit[rows] = search.cut(rows, _COUNT, plan.top_k[rows], cuts)
    rows = (plan.top_p < 1.0).nonzero()[:, 0]
    if len(rows):
        search.cut(rows, _MASS, nucleus_target(plan.top_p[rows], limit[rows]), cuts)
    return cuts


_COUNT, _MASS = 0, 1


class _Search:
    """Finds the shortest prefix whose count or mass reaches a target, by histograms of both."""

    def __init__(self, logits: Tensor, first_id: int, best: Tensor, inverse: Tensor, group: Group) -> None:
        self.logits = logits
        self.first_id = first_id
        self.best = best
        self.inverse = inverse
        self.group = group
        self.vocab_size = logits.shape[1] * group.size

    def cut(self, rows: Tensor, by: int, target: Tensor, cuts: Cuts) -> Tensor:
        """Write the cuts of `rows` [n] and return the mass of what they keep, int64 [n]. target: int64 [n], >= 1."""
        bucket = torch.empty((len(rows), self.logits.shape[1]), dtype=torch.int16, device=rows.device)
        histogram = torch.zeros((len(rows), 2, _BUCKETS), dtype=torch.int64, device=rows.device)
        for part in row_parts(rows, self.logits.shape[1]):
            chunk = rows[part]
            distance = distances(self.logits[chunk], self.best[chunk], self.inverse[chunk])
            index = distance.mul(_BUCKETS_PER_NAT).clamp_(0, _BUCKETS - 1).to(torch.int64)
            bucket[part] = index
            weights = masses(distance)
            histogram[part, _COUNT].scatter_add_(1, index, torch.ones_like(weights))
            histogram[part, _MASS].scatter_add_(1, index, weights)
        found, above = _first_reaching(self.group.all_reduce(histogram), by, target)
        row, column = (bucket == found[:, None]).nonzero(as_tuple=True)  # row-major: ids ascend within a row
        value = self.logits[rows[row], column]
        # Ascending in `descending`: the largest logit first.
        descending = _LARGEST_ORDERED - ordered_bits(value).to(torch.int64)
        gap = self.best[rows[row]].to(torch.float64) - value.to(torch.float64)
        weights = masses(gap * self.inverse[rows[row]])
        for shift in _KEY_SHIFTS:
            index = (descending >> shift) & (_BUCKETS - 1)
            flat = torch.zeros((2, len(rows) * _BUCKETS), dtype=torch.int64, device=rows.device)
            flat[_COUNT].scatter_add_(0, row * _BUCKETS + index, torch.ones_like(weights))
            flat[_MASS].scatter_add_(0, row * _BUCKETS + index, weights)
            histogram = flat.view(2, len(rows), _BUCKETS).transpose(0, 1).contiguous()
            found, here = _first_reaching(self.group.all_reduce(histogram), by, target - above[:, by])
            above += here
            keep = index == found[row]
            row, column, descending, weights = row[keep], column[keep], descending[keep], weights[keep]
        at = found[:, None, None].expand(-1, 2, 1)
        run = _Run(row, column, descending, *histogram.gather(2, at)[:, :, 0].unbind(1))
        return above[:, _MASS] + self._place(rows, run, by, (target - above[:, by]).clamp(min=1), cuts)

    def _place(self, rows: Tensor, run: "_Run", by: int, rest: Tensor, cuts: Cuts) -> Tensor:
        """Keep as many entries of each row's run as bring `rest` [n], lowest ids first; returns their mass [n]."""
        each = torch.div(run.mass, run.count.clamp(min=1), rounding_mode="floor")
        unit = torch.ones_like(each) if by == _COUNT else each.clamp(min=1)
        needed = torch.minimum(torch.div(rest + unit - 1, unit, rounding_mode="floor"), run.count)
        here = torch.bincount(run.row, minlength=len(rows))
        before = self.group.all_gather(here[None])[: self.group.rank].sum(0)
        quota = torch.minimum((needed - before).clamp(min=0), here)
        last_id = torch.full_like(rows, -1)
        some = quota > 0
        last_id[some] = run.column[(here.cumsum(0) - here + quota - 1)[some]] + self.first_id
        # Every rank learns the run's logit, those that hold none of it too.
        key = torch.full_like(rows, -_FAR).scatter_reduce_(0, run.row, -run.descending, "amax")
        value = _LARGEST_ORDERED + self.group.all_reduce_max(key)
        cuts.value[rows] = from_ordered_bits(value.to(torch.int32))
        cuts.last_id[rows] = last_id
        return needed * each


@dataclass(frozen=True)
class _Run:
    """The entries of each row at its cut, all of one logit. row, column, descending: int64 [entries on this rank],
    sorted by row, then column. count, mass: int64 [n], of the entries on all ranks."""

    row: Tensor
    column: Tensor
    descending: Tensor
    count: Tensor
    mass: Tensor


def _first_reaching(histogram: Tensor, by: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """histogram [n, 2, buckets]: the first bucket at which the sum of plane `by` reaches `target` [n].

    Returns (bucket [n], [n, 2] sums of both planes before it).
    """
    cumulative = histogram.cumsum(2)
    reachable = torch.minimum(target, cumulative[:, by, -1]).clamp(min=1)
    bucket = (cumulative[:, by] < reachable[:, None]).sum(1).clamp(max=histogram.shape[2] - 1)
    at = bucket[:, None, None].expand(-1, 2, 1)
    return bucket, (cumulative - histogram).gather(2, at)[:, :, 0]


def row_parts(rows: Tensor, columns: int) -> list[slice]:
    """Cut [n] rows into parts whose temporaries stay in cache on CPU, and are few launches on GPU."""
    elements = (1 << 18) if rows.device.type == "cpu" else (1 << 24)
    step = max(1, elements // columns)
    return [slice(i, i + step) for i in range(0, len(rows), step)]
