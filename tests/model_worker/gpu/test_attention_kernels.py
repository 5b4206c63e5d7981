"""The paged attention kernels against torch's attention over the same contexts, gathered."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vibe_sgl_lite.model_worker.gpu.kernels.cache import LayerCache
from vibe_sgl_lite.model_worker.gpu.kernels.chain_attention import chain_attention
from vibe_sgl_lite.model_worker.gpu.kernels.decode_attention import (
    NO_ROW,
    DecodeScratch,
    DecodeTiles,
    NewTokens,
    choose_tiles,
    decode_attention,
)
from vibe_sgl_lite.model_worker.gpu.kernels.prefill_attention import PrefillTiles, plan_tiles, prefill_attention
from vibe_sgl_lite.model_worker.gpu.kernels.rope_store import rope_store
from vibe_sgl_lite.qwen3.layers.rotary import RotaryEmbedding

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    """A cache with NaN wherever no row's context lies, and rows of given context lengths in scattered pages."""

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    cache: LayerCache

    @classmethod
    def make(
        cls, lengths: list[int], page: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> "Case":
        generator = torch.Generator().manual_seed(sum(lengths) + page)
        pages = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(pages) + 1, generator=generator).tolist()
        # Layers lie between pages, as in a pool that keeps all that belongs to a page together.
        pool = torch.full((sum(pages) + 1, 3, page, kv_heads, dim), float("nan"), dtype=dtype, device=device)
        table = torch.full((len(lengths), max(pages) + 2), 10**6, dtype=torch.int32)  # not to be read
        for row, length in enumerate(lengths):
            for index in range(pages[row]):
                table[row, index] = order.pop()
                here = min(page, length - index * page)
                new = torch.randn((2, here, kv_heads, dim), generator=generator)
                pool[int(table[row, index]), :2, :here] = new.to(device, dtype)
        numbers = torch.tensor(lengths, dtype=torch.int32, device=device)
        keys, values = pool[:, 0], pool[:, 1]
        return cls(keys, values, table.to(device), numbers, LayerCache(keys, values))

    def in_codes(self, dtype: torch.dtype) -> "Case":
        """Codes, and behind a page's codes its scales; keys and values become what that says."""
        pages, page, kv_heads, dim = self.keys.shape
        codes = page * kv_heads * dim
        pool = torch.empty((pages, 2, codes + page * kv_heads * 4), dtype=torch.int8, device=self.keys.device)
        parts, said = [], []
        for kind, x in enumerate((self.keys.float(), self.values.float())):
            scales = x.abs().amax(-1) / (448 if dtype == FP8 else 127)
            rounded = x / scales[..., None]
            rounded = rounded.to(FP8) if dtype == FP8 else rounded.nan_to_num(5.0).round().to(torch.int8)
            parts.append(pool[:, kind, :codes].view(pages, page, kv_heads, dim).copy_(rounded.view(torch.int8)))
            said.append(rounded.float() * scales[..., None])
            kept = pool[:, kind].view(torch.float32)[:, -page * kv_heads :].view(pages, kv_heads, page)
            parts.append(kept.copy_(scales.transpose(1, 2)))
        cache = LayerCache.of_codes(parts[0], parts[2], parts[1], parts[3], integers=dtype == torch.int8)
        return replace(self, keys=said[0], values=said[1], cache=cache)

    def fresh(self, starts: NDArray[np.int32], heads: int, dtype: torch.dtype) -> Tensor:
        """What `rope_store` leaves of the last tokens of each row, which the cache then has no more."""
        assert self.cache.key_scales is not None
        assert self.cache.value_scales is not None
        page, kv_heads, dim = self.keys.shape[1:]
        lines = torch.full(
            (int(starts[-1]), heads + 2 * kv_heads, dim), float("nan"), dtype=dtype, device=self.keys.device
        )
        for row, context in enumerate(self.lengths.tolist()):
            count = int(starts[row + 1] - starts[row])
            for new in range(count):
                position = context - count + new
                at, inside = self.table[row, position // page].long(), position % page
                lines[starts[row] + new, heads : heads + kv_heads] = self.keys[at, inside]
                lines[starts[row] + new, heads + kv_heads :] = self.values[at, inside]
                self.cache.key_scales[at, :, inside] = self.cache.value_scales[at, :, inside] = float("nan")
        return lines.flatten(1)

    def expected(self, query: Tensor, row: int, context: int) -> Tensor:
        """query [n, heads, dim], the last n of `context` tokens -> [n, heads x dim]."""
        page = self.keys.shape[1]
        pages = self.table[row, : -(-context // page)].long()
        keys, values = (x[pages].flatten(0, 1)[:context].double().transpose(0, 1) for x in (self.keys, self.values))
        group = query.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        n = len(query)
        mask = torch.ones((n, context), dtype=torch.bool, device=query.device).tril(context - n)
        attended = F.scaled_dot_product_attention(query.double().transpose(0, 1), keys, values, attn_mask=mask)
        return attended.transpose(0, 1).flatten(1)


def made(
    lengths: list[int], page: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Case, torch.dtype]:
    """And the dtype of the queries."""
    if dtype in (FP8, torch.int8):
        return Case.make(lengths, page, kv_heads, dim, torch.float16, device).in_codes(dtype), torch.float16
    return Case.make(lengths, page, kv_heads, dim, dtype, device), dtype


def run_decode(case: Case, query: Tensor, tiles: DecodeTiles) -> Tensor:
    rows, heads, dim = query.shape
    kv_heads = case.keys.shape[2]
    output = torch.full((rows, heads * dim), float("nan"), dtype=query.dtype, device=query.device)
    scratch = DecodeScratch(kv_heads, heads // kv_heads, dim, query.device, places=rows * tiles.splits)
    order = case.lengths.argsort(descending=True).to(torch.int32)
    flat = query.flatten(1)
    for _ in range(2):  # the second finds what the first left behind
        decode_attention(flat, case.cache, case.table, case.lengths, order, scratch, output, pdl=False, tiles=tiles)
    assert not scratch.arrived.any()
    return output


@pytest.mark.parametrize(
    ("page", "kv_heads", "group", "dim", "dtype", "tiles"),
    [
        (16, 2, 2, 64, torch.float32, DecodeTiles(16, 4, 2, 1)),
        (16, 1, 8, 64, torch.float16, DecodeTiles(32, 4, 2, 4)),
        (64, 2, 3, 64, torch.float16, DecodeTiles(64, 4, 2, 1)),
        (64, 2, 3, 64, FP8, DecodeTiles(64, 4, 3, 1)),
        (16, 1, 2, 64, torch.int8, DecodeTiles(32, 4, 2, 4)),
        (256, 1, 2, 128, torch.float16, DecodeTiles(64, 2, 2, 2)),
        (6, 1, 5, 32, torch.float32, DecodeTiles(16, 4, 2, 2)),
    ],
)
def test_decode_equals_torch(
    page: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, tiles: DecodeTiles, device: torch.device
) -> None:
    lengths = [1, page, page + 1, 3 * page - 1 if page < 64 else page + 37]
    case, dtype = made(lengths, page, kv_heads, dim, dtype, device)
    query = torch.randn((len(lengths), kv_heads * group, dim), device=device).to(dtype)
    output = run_decode(case, query, tiles)
    for row, length in enumerate(lengths):
        expected = case.expected(query[row : row + 1], row, length)
        torch.testing.assert_close(
            output[row : row + 1].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize(
    ("width", "group", "dtype", "tiles"),
    [
        (3, 2, torch.float32, DecodeTiles(16, 4, 2, 1)),
        (8, 2, torch.float16, DecodeTiles(16, 4, 2, 4)),
        (5, 4, torch.float16, DecodeTiles(32, 4, 2, 2)),
        (4, 2, torch.int8, DecodeTiles(32, 4, 2, 4)),
    ],
)
def test_rows_with_drafts_equal_torch(
    width: int, group: int, dtype: torch.dtype, tiles: DecodeTiles, device: torch.device
) -> None:
    """Of `width` tokens, of which some are nobody's: these are at position 0, and what they get is finite."""
    page, kv_heads, dim = 16, 2, 32
    lengths, counts = [40, width, 17, 0], [width, width, 2, 0]
    case, dtype = made([40, width, 17, 1], page, kv_heads, dim, dtype, device)
    case.lengths[3] = 0
    query = torch.randn((4, width, kv_heads * group, dim), device=device).to(dtype)
    positions = torch.zeros((4, width), dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        positions[row, :count] = torch.arange(length - count, length)
    scratch = DecodeScratch(kv_heads, group, dim, device, places=4 * width * tiles.splits)
    output = torch.full((4 * width, kv_heads * group * dim), float("nan"), dtype=dtype, device=device)
    order = case.lengths.argsort(descending=True).to(torch.int32)
    for _ in range(2):
        decode_attention(
            query.view(4 * width, -1), case.cache, case.table, case.lengths, order, scratch, output, pdl=False,
            tiles=tiles, positions=positions.view(-1).to(device),
        )  # fmt: skip
    assert not scratch.arrived.any()
    assert torch.isfinite(output).all()
    by_row = output.view(4, width, -1)
    assert not by_row[3].any()
    for row in range(3):
        got, expected = by_row[row, : counts[row]], case.expected(query[row, : counts[row]], row, lengths[row])
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_tokens_at_positions_have_the_same_bits_in_any_launch(dtype: torch.dtype, device: torch.device) -> None:
    """A chunk, a decode row, one with drafts of which two are nobody's and padding together; and each token alone."""
    page, kv_heads, group, dim = 16, 2, 2, 32
    lengths, counts = [45, 9, 30, 1], [40, 1, 6, 1]
    case, dtype = made(lengths, page, kv_heads, dim, dtype, device)
    case.lengths[2], case.lengths[3] = 28, 0
    starts = np.cumsum([0, *counts]).astype(np.int32)
    query = torch.randn((int(starts[-1]), kv_heads * group, dim), device=device).to(dtype)
    positions = torch.zeros(len(query), dtype=torch.int32)
    positions[:40], positions[40], positions[41:45] = torch.arange(5, 45), 8, torch.arange(24, 28)
    cut = PrefillTiles(16, 16, 4, 2)

    def attend(lines: slice, row: int | None) -> Tensor:
        x, at = query[lines].flatten(1), positions[lines].to(device)
        output = torch.full_like(x, float("nan"))
        rows = np.arange(4, dtype=np.int32) if row is None else np.array([row], np.int32)
        query_start = starts.copy()
        if row is not None:
            query_start[: row + 1], query_start[row + 1 :] = 0, len(x)
        tiles = torch.from_numpy(plan_tiles(query_start, rows, cut.rows // group)).to(device)
        lengths_now = case.lengths.clone()
        if row is not None and row < 3:
            lengths_now[row] = at.max() + 1
        prefill_attention(
            x, case.cache, case.table, lengths_now, torch.from_numpy(query_start).to(device), tiles, cut, output,
            pdl=False, positions=at,
        )  # fmt: skip
        return output

    together = attend(slice(None), None)
    assert torch.isfinite(together).all()
    assert not together[47].any()
    for row, index in [(0, 0), (0, 7), (0, 23), (0, 39), (1, 40), (2, 41), (2, 44)]:
        assert torch.equal(attend(slice(index, index + 1), row)[0], together[index])
        expected = case.expected(query[index : index + 1], row, int(positions[index]) + 1)[0]
        torch.testing.assert_close(together[index].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 4])
def test_a_decode_row_without_context_gets_zeros(splits: int, device: torch.device) -> None:
    case = Case.make([5, 3], 16, 1, 32, torch.float32, device)
    case.lengths[1] = 0
    output = run_decode(case, torch.randn((2, 2, 32), device=device), DecodeTiles(16, 4, 2, splits))
    assert output[0].isfinite().all()
    assert not output[1].any()


def test_a_row_that_is_not_listed_keeps_its_line(device: torch.device) -> None:
    case = Case.make([5, 3, 9], 16, 1, 32, torch.float32, device)
    output = torch.full((3, 64), 7.0, device=device)
    order = torch.tensor([2, 0, NO_ROW], dtype=torch.int32, device=device)
    scratch = DecodeScratch(1, 2, 32, device)
    query = torch.randn((3, 64), device=device)
    tiles = DecodeTiles(16, 4, 2, 1)
    decode_attention(query, case.cache, case.table, case.lengths, order, scratch, output, pdl=False, tiles=tiles)
    assert (output == 7).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("page", "kv_heads", "group", "dim", "dtype", "tiles"),
    [
        (16, 2, 2, 64, torch.float32, DecodeTiles(16, 4, 2, 1)),
        (6, 1, 3, 32, torch.float16, DecodeTiles(32, 4, 2, 4)),
        (16, 2, 2, 64, FP8, DecodeTiles(16, 4, 2, 2)),
        (64, 1, 2, 64, torch.int8, DecodeTiles(32, 4, 3, 1)),
    ],
)
def test_new_tokens_are_stored_and_attended_to_in_one_launch(
    page: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, tiles: DecodeTiles, device: torch.device
) -> None:
    """As `rope_store` and a launch after it, bit by bit but on a card, whose compiler fuses operations as it likes."""
    lengths = [1, page + 1, 2 * page + 9, 0, 2 * page]
    case, dtype = made(lengths, page, kv_heads, dim, dtype, device)
    rows, width = len(lengths), kv_heads * group * dim
    qkv = torch.randn((rows, width + 2 * kv_heads * dim), device=device).to(dtype)
    norms = torch.rand((2, dim), device=device).to(dtype) + 0.5
    last = (case.lengths.long() - 1).clamp(min=0)
    angles = RotaryEmbedding(dim, 1e4, dtype, device)(last)
    pages = case.table.gather(1, (last // page)[:, None])[:, 0].long().clamp(max=len(case.keys) - 1)
    slots = pages * page + last % page
    cache, kept = case.cache, case.cache
    parts = [cache.keys, cache.values, *((cache.key_scales, cache.value_scales) if cache.in_codes else ())]
    before = [part.clone() for part in parts]
    if cache.key_scales is not None:  # strides as they are, behind the codes of a page
        layout = cache.key_scales.stride()
        copies = [part.clone() for part in parts[:2]]
        scales = [torch.empty_strided(part.shape, layout, device=device).copy_(part) for part in parts[2:]]
        cache = replace(cache, keys=copies[0], values=copies[1], key_scales=scales[0], value_scales=scales[1])
    else:
        cache = LayerCache(cache.keys.clone(), cache.values.clone())
    scratch = DecodeScratch(kv_heads, group, dim, device, places=rows * tiles.splits)
    order = case.lengths.argsort(descending=True).to(torch.int32)
    query, expected, output = torch.zeros((3, rows, width), dtype=dtype, device=device)
    real = case.lengths > 0
    eps = (1e-6, 1e-5)
    rope_store(
        qkv[real], norms[0], norms[1], eps, angles.cos[real], angles.sin[real], slots[real], cache, query[: real.sum()],
        pdl=False,
    )  # fmt: skip
    query[real] = query[: real.sum()].clone()
    rest = case.table, case.lengths, order, scratch
    decode_attention(query, cache, *rest, expected, pdl=False, tiles=tiles)
    new = NewTokens(norms[0], norms[1], eps, angles.cos, angles.sin, slots)
    for _ in range(2):
        decode_attention(qkv, kept, *rest, output, pdl=False, tiles=tiles, new=new)
    assert not scratch.arrived.any()
    exact = 0.0 if device.type == "cpu" else TOLERANCE[dtype]
    torch.testing.assert_close(output, expected, atol=exact, rtol=exact)
    after = [cache.keys, cache.values, *((cache.key_scales, cache.value_scales) if cache.in_codes else ())]
    for part, other, old in zip(parts, after, before, strict=True):
        off = exact if part.is_floating_point() else 0.0
        torch.testing.assert_close(part.nan_to_num(7.0), other.nan_to_num(7.0), atol=off, rtol=off)
        assert not torch.equal(part.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_scratch_has_room_for_every_launch(kv_heads: int, device: torch.device) -> None:
    scratch = DecodeScratch(kv_heads, 2, 1, device)
    for rows in (*range(1, 100), 255, 256, 511, 512, 513, 2000):
        for context in (1, 100_000):
            for dtype in (torch.float32, torch.bfloat16):
                splits = choose_tiles(rows, kv_heads, dtype, context).splits
                assert splits == 1 or len(scratch.sums) >= rows * kv_heads * 2 * splits
                assert splits == 1 or len(scratch.arrived) >= rows * kv_heads


@pytest.mark.parametrize(
    ("page", "kv_heads", "group", "dim", "dtype", "cut"),
    [
        (16, 2, 2, 64, torch.float32, PrefillTiles(32, 32, 4, 2)),
        (64, 1, 3, 64, torch.float16, PrefillTiles(32, 64, 4, 2)),
        (128, 1, 8, 128, torch.float16, PrefillTiles(64, 64, 4, 2)),
        (6, 2, 1, 32, torch.float32, PrefillTiles(16, 16, 4, 2)),
        (64, 1, 2, 64, torch.int8, PrefillTiles(64, 32, 4, 2)),
        (16, 1, 1, 32, FP8, PrefillTiles(32, 16, 4, 2)),
        (24, 2, 3, 64, FP8, PrefillTiles(64, 16, 4, 2)),
    ],
)
def test_prefill_equals_torch(
    page: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, cut: PrefillTiles, device: torch.device
) -> None:
    """Rows: a whole prompt, a chunk after others, a decode row that is not among the tiles, one token, a long chunk."""
    contexts, counts = [37, page + 29, 9, 2, 2 * page + 3 if page < 64 else page + 40], [37, 19, 1, 1, 41]
    counts[-1] = min(counts[-1], contexts[-1])
    case, dtype = made(contexts, page, kv_heads, dim, dtype, device)
    starts = np.cumsum([0, *counts], dtype=np.int32)
    query = torch.randn((sum(counts), kv_heads * group, dim), device=device).to(dtype)
    output = torch.full((sum(counts), kv_heads * group * dim), float("nan"), dtype=dtype, device=device)
    rows = np.array([0, 1, 3, 4], dtype=np.int32)
    planned = plan_tiles(starts, rows, cut.rows // group)
    tiles = torch.from_numpy(np.concatenate((planned, np.full((2, 2), NO_ROW, dtype=np.int32)))).to(device)
    start = torch.from_numpy(starts).to(device)
    flat, fresh = query.flatten(1), None
    if case.cache.in_codes:
        fresh = case.fresh(starts, kv_heads * group, dtype)
    prefill_attention(flat, case.cache, case.table, case.lengths, start, tiles, cut, output, pdl=False, fresh=fresh)
    for row, context in enumerate(contexts):
        lines = slice(starts[row], starts[row + 1])
        if row == 2:
            assert output[lines].isnan().all()
            continue
        expected = case.expected(query[lines], row, context)
        torch.testing.assert_close(output[lines].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_tiles_cover_each_new_token_once() -> None:
    starts = np.array([0, 5, 6, 22, 25], dtype=np.int32)
    tiles = plan_tiles(starts, np.array([0, 2, 3], dtype=np.int32), 4)
    assert tiles.tolist() == [[0, 4], [0, 0], [2, 12], [2, 8], [2, 4], [2, 0], [3, 0]]


@pytest.mark.parametrize(
    ("page", "kv_heads", "group", "dim", "dtype", "tiles"),
    [
        (16, 2, 2, 64, torch.float32, DecodeTiles(16, 1, 1, 4)),
        (64, 1, 3, 64, torch.float16, DecodeTiles(32, 2, 1, 8)),
        (6, 2, 1, 32, torch.float32, DecodeTiles(16, 1, 1, 2)),
        (32, 1, 8, 128, torch.float16, DecodeTiles(64, 4, 1, 16)),
        (16, 2, 4, 32, torch.float32, DecodeTiles(16, 1, 1, 2)),  # more than one block of keys a split
        pytest.param(64, 1, 8, 16, torch.float32, DecodeTiles(16, 1, 1, 16), marks=pytest.mark.slow),  # merged in turns
    ],
)
def test_the_chain_does_what_rotation_store_and_decode_attention_do(
    page: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, tiles: DecodeTiles, device: torch.device
) -> None:
    lengths = [1, page + 1, 2 * page + 9, 20]
    heads = kv_heads * group
    case = Case.make(lengths, page, kv_heads, dim, dtype, device)
    qkv = torch.randn((len(lengths), (heads + 2 * kv_heads) * dim), device=device).to(dtype)
    norms = torch.rand((2, dim), device=device).to(dtype) + 0.5
    angles = RotaryEmbedding(dim, 1e4, dtype, device)(case.lengths - 1)
    last = case.lengths.long() - 1
    pages = case.table.gather(1, (last // page)[:, None])[:, 0].long()
    slots = pages * page + last % page
    case.keys[pages, last % page] = case.values[pages, last % page] = float("nan")  # the new token's, not there yet
    scratch = DecodeScratch(kv_heads, group, dim, device, places=len(lengths) * tiles.splits)
    output = torch.full((len(lengths), heads * dim), float("nan"), dtype=dtype, device=device)
    for _ in range(2):
        chain_attention(
            qkv, norms[0], norms[1], (1e-6, 1e-6), angles.cos, angles.sin, slots, case.keys, case.values, case.table,
            case.lengths, scratch, output, tiles=tiles, pdl=False,
        )  # fmt: skip
    packed = qkv.view(len(lengths), -1, dim)
    query, key = (
        angles.rotate(F.rms_norm(packed[:, part], (dim,), norm, 1e-6))
        for part, norm in ((slice(heads), norms[0]), (slice(heads, heads + kv_heads), norms[1]))
    )
    torch.testing.assert_close(case.keys[pages, last % page], key, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(case.values[pages, last % page], packed[:, heads + kv_heads :])
    for row, length in enumerate(lengths):
        expected = case.expected(query[row : row + 1], row, length)
        torch.testing.assert_close(
            output[row : row + 1].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
