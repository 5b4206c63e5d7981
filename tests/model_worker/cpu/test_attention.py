"""The attention kernel against a softmax written out in fp32, on random layouts."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.model_worker.int8_cache import contents, empty_int8_cache, int8_cache
from vibe_sgl_lite.model_worker.cpu import CpuKernels, LayerCache, load

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
INT8 = pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])  # what the cache holds


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    """On two threads, whatever OMP_NUM_THREADS says, so that work is split and merged."""
    loaded = load(threads=2)
    assert loaded is not None, "these tests need a C++ compiler"
    return loaded


@dataclass
class Case:
    """A step: `new[r]` tokens of row r after `contexts[r] - new[r]` cached ones."""

    query: Tensor
    cache: LayerCache
    query_start: Tensor
    context_lengths: Tensor
    page_table: Tensor
    scale: float

    def run(self, kernels: CpuKernels) -> Tensor:
        return kernels.paged_attention(
            self.query, self.cache, self.query_start, self.context_lengths, self.page_table, self.scale
        )


def make_case(
    contexts: list[int],
    new: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    int8: bool = False,
    seed: int = 0,
) -> Case:
    """Random data; pages handed out in random order; pages of no row, and the rest of a row's last page, are NaN.

    int8: what the cache holds, and what attention is then to be exact about; in place of dtype.
    """
    random = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in contexts]
    num_pages = sum(counts) + 3
    keys = torch.full((num_pages, page_size, kv_heads, head_dim), math.nan, dtype=dtype)
    values = keys.clone()
    order = torch.randperm(num_pages, generator=random).to(torch.int32)
    page_table = torch.zeros((len(contexts), max(counts) + 2), dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        page_table[row, :count] = order[used : used + count]
        used += count
        for position in range(contexts[row]):
            page = page_table[row, position // page_size]
            keys[page, position % page_size] = torch.randn((kv_heads, head_dim), generator=random).to(dtype)
            values[page, position % page_size] = torch.randn((kv_heads, head_dim), generator=random).to(dtype)
    query_start = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    query = torch.randn((sum(new), heads, head_dim), generator=random).to(dtype)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    cache = int8_cache(keys, values) if int8 else LayerCache(keys, values)
    return Case(query, cache, query_start, lengths, page_table, head_dim**-0.5)


def expected(case: Case) -> Tensor:
    """Token by token, head by head, softmax in fp32. Zero for padding."""
    keys, values = contents(case.cache)
    page_size, group = keys.shape[1], case.query.shape[1] // keys.shape[2]
    out = torch.zeros(case.query.shape, dtype=torch.float32)
    for row, context in enumerate(case.context_lengths.tolist()):
        start, end = int(case.query_start[row]), int(case.query_start[row + 1])
        pages = case.page_table[row, : -(-context // page_size)].long()
        k = keys[pages].flatten(0, 1)[:context].repeat_interleave(group, 1)
        v = values[pages].flatten(0, 1)[:context].repeat_interleave(group, 1)
        for token in range(start, end if context else start):
            seen = context - (end - token) + 1
            scores = torch.einsum("hd,chd->hc", case.query[token].float(), k[:seen]) * case.scale
            out[token] = torch.einsum("hc,chd->hd", scores.softmax(-1), v[:seen])
    return out


def check(kernels: CpuKernels, case: Case, tolerance: float | None = None) -> None:
    out = case.run(kernels)
    assert out.dtype == case.query.dtype
    tolerance = TOLERANCE[out.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(out.float(), expected(case), atol=tolerance, rtol=tolerance)


@INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (8, 2), (10, 2), (8, 1), (16, 1), (24, 12), (32, 4)]
)
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_decode_rows(
    kernels: CpuKernels, dtype: torch.dtype, heads: int, kv_heads: int, page_size: int, int8: bool
) -> None:
    case = make_case(
        [1, 2, 15, 16, 17, 31, 32, 33, 64, 130],
        [1] * 10,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        page_size=page_size,
        dtype=dtype,
        int8=int8,
    )
    check(kernels, case)


@INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 80, 96, 128, 256])
def test_head_dims(kernels: CpuKernels, dtype: torch.dtype, head_dim: int, int8: bool) -> None:
    case = make_case(
        [1, 50, 90], [1, 1, 60], heads=4, kv_heads=2, head_dim=head_dim, page_size=16, dtype=dtype, int8=int8
    )
    check(kernels, case)


@INT8
@pytest.mark.parametrize("seed", range(25))
def test_decode_and_chunk_rows_in_one_call(kernels: CpuKernels, seed: int, int8: bool) -> None:
    random = torch.Generator().manual_seed(1000 + seed)

    def pick(options: list[int]) -> int:
        return options[int(torch.randint(len(options), (1,), generator=random))]

    contexts, new = [], []
    for _ in range(pick([1, 3, 6])):
        fresh = pick([1, 1, 1, 2, 7, 16, 33, 100, 190])
        new.append(fresh)
        contexts.append(fresh + pick([0, 0, 1, 31, 150, 300]))
    if seed % 3 == 0:
        contexts.insert(1, 0)  # padding
        new.insert(1, 1)
    if seed % 5 == 0:
        contexts.append(20)  # a row that does nothing in this step
        new.append(0)
    kv_heads = pick([1, 2, 3])
    case = make_case(
        contexts,
        new,
        heads=kv_heads * pick([1, 2, 4, 5, 8]),
        kv_heads=kv_heads,
        head_dim=pick([32, 64, 128]),
        page_size=pick([1, 4, 16, 64]),
        dtype=torch.bfloat16 if seed % 2 else torch.float32,
        int8=int8,
        seed=seed,
    )
    check(kernels, case)


@INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_split_and_merged(kernels: CpuKernels, dtype: torch.dtype, int8: bool) -> None:
    case = make_case([1500, 70], [1, 1], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=dtype, int8=int8)
    check(kernels, case)


@INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("new", "page_size"), [*itertools.product((2, 5, 40), (4, 16, 64)), (300, 16)])
def test_chunks_of_long_contexts(kernels: CpuKernels, dtype: torch.dtype, page_size: int, new: int, int8: bool) -> None:
    case = make_case(
        [1700, 1100, 40], [new, 1, 9], heads=10, kv_heads=5, head_dim=32, page_size=page_size, dtype=dtype, int8=int8
    )
    check(kernels, case)


@INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(1, 1, 8, 1), (6, 2, 24, 256), (10, 2, 40, 4), (7, 1, 64, 16), (8, 1, 128, 256)],
)
def test_chunks_at_the_edges_of_blocks(
    kernels: CpuKernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int, int8: bool
) -> None:
    """Of keys, of queries, of the registers that they fill; a whole prompt, and a chunk behind what is cached."""
    case = make_case(
        [4, 5, 127, 128, 129, 130, 257, 300],
        [4, 5, 127, 5, 129, 4, 67, 13],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        int8=int8,
    )
    check(kernels, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_a_chunk_sees_nothing_behind_it(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Whatever score those behind it would have: the keys of every second token are its query, 300 times."""
    case = make_case([150], [150], heads=2, kv_heads=1, head_dim=64, page_size=16, dtype=dtype)
    before = case.run(kernels)
    for position in range(75, 150):
        page = int(case.page_table[0, position // 16])
        case.cache.keys[page, position % 16, 0] = case.query[position // 2, 0] * 300
    after = case.run(kernels)
    assert torch.equal(before[:75], after[:75])
    assert not torch.equal(before[75:], after[75:])


@INT8
def test_fp32_chunks_do_not_depend_on_the_batch(kernels: CpuKernels, int8: bool) -> None:
    new = [3, 20, 1, 150]
    case = make_case(
        [700, 90, 333, 1400], new, heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32, int8=int8
    )
    together = case.run(kernels)
    for row, count in enumerate(new):
        begin = int(case.query_start[row])
        alone = kernels.paged_attention(
            case.query[begin : begin + count],
            case.cache,
            torch.tensor([0, count], dtype=torch.int32),
            case.context_lengths[row : row + 1],
            case.page_table[row : row + 1],
            case.scale,
        )
        assert torch.equal(alone, together[begin : begin + count])


@INT8
def test_fixed_ranges_make_a_row_independent_of_its_batch(kernels: CpuKernels, int8: bool) -> None:
    case = make_case(
        [700, 90, 333], [1, 1, 1], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=torch.bfloat16, int8=int8
    )
    together = case.run(kernels)
    for row in range(3):
        alone = kernels.paged_attention(
            case.query[row : row + 1],
            case.cache,
            torch.tensor([0, 1], dtype=torch.int32),
            case.context_lengths[row : row + 1],
            case.page_table[row : row + 1],
            case.scale,
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 40])
def test_large_scores_do_not_overflow(kernels: CpuKernels, dtype: torch.dtype, new: int) -> None:
    case = make_case([300], [new], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=dtype)
    case.query.mul_(300)
    check(kernels, case, tolerance=2e-2)  # scores of 1000 have few digits left behind the point


def test_query_may_be_a_slice_of_the_packed_projection(kernels: CpuKernels) -> None:
    case = make_case([40, 9], [4, 1], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype=torch.bfloat16)
    packed = torch.randn((5, 8, 64)).to(torch.bfloat16)
    packed[:, :4] = case.query
    case.query = packed[:, :4]
    check(kernels, case)


def store(kernels: CpuKernels, case: Case, cache: LayerCache) -> Tensor:
    """Put the case's only row into `cache` as the engine does, keys normalised and not turned; returns its slots."""
    keys, values = contents(case.cache)
    page_size, head_dim = keys.shape[1], keys.shape[3]
    positions = torch.arange(int(case.context_lengths[0]))
    slots = case.page_table[0, positions // page_size].long() * page_size + positions % page_size
    tokens = torch.cat([stored.flatten(0, 1)[slots].to(case.query.dtype) for stored in (keys, keys, values)], 1)
    weight = torch.ones(head_dim, dtype=case.query.dtype)
    cos = torch.ones((len(slots), head_dim // 2), dtype=case.query.dtype)
    kernels.qkv_rope_store(tokens.flatten(1), weight, weight, 0.0, cos, torch.zeros_like(cos), cache, slots)
    return slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_then_attend(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Keys and values stored by slot, from slices of a packed projection, are those that are attended to."""
    case = make_case([37], [1], heads=4, kv_heads=2, head_dim=64, page_size=4, dtype=dtype)
    keys, values = case.cache.keys, case.cache.values
    empty = LayerCache(torch.full_like(keys, math.nan), torch.full_like(values, math.nan))
    slots = store(kernels, case, empty)
    norms = keys.float().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(empty.keys.float(), keys.float() / norms, atol=0, rtol=2**-7, equal_nan=True)
    assert torch.equal(empty.values.flatten(0, 1)[slots], values.flatten(0, 1)[slots])
    assert torch.equal(empty.values.isnan(), values.isnan())
    case.cache = empty
    check(kernels, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 40])
def test_store_then_attend_in_int8(kernels: CpuKernels, dtype: torch.dtype, new: int) -> None:
    case = make_case([90], [new], heads=4, kv_heads=2, head_dim=64, page_size=4, dtype=dtype)
    plain = LayerCache(case.cache.keys.clone(), case.cache.values.clone())
    store(kernels, case, plain)
    wanted, cache = int8_cache(plain.keys, plain.values), empty_int8_cache(*case.cache.keys.shape)
    slots = store(kernels, case, cache)
    case.cache = cache
    for stored, expected_content in zip(contents(case.cache), contents(wanted), strict=True):
        assert torch.equal(stored.flatten(0, 1)[slots], expected_content.flatten(0, 1)[slots])
    check(kernels, case)
