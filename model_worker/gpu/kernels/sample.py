"""Draws a token a row from its logits: the maximum, or Gumbel-max with the noise of `sampling/noise.py`, of all of
them or of a few that top-k, top-p and min-p leave.

The noise is exact and dear: two logarithms in fp64. So a first pass makes of every score what it is at most, which
takes one logarithm in fp32, as -log(-log(u)) < -log(1 - u), and nearly equal where it is large; it keeps each chunk's
highest. A second one makes exact scores, chunk after chunk from the highest of these on, until no other can hold a
better one: one chunk as a rule. The token is the one that exact scores everywhere would give, the lowest id of equals.
Where top-k leaves at most KEPT, the first pass keeps each chunk's highest logit, and the second takes the best ones
out, one after another, and cuts them as `sampling/nucleus.py` does: only these need noise. Ranks that share a
vocabulary exchange their best ones, or their highest score, and each of them decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vibe_sgl_lite.qwen3.layers.parallel_state import Group

ONE_RANK = Group()
CHUNK = 2048  # logits a program
KEPT = 64  # of a row with filters, at most
# Above what fp32 may be off: at noise of up to 37, and in proportion to the score.
BOUND = tl.constexpr(1e-3)
RELATIVE_BOUND = tl.constexpr(2e-6)
NONE = tl.constexpr(-1)
NO_ID = tl.constexpr(2147483647)
MASS_LOG = tl.constexpr(44 * 0.6931471805599453)  # a mass is a multiple of 2**-44
LN_2 = tl.constexpr(0.6931471805599453)

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB)
TOKEN_MULTIPLY_1 = tl.constexpr(0x21F0AAAD)
TOKEN_MULTIPLY_2 = tl.constexpr(0x735A2D97)
TOKEN_MULTIPLY_LOW = tl.constexpr(0x85EBCA6B)


@triton.jit
def _mix(x):
    """SplitMix64's finaliser, uint64."""
    x = (x ^ (x >> 30)) * MULTIPLY_1
    x = (x ^ (x >> 27)) * MULTIPLY_2
    return x ^ (x >> 31)


@triton.jit
def _row_key(seed, position):
    return _mix(_mix(seed.to(tl.uint64, bitcast=True) + GOLDEN) + position.to(tl.uint64))


@triton.jit
def _high_bits(key, token):
    """The highest 32 of a token's 52 bits, uint32."""
    x = key.to(tl.uint32) + (token + 1).to(tl.uint32) * ((key >> 32).to(tl.uint32) | 1)
    x = (x ^ (x >> 16)) * TOKEN_MULTIPLY_1
    x = (x ^ (x >> 15)) * TOKEN_MULTIPLY_2
    return x ^ (x >> 15)


@triton.jit
def _uniform_bits(key, token):
    """The n of the uniform variate (n + 0.5) / 2**52, int64."""
    high = _high_bits(key, token)
    low = (high * TOKEN_MULTIPLY_LOW + key.to(tl.uint32)) >> 12
    return (high.to(tl.uint64) << 20 | low.to(tl.uint64)).to(tl.int64)


@triton.jit
def _gumbel(bits):
    """fp64, as noise.py computes it."""
    uniform = (bits | 0x3FF0000000000000).to(tl.float64, bitcast=True) - (1.0 - 1.1102230246251565e-16)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _log2(x, ASM: tl.constexpr):
    """fp32, within 2**-22 of the result or, near 1, of 1. ASM: as one instruction."""
    if ASM:
        result = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def _most_gumbel(high, ASM: tl.constexpr):
    """fp32: what `_gumbel` is at most, by the 32 highest bits of 1 - u. If these are 0, it is 2**-53 or more."""
    rest = (high ^ 0xFFFFFFFF).to(tl.float32)
    return (32.0 - _log2(tl.maximum(rest, 4.76837158203125e-07), ASM)) * LN_2


@triton.jit
def _chunk_maxima(
    logits, maxima, slots, positions, inverse_temperatures, seeds, top_ks, columns, first,
    CHUNK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows, chunks): what no score of each chunk is above. first: the token of the first column."""
    row = tl.program_id(0)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token < columns
    slot = tl.load(slots + row)
    inverse = tl.load(inverse_temperatures + slot)
    top_k = tl.load(top_ks + slot)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    score = tl.load(logits + row.to(tl.int64) * columns + token, mask=inside, other=-float("inf")).to(tl.float32)
    if (inverse != 0.0) & (top_k == 0):
        key = _row_key(tl.load(seeds + slot), tl.load(positions + row))
        score = score * inverse.to(tl.float32) + _most_gumbel(_high_bits(key, first + token), ASM)
        score = tl.where(inside, score, -float("inf"))
    tl.store(maxima + row * tl.num_programs(1) + tl.program_id(1), tl.max(score, 0))


@triton.jit
def _best_of_line(
    line, most, top_k, columns, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """The best logits of a row at `line`, of which `most` [CHUNKS] are the chunks' highest: values [KEPT] in falling
    order, of equals in rising order of ids, their ids [KEPT], and how many there are, `top_k` or fewer."""
    chunk, place = tl.arange(0, CHUNKS), tl.arange(0, KEPT)
    values = tl.full([KEPT], -float("inf"), tl.float32)
    ids = tl.full([KEPT], NO_ID, tl.int32)
    last, last_id, taken = float("inf"), -1, 0
    while (taken < top_k) & (tl.max(most, 0) > -float("inf")):
        at = tl.argmax(most, 0)
        token = at * CHUNK + tl.arange(0, CHUNK)
        logit = tl.load(line + token, mask=token < columns, other=-float("inf")).to(tl.float32)
        logit = tl.where((logit < last) | ((logit == last) & (token > last_id)), logit, -float("inf"))
        last = tl.max(logit, 0)
        last_id = tl.min(tl.where(logit == last, token, NO_ID), 0)
        after = (logit < last) | ((logit == last) & (token > last_id))
        most = tl.where(chunk == at, tl.max(tl.where(after, logit, -float("inf")), 0), most)
        values = tl.where(place == taken, last, values)
        ids = tl.where(place == taken, last_id, ids)
        taken += 1
    return values, ids, taken


@triton.jit
def _best_of_ranks(value, token, top_k, KEPT: tl.constexpr):
    """As `_best_of_line`, of candidates [any number] in any order; one that is there twice counts once."""
    place = tl.arange(0, KEPT)
    values = tl.full([KEPT], -float("inf"), tl.float32)
    ids = tl.full([KEPT], NO_ID, tl.int32)
    taken = 0
    while (taken < top_k) & (tl.max(value, 0) > -float("inf")):
        best = tl.max(value, 0)
        best_id = tl.min(tl.where(value == best, token, NO_ID), 0)
        value = tl.where(token == best_id, -float("inf"), value)
        values = tl.where(place == taken, best, values)
        ids = tl.where(place == taken, best_id, ids)
        taken += 1
    return values, ids, taken


@triton.jit
def _draw_of_best(values, ids, taken, key, inverse, top_p, max_distance, KEPT: tl.constexpr):
    """The token that is drawn of the best ones, after top-p and min-p."""
    place = tl.arange(0, KEPT)
    here = place < taken
    best = tl.max(values, 0).to(tl.float64)
    value = tl.where(here, values.to(tl.float64), best)
    mass = tl.where(here, tl.exp(MASS_LOG - (value - best) * -inverse).to(tl.int64), 0)
    reached, limit = tl.cumsum(mass, 0), tl.sum(mass, 0)
    target = tl.maximum(tl.minimum(tl.ceil(top_p * limit.to(tl.float64)).to(tl.int64), limit), 1)
    nucleus = tl.sum((here & (reached < target)).to(tl.int32), 0) + 1
    near = tl.sum((here & (value >= best - max_distance / inverse)).to(tl.int32), 0)
    length = tl.minimum(tl.where(top_p < 1.0, nucleus, taken), near)
    score = tl.where(place < length, value * inverse + _gumbel(_uniform_bits(key, ids)), -float("inf"))
    return tl.min(tl.where((score == tl.max(score, 0)) & (place < length), ids, NO_ID), 0)


@triton.jit
def _draw(
    logits, maxima, slots, positions, inverse_temperatures, seeds, top_ks, top_ps, max_distances, winners, token_ids,
    tokens, places, lengths, columns, chunks, first, PART: tl.constexpr, ADVANCE: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row: exact scores of the chunks that may hold the highest. PART: that goes to `winners`, no token; of
    a row with filters its best logits. A row with a score that is infinite has no token."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    slot = tl.load(slots + row)
    inverse = tl.load(inverse_temperatures + slot)
    top_k, top_p, max_distance = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(max_distances + slot)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    most = tl.load(maxima + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    peak = tl.max(most, 0)
    most = tl.where(tl.abs(most) < float("inf"), most, -float("inf"))
    highest = tl.where(peak < float("inf"), tl.max(most, 0), -float("inf"))
    key = _row_key(tl.load(seeds + slot), tl.load(positions + row))
    best = tl.full([], -float("inf"), tl.float64)
    best_token = tl.full([], NONE, tl.int32)
    error = tl.where(inverse != 0.0, BOUND + RELATIVE_BOUND * tl.abs(highest), 0.0)
    if (top_k != 0) & (highest > -float("inf")):
        line = logits + row.to(tl.int64) * columns
        values, ids, taken = _best_of_line(line, most, top_k, columns, CHUNK, CHUNKS, KEPT)
        if PART:
            place = tl.arange(0, KEPT)
            record = winners + row.to(tl.int64) * WIDTH + 2
            tl.store(record + place, values.to(tl.float64))
            tl.store(record + KEPT + place, tl.where(place < taken, first + ids, NO_ID).to(tl.float64))
            best_token = tl.min(ids, 0)  # any: the row has a token
        else:
            best_token = _draw_of_best(values, ids, taken, key, inverse, top_p, max_distance, KEPT)
        highest = -float("inf")
    while highest > -float("inf"):
        at = tl.argmax(most, 0)
        token = at * CHUNK + tl.arange(0, CHUNK)
        inside = token < columns
        score = tl.load(logits + row.to(tl.int64) * columns + token, mask=inside, other=-float("inf")).to(tl.float64)
        if inverse != 0.0:
            score = score * inverse + _gumbel(_uniform_bits(key, first + token))
            score = tl.where(inside, score, -float("inf"))
        higher = tl.max(score, 0)
        its_token = tl.min(tl.where(score == higher, token, NO_ID), 0)
        if (higher > best) | ((higher == best) & (its_token < best_token)):
            best = higher
            best_token = its_token
        most = tl.where(chunk == at, -float("inf"), most)
        highest = tl.max(most, 0)
        highest = tl.where((highest + error).to(tl.float64) < best, -float("inf"), highest)
    if PART:
        tl.store(winners + row.to(tl.int64) * WIDTH, best)
        of_all = tl.where(best_token == NONE, NONE, first + best_token)
        tl.store(winners + row.to(tl.int64) * WIDTH + 1, of_all.to(tl.float64))
    else:
        _put(best_token, row, token_ids, tokens, places, lengths, ADVANCE)


@triton.jit
def _put(token, row, token_ids, tokens, places, lengths, ADVANCE: tl.constexpr):
    tl.store(token_ids + row, token)
    tl.store(tokens + tl.load(places + row), tl.maximum(token, 0))
    if ADVANCE:
        length = tl.load(lengths + row)
        tl.store(lengths + row, tl.where(length > 0, length + 1, 0))


@triton.jit
def _choose(
    winners, slots, positions, inverse_temperatures, seeds, top_ks, top_ps, max_distances, token_ids, tokens, places,
    lengths, rows, ADVANCE: tl.constexpr, RANKS: tl.constexpr, RANKS_P: tl.constexpr, KEPT: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row: the token with the highest score of all ranks, or that drawn of their best logits; none if one
    of them has none."""
    row = tl.program_id(0)
    rank = tl.minimum(tl.arange(0, RANKS_P), RANKS - 1)
    slot = tl.load(slots + row)
    inverse = tl.load(inverse_temperatures + slot)
    top_k, top_p, max_distance = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(max_distances + slot)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    record = winners + (rank.to(tl.int64) * rows + row) * WIDTH
    score = tl.load(record)
    token = tl.load(record + 1).to(tl.int32)
    best = tl.min(tl.where(score == tl.max(score, 0), token, NO_ID), 0)
    if top_k != 0:
        place = tl.arange(0, RANKS_P * KEPT)
        owner = tl.minimum(place // KEPT, RANKS - 1)
        candidate = winners + (owner.to(tl.int64) * rows + row) * WIDTH + 2 + place % KEPT
        value = tl.load(candidate).to(tl.float32)
        values, ids, taken = _best_of_ranks(value, tl.load(candidate + KEPT).to(tl.int32), top_k, KEPT)
        key = _row_key(tl.load(seeds + slot), tl.load(positions + row))
        best = _draw_of_best(values, ids, taken, key, inverse, top_p, max_distance, KEPT)
    _put(tl.where(tl.min(token, 0) == NONE, NONE, best), row, token_ids, tokens, places, lengths, ADVANCE)


def num_chunks(columns: int) -> int:
    """How many fp32 of scratch a row of `columns` logits takes in `sample`."""
    return -(-columns // CHUNK)


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    inverse_temperatures: Tensor,
    seeds: Tensor,
    filters: tuple[Tensor, Tensor, Tensor],
    scratch: Tensor,
    token_ids: Tensor,
    tokens: Tensor,
    places: Tensor,
    lengths: Tensor | None = None,
    *,
    pdl: bool,
    group: Group = ONE_RANK,
    first: int = 0,
) -> None:
    """Fill token_ids, [R] int32, from logits, [R, vocabulary] in fp32 or bf16; -1 where these are NaN or infinite.

    slots: [R] int32; positions: [R] ints, of the token to draw. Of each slot: inverse_temperatures [slots] fp64, 0 for
    the greedy; seeds [slots] int64, 64 bits in two's complement; filters: top_k [slots] int32, at most KEPT, 0 where
    there are no filters; top_p [slots] fp64, 1 if off; max_distance [slots] fp64, how far below
    the best scaled logit min-p reaches, inf if off. scratch: R x `num_chunks` fp32 or more.
    The token also goes to tokens, of any shape, at its place: places [R] int64; as 0 where it is none. lengths: [R]
    int32, to be one longer where they are not 0. group: ranks that have parts of the vocabulary, in order, this one
    from the token `first` on; one collective of their highest scores and best logits, 1 KiB a row.
    """
    rows, columns = logits.shape
    chunks = num_chunks(columns)
    assert logits.is_contiguous()
    assert scratch.numel() >= rows * chunks
    assert scratch.dtype == torch.float32
    options = {"launch_pdl": True} if pdl else {}
    parameters = (slots, positions, inverse_temperatures, seeds)
    _chunk_maxima[(rows, chunks)](
        logits, scratch, *parameters, filters[0], columns, first, CHUNK=CHUNK, ASM=logits.is_cuda, PDL=pdl, num_warps=8,
        **options,
    )  # fmt: skip
    part = group.size > 1
    width = 2 + 2 * KEPT  # the highest score, its token; the best logits, their tokens
    winners = torch.empty((rows, width), dtype=torch.float64, device=logits.device) if part else scratch
    put = token_ids, tokens, places, positions if lengths is None else lengths
    _draw[(rows,)](
        logits, scratch, *parameters, *filters, winners, *put, columns, chunks, first, PART=part,
        ADVANCE=lengths is not None, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), KEPT=KEPT, WIDTH=width,
        PDL=pdl, num_warps=8, **options,
    )  # fmt: skip
    if part:
        _choose[(rows,)](
            group.all_gather(winners), *parameters, *filters, *put, rows, ADVANCE=lengths is not None,
            RANKS=group.size, RANKS_P=triton.next_power_of_2(group.size), KEPT=KEPT, WIDTH=width, PDL=pdl, num_warps=4,
            **options,
        )  # fmt: skip
