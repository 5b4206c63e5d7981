"""Where top-k, top-p and min-p cut a row's distribution, decided exactly and the same on every rank.

What a filter keeps is always a prefix of the row ordered by (logit descending, id ascending). A token's *distance* is
(best logit - logit) / temperature, its *mass* exp(-distance) as an integer multiple of 2**-44. Integers add up to the
same sum in any order, so a prefix's mass depends neither on the batch nor on how the vocabulary is split over ranks,
and the two ways here give the same answer: sorted candidates where the prefix is short (`prefix_lengths`), and
histograms of count and mass, summed over ranks and refined within the one bucket that holds the cut (`find_cuts`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.sampling.candidates import RowSet, from_ordered_bits, ordered_bits
from vibe_sgl_lite.model_worker.sampling.slots import FilterPlan
from vibe_sgl_lite.qwen3.layers.parallel_state import Group

_MASS_BITS = 44
MAX_VOCAB = 1 << (62 - _MASS_BITS)  # so that a whole row's mass fits an int64

_BUCKETS = 2048
_BUCKETS_PER_NAT = 64.0  # of the first histogram: distances up to 32 nats, the rest in the last bucket
_KEY_SHIFTS = (24, 16, 8, 0)  # then by the bits of the logit, eight at a time
_KEY_BUCKETS = 256
_LARGEST_ORDERED = (1 << 31) - 1
_FAR = 1 << 62  # no limit


def distances(values: Tensor, best: Tensor, inverse_temperature: Tensor) -> Tensor:
    """values: logits [n, m] as float64, overwritten; best (float32), inverse_temperature (float64): [n].

    Returns float64 [n, m], 0 for the best logit.
    """
    return values.sub_(best[:, None]).mul_(-inverse_temperature[:, None])


def masses(distance: Tensor) -> Tensor:
    """float64 -> int64: exp(-distance) in units of 2**-44, rounded down."""
    return torch.rsub(distance, _MASS_BITS * math.log(2.0)).exp_().to(torch.int64)


def total_masses(rows: RowSet, best: Tensor, inverse_temperature: Tensor, group: Group) -> Tensor:
    """int64 [n], the mass of the whole vocabulary of each row. best, inverse_temperature: [n]."""
    totals = torch.zeros_like(rows.rows)
    for part in rows.parts():
        totals[part] = masses(distances(rows.values(part), best[part], inverse_temperature[part])).sum(1)
    return group.all_reduce(totals)


def lowest_kept(best: Tensor, inverse_temperature: Tensor, max_distance: Tensor) -> Tensor:
    """float32 [n]: the lowest logit within max_distance of the best one (float64 arithmetic, then rounded up)."""
    lowest = best.to(torch.float64) - max_distance / inverse_temperature
    rounded = lowest.to(torch.float32)
    above = torch.nextafter(rounded, torch.full_like(rounded, float("inf")))
    return torch.where(rounded.to(torch.float64) < lowest, above, rounded)


def prefix_lengths(
    values: Tensor, inverse_temperature: Tensor, plan: FilterPlan, total: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """How many of its best entries each row keeps.

    values: float32 [n, k], the k best logits, descending. inverse_temperature: float64 [n].
    total: int64 [n], used where plan.needs_total says so.
    Returns (int64 [n] lengths, at least 1; bool [n] where the cut may lie beyond the k entries).
    """
    k = values.shape[1]
    best = values[:, 0]
    cumulative = masses(distances(values.to(torch.float64), best, inverse_temperature)).cumsum_(1)
    measured = torch.zeros_like(plan.top_k, dtype=torch.bool)
    measured[plan.needs_total] = True
    within_top_k = cumulative.gather(1, (plan.top_k.clamp(max=k) - 1)[:, None])[:, 0]
    target = nucleus_target(plan.top_p, torch.where(measured, total, within_top_k))
    nucleus = (cumulative < target[:, None]).sum(1) + 1
    near = (values >= lowest_kept(best, inverse_temperature, plan.max_distance)[:, None]).sum(1)
    # A length above k says no more than that. A top-k above k has a mass that nobody has added up: so has its nucleus.
    nucleus = torch.where(plan.top_p < 1.0, nucleus, _FAR)
    unknown = (plan.top_p < 1.0) & ~measured & (plan.top_k > k)
    near = torch.where(near == k, _FAR, near)
    lengths = torch.minimum(torch.minimum(plan.top_k, nucleus), near)
    undecided = (lengths > k) | unknown if k < vocab_size else torch.zeros_like(measured)
    return lengths.clamp(min=1, max=k), undecided


def nucleus_target(top_p: Tensor, limit: Tensor) -> Tensor:
    """Mass that a nucleus must reach, int64 [n]: top_p (float64) of `limit` (int64), rounded up, 1 .. limit."""
    target = torch.ceil(top_p * limit.to(torch.float64)).to(torch.int64)
    return torch.minimum(target, limit).clamp_(min=1)


@dataclass(frozen=True)
class Cuts:
    """Where rows are cut: kept is logit > value, or logit == value and id <= last_id. value float32, last_id int64."""

    value: Tensor
    last_id: Tensor

    def drop(self, values: Tensor, ids: Tensor, part: slice) -> Tensor:
        """values: float64 [m, ids], logits of rows `part` -> the same with -inf for what is not kept."""
        value = self.value[part, None]
        above = torch.nextafter(value, torch.full_like(value, float("inf")))
        lowest = torch.where(ids <= self.last_id[part, None], value.to(torch.float64), above.to(torch.float64))
        return torch.where(values >= lowest, values, float("-inf"))


def find_cuts(
    rows: RowSet,
    first_id: int,
    plan: FilterPlan,
    best: Tensor,
    total: Tensor,
    inverse: Tensor,
    group: Group,
    vocab_size: int,
) -> Cuts:
    """The cut of each row's filters, by search.

    rows: those of `plan`. best (float32), total (int64, as for `prefix_lengths`), inverse (float64, of the
    temperature): [n]. vocab_size: of all ranks.
    """
    cuts = Cuts(torch.full_like(best, float("-inf")), torch.full_like(plan.top_k, _FAR))
    limit = total.clone()
    counted = (plan.top_k < vocab_size).nonzero()[:, 0]
    if len(counted):
        search = _Search(rows.subset(counted), first_id, best[counted], inverse[counted], group)
        limit[counted] = search.cut(_COUNT, plan.top_k[counted], cuts, counted)
    weighed = (plan.top_p < 1.0).nonzero()[:, 0]
    if len(weighed):
        search = _Search(rows.subset(weighed), first_id, best[weighed], inverse[weighed], group)
        search.cut(_MASS, nucleus_target(plan.top_p[weighed], limit[weighed]), cuts, weighed)
    lowest = lowest_kept(best, inverse, plan.max_distance)
    nearer = lowest > cuts.value
    return Cuts(torch.where(nearer, lowest, cuts.value), cuts.last_id.masked_fill(nearer, _FAR))


_COUNT, _MASS = 0, 1


@dataclass(frozen=True)
class _Search:
    """Finds, for each of n rows, the shortest prefix whose count or mass reaches a target, by histograms of both."""

    rows: RowSet
    first_id: int
    best: Tensor
    inverse: Tensor
    group: Group

    def cut(self, by: int, target: Tensor, cuts: Cuts, places: Tensor) -> Tensor:
        """Write the n cuts to `places` of `cuts` and return the mass of what they keep, int64 [n].

        target: int64 [n], 1 or more. With by=_MASS no counts are made before the last histogram, nor needed.
        """
        n = len(target)
        bucket = torch.empty((n, self.rows.logits.shape[1]), dtype=torch.int16, device=target.device)
        histogram = torch.zeros((n, 2, _BUCKETS), dtype=torch.int64, device=target.device)
        for part in self.rows.parts():
            distance = distances(self.rows.values(part), self.best[part], self.inverse[part])
            weights = masses(distance)
            index = distance.mul_(_BUCKETS_PER_NAT).clamp_(0, _BUCKETS - 1).to(torch.int64)
            index.clamp_(min=0)  # what became of a NaN; its row fails, but must not stop the others
            bucket[part] = index
            histogram[part, _MASS].scatter_add_(1, index, weights)
            if by == _COUNT:
                histogram[part, _COUNT].scatter_add_(1, index, torch.ones_like(weights))
        found, above = _first_reaching(self.group.all_reduce(histogram), by, target)
        # Row-major, so ids ascend within a row.
        row, column = (bucket == found[:, None].to(torch.int16)).nonzero(as_tuple=True)
        value = self.rows.logits[self.rows.rows[row], column].to(torch.float32)
        descending = _LARGEST_ORDERED - ordered_bits(value).to(torch.int64)  # ascends as logits descend
        weights = masses(distances(value.to(torch.float64)[:, None], self.best[row], self.inverse[row]))[:, 0]
        for shift in _KEY_SHIFTS:
            index = (descending >> shift) & (_KEY_BUCKETS - 1)
            flat = torch.zeros((2, n * _KEY_BUCKETS), dtype=torch.int64, device=target.device)
            flat[_COUNT].scatter_add_(0, row * _KEY_BUCKETS + index, torch.ones_like(weights))
            flat[_MASS].scatter_add_(0, row * _KEY_BUCKETS + index, weights)
            histogram = self.group.all_reduce(flat).view(2, n, _KEY_BUCKETS).transpose(0, 1)
            found, before = _first_reaching(histogram, by, target - above[:, by])
            above += before
            keep = index == found[row]
            row, column, descending, weights = row[keep], column[keep], descending[keep], weights[keep]
        at = found[:, None, None].expand(-1, 2, 1)
        run = _Run(row, column, descending, *histogram.gather(2, at)[:, :, 0].unbind(1))
        return above[:, _MASS] + self._place(run, by, (target - above[:, by]).clamp(min=1), cuts, places)

    def _place(self, run: "_Run", by: int, rest: Tensor, cuts: Cuts, places: Tensor) -> Tensor:
        """Keep as many entries of each row's run as bring `rest` [n], lowest ids first; returns their mass [n]."""
        each = torch.div(run.mass, run.count.clamp(min=1), rounding_mode="floor")
        unit = torch.ones_like(each) if by == _COUNT else each.clamp(min=1)
        needed = torch.minimum(torch.div(rest + unit - 1, unit, rounding_mode="floor"), run.count)
        here = torch.bincount(run.row, minlength=len(rest))
        before = self.group.all_gather(here[None])[: self.group.rank].sum(0)
        quota = torch.minimum((needed - before).clamp(min=0), here)
        last_id = torch.full_like(rest, -1)
        some = quota > 0
        last_id[some] = run.column[(here.cumsum(0) - here + quota - 1)[some]] + self.first_id
        # Every rank learns the run's logit, those that hold none of it too.
        key = torch.full_like(rest, -_FAR).scatter_reduce_(0, run.row, -run.descending, "amax")
        value = _LARGEST_ORDERED + self.group.all_reduce_max(key)
        cuts.value[places] = from_ordered_bits(value.to(torch.int32))
        cuts.last_id[places] = last_id
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
    return bucket, (cumulative.gather(2, at) - histogram.gather(2, at))[:, :, 0]
