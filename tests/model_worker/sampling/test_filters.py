"""What top-k, top-p and min-p keep: against the reference and transformers, by both ways of cutting, on any ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.model_worker.sampling.reference import kept_mask, on_ranks, params
from vibe_sgl_lite.model_worker.device import CpuDevice
from vibe_sgl_lite.model_worker.sampling.candidates import BlockMaxima, RowSet, argmax, pack, top_over_ranks, unpack
from vibe_sgl_lite.model_worker.sampling.nucleus import find_cuts, prefix_lengths, total_masses
from vibe_sgl_lite.model_worker.sampling.slots import SlotSampling
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, shard
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_k": 256},
    {"top_k": 257},
    {"top_k": 900},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"top_p": 0.9999},
    {"min_p": 0.001},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.81},
    {"top_k": 700, "top_p": 0.77},
    {"top_k": 900, "min_p": 0.05},
    {"top_p": 0.97, "min_p": 0.02},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 800, "top_p": 0.9, "min_p": 0.0005},
]


def kept(logits: Tensor, rows: list[ResolvedSampling], *, search: bool, group: Group | None = None) -> Tensor:
    """bool [n, local vocabulary]: by search for all rows, or by sorted candidates where they suffice."""
    group = group or Group()
    vocab_size = logits.shape[1]
    vocab = shard(vocab_size, group)
    slots = SlotSampling(len(rows), vocab_size, vocab, CpuDevice())
    for slot, p in enumerate(rows):
        slots.admit(slot, p, 0)
    plan = slots.plan(np.arange(len(rows)))
    assert plan.filtered is not None
    assert len(plan.filtered.rows) == len(rows)
    filters, inverse = plan.filtered, plan.inverse_temperature
    local = logits[:, vocab].contiguous()
    everything = RowSet(local, filters.rows)
    values, ids = unpack(top_over_ranks(BlockMaxima(local, vocab.start).top(filters.rows, filters.candidates), group))
    best = values[:, 0].contiguous()
    total = total_masses(everything, best, inverse, group)
    cuts = find_cuts(everything, vocab.start, filters, best, total, inverse, group, vocab_size)
    dropped = cuts.drop(local.to(torch.float64), torch.arange(vocab.start, vocab.stop), slice(0, len(rows)))
    by_search = dropped > float("-inf")
    if search:
        return by_search
    lengths, undecided = prefix_lengths(values, inverse, filters, total, vocab_size)
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask.scatter_(1, ids, torch.arange(filters.candidates) < lengths[:, None])
    return torch.where(undecided[:, None], by_search, mask[:, vocab])


def make_logits(kind: str, rows: int, vocab_size: int) -> Tensor:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "ties":
        return (logits * 3).round() / 3
    if kind == "equal":
        return torch.zeros_like(logits)
    if kind == "spread":
        return logits * 30
    return logits * {"flat": 0.5, "peaked": 4.0}[kind]


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "equal", "spread"])
@pytest.mark.parametrize("search", [False, True])
def test_kept_equals_reference(kind: str, search: bool) -> None:
    rows = [params(temperature=t, **fields) for fields in FILTERS for t in (0.5, 1.0, 1.7)]
    logits = make_logits(kind, len(rows), 1000)
    expected = [kept_mask(x.double().numpy(), p) for x, p in zip(logits, rows, strict=True)]
    actual = kept(logits, rows, search=search)
    assert [int(x.sum()) for x in actual] == [int(x.sum()) for x in expected]
    assert torch.equal(actual, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("kind", ["flat", "ties", "equal"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("search", [False, True])
def test_ranks_keep_what_one_rank_keeps(kind: str, size: int, search: bool) -> None:
    rows = [params(**fields) for fields in FILTERS]
    logits = make_logits(kind, len(rows), 1000)
    parts = on_ranks(size, lambda group: kept(logits, rows, search=search, group=group))
    assert torch.equal(torch.cat(parts, dim=1), kept(logits, rows, search=search))


def test_kept_equals_reference_on_the_real_vocabulary() -> None:
    rows = [params(temperature=0.9, **fields) for fields in FILTERS[::2]]
    logits = make_logits("flat", len(rows), 151_936)
    expected = np.stack([kept_mask(x.double().numpy(), p) for x, p in zip(logits, rows, strict=True)])
    assert torch.equal(kept(logits, rows, search=False), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_kept_equals_transformers(kind: str) -> None:
    """Without ties, where transformers keeps every equal of the last one."""
    rows = [params(temperature=t, **fields) for fields in FILTERS for t in (0.6, 1.3)]
    logits = make_logits(kind, len(rows), 1000)
    actual = kept(logits, rows, search=False)
    for x, p, mask in zip(logits, rows, actual, strict=True):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
        if p.top_k > 0:
            warpers.append(TopKLogitsWarper(p.top_k))
        if p.top_p < 1:
            warpers.append(TopPLogitsWarper(p.top_p))
        if p.min_p > 0:
            warpers.append(MinPLogitsWarper(p.min_p))
        scores = warpers(torch.LongTensor([[0]]), torch.DoubleTensor(x[None].double()))
        assert torch.equal(mask, scores[0] > float("-inf"))


def test_min_p_keeps_all_equals_and_top_p_the_lowest_ids() -> None:
    logits = torch.zeros(2, 300)
    logits[:, 10:20] = 3.0
    minimum, nucleus = kept(logits, [params(min_p=0.9), params(top_p=0.2)], search=False)
    assert minimum.nonzero()[:, 0].tolist() == list(range(10, 20))
    assert nucleus.nonzero()[:, 0].tolist() == list(range(10, 15))  # 0.2 x (200.9 + 290) = 98.2 = 4.9 x 20.09


def test_keys_order_as_logits_do_then_by_id() -> None:
    values = torch.tensor([float("-inf"), -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, 3e38, float("inf")])
    keys = pack(values[:, None], torch.tensor([0, 1, 151_935]))
    assert (keys[:, :-1] > keys[:, 1:]).all()  # a higher id ranks lower
    assert torch.equal(keys[4], keys[5])
    rest = torch.cat([keys[:4], keys[5:]])
    assert (rest[1:].amin(1) > rest[:-1].amax(1)).all()
    back, ids = unpack(keys)
    assert torch.equal(back, values[:, None].expand(-1, 3))
    assert ids[0].tolist() == [0, 1, 151_935]


@pytest.mark.parametrize("columns", [3, 64, 100, 640, 5000])
def test_top_and_argmax_equal_a_stable_sort(columns: int) -> None:
    logits = (torch.randn(20, columns) * 2).round()
    order = logits.sort(stable=True, dim=1, descending=True).indices
    for k in (1, 2, min(columns, 70), columns):
        rows = torch.tensor([0, 3, 19])
        keys = BlockMaxima(logits, 1000).top(rows, k)
        assert torch.equal(unpack(keys)[1], order[rows, :k] + 1000)
    values, indices = argmax(logits)
    assert torch.equal(indices, order[:, 0])
    assert torch.equal(values, logits.amax(1))
