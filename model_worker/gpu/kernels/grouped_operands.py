"""What `grouped_gemv` reads, brought where the matrix units want it without moving between threads.

A warp has some units of inputs of 16 outputs whole. In the operand of a matrix instruction (m16n8k16) thread 4 r + t
has outputs r and r + 8; which of the inputs it has may be chosen, as long as both operands agree. So it takes the
quarter t of a row's words as they lie in memory, and the inputs are reordered to match. Triton's compiler finds that
all the reshaping here moves nothing; tests/model_worker/gpu/test_compiles.py sees to it that it does.

C units, N outputs, P words of a unit and output, each with the codes of 4 (or 2) places.
"""

import triton
import triton.language as tl

from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import _number8

BLOCKS = tl.constexpr(2)  # of 8 outputs, that are a tile
COLUMNS = tl.constexpr(8)  # of the matrix units' other operand, of which the row is each one


@triton.jit
def _raised4(words, PLACE: tl.constexpr, MANTISSA_BITS: tl.constexpr, dtype: tl.constexpr):
    """The code at PLACE in each word and 2 ** MANTISSA_BITS more; of 0 bits the code alone."""
    if MANTISSA_BITS == 7:
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 1:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 4; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 2:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 8; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 12; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif MANTISSA_BITS == 10:
        if PLACE == 0:
            number = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea;",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 1:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 4; lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        elif PLACE == 2:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 8; lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                "{ .reg .b32 a; shr.u32 a, $1, 12; lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea; }",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        number = ((words >> (4 * PLACE)) & 15).to(dtype)
    return number


@triton.jit
def _at(words, PLACE: tl.constexpr, BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, dtype: tl.constexpr):
    if BITS == 4:
        numbers = _raised4(words, PLACE, MANTISSA_BITS, dtype)
    else:
        numbers = _number8(words, PLACE, MANTISSA_BITS, dtype)
    return numbers


@triton.jit
def group(
    words, PART: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """[C, N, GROUP]: the numbers of a unit's group, of [C, N, P] words, in order. Nothing moves between threads."""
    C: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    if GROUP == P:
        numbers = _at(words, PART, BITS, MANTISSA_BITS, dtype)
    elif GROUP == 2 * P:
        first = _at(words, 2 * PART, BITS, MANTISSA_BITS, dtype)
        second = _at(words, 2 * PART + 1, BITS, MANTISSA_BITS, dtype)
        numbers = tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), [C, N, GROUP])
    else:
        tl.static_assert(GROUP == 4 * P)
        first = _at(words, 0, BITS, MANTISSA_BITS, dtype)
        second = _at(words, 1, BITS, MANTISSA_BITS, dtype)
        third = _at(words, 2, BITS, MANTISSA_BITS, dtype)
        fourth = _at(words, 3, BITS, MANTISSA_BITS, dtype)
        pairs = tl.join(tl.join(first, third), tl.join(second, fourth))  # [..., P, upper bit, lower bit of the place]
        numbers = tl.reshape(tl.permute(pairs, (0, 1, 3, 4, 2)), [C, N, GROUP])
    return numbers


@triton.jit
def _threads(begin, C: tl.constexpr, WARPS: tl.constexpr):
    """Of [C x BLOCKS x 32] which unit, which block of 8 outputs, and which thread of a warp each is. Warps come before
    blocks, so that each loads all blocks of a unit, and one unit after the other."""
    spot = tl.arange(0, C * BLOCKS * 32)
    unit = begin + spot // (WARPS * BLOCKS * 32) * WARPS + spot // 32 % WARPS
    return unit, spot // (WARPS * 32) % BLOCKS, spot % 32


@triton.jit
def block_of(tile, number, N: tl.constexpr, SILU: tl.constexpr):
    """Which 8 outputs of the matrix are a tile's `number`; with SILU the second ones are of its second half."""
    block = tile + number * (N // 8) if SILU else tile * BLOCKS + number
    return block.to(tl.int64)


@triton.jit
def lanes(
    words, tile, begin, HALF: tl.constexpr, C: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr, P: tl.constexpr,
    BITS: tl.constexpr, WARPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """[C, 16, words] of C units of a tile: as each thread of a warp wants them, a quarter of an output's. Rows
    of what is loaded are threads, so that in shared memory, too, a warp's lie behind each other. HALF: the second 32
    words of a unit. With 8 words a thread, words 0 to 3 are of one instruction, so that registers of the other operand,
    too, lie behind each other."""
    EACH: tl.constexpr = 8 if P > 32 else P // 4
    ROW: tl.constexpr = P if BITS == 4 else UNITS * P  # from one output's words to the next one's
    STEP: tl.constexpr = 8 * P if BITS == 4 else P  # from one unit's to the next one's
    unit, number, lane = _threads(begin, C, WARPS)
    spot = unit * STEP + lane // 4 * ROW + (lane % 4 * EACH + HALF * 32)
    place = words + block_of(tile, number, N, SILU) * (UNITS * 8 * P) + spot
    place = place[:, None] + tl.arange(0, EACH)[None, :]
    if UNITS // C * C == UNITS:
        loaded = tl.load(place, eviction_policy="evict_first")
    else:
        loaded = tl.load(place, mask=(unit < UNITS)[:, None], other=0, eviction_policy="evict_first")
    if EACH == 8:
        loaded = tl.reshape(loaded, [C // WARPS, BLOCKS, WARPS, 8, 4, 2, 2, 2])
        loaded = tl.permute(loaded, (0, 2, 1, 3, 6, 4, 5, 7))
    else:
        loaded = tl.permute(tl.reshape(loaded, [C // WARPS, BLOCKS, WARPS, 8, 4, EACH]), (0, 2, 1, 3, 4, 5))
    return tl.reshape(loaded, [C, 16, 4 * EACH])


@triton.jit
def x_group(
    x, order, begin, C: tl.constexpr, PART: tl.constexpr, K: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, ORDERED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """[C, GROUP]: the inputs of each unit's group, ordered as `group` has the numbers."""
    unit = begin + tl.arange(0, C)
    place = unit[:, None] * UNIT + PART * GROUP + tl.arange(0, GROUP)[None, :]
    column = tl.load(order + place, mask=place < K, other=0) if ORDERED else place
    if K == UNITS * UNIT and UNITS // C * C == UNITS:
        a = tl.load(x + column)
    else:
        a = tl.load(x + column, mask=place < K, other=0.0)
    if P > 16:  # as `lanes`
        a = tl.reshape(a, [C, GROUP // 32, 4, 2, 2, 2])
        a = tl.reshape(tl.permute(a, (0, 1, 4, 2, 3, 5)), [C, GROUP])
    return a


@triton.jit
def columns(a):
    """[C, GROUP, COLUMNS] of [C, GROUP]."""
    C: tl.constexpr = a.shape[0]
    GROUP: tl.constexpr = a.shape[1]
    return tl.broadcast_to(a[:, :, None], [C, GROUP, COLUMNS])


@triton.jit
def factors(
    scales, tile, begin, part: tl.constexpr, C: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """[C x BLOCKS x 32]: of each unit and output, as `lanes` has the words."""
    unit, number, lane = _threads(begin, C, WARPS)
    place = scales + block_of(tile, number, N, SILU) * (UNITS * GROUPS * 8)
    place += (unit * GROUPS + part) * 8 + lane // 4
    return tl.load(place) if UNITS // C * C == UNITS else tl.load(place, mask=unit < UNITS, other=0)


@triton.jit
def spread(factor, C: tl.constexpr, WARPS: tl.constexpr):
    """[C, 16, COLUMNS] of `factors`, where the matrix units have their results."""
    factor = tl.permute(tl.reshape(factor, [C // WARPS, BLOCKS, WARPS, 8, 4, 1]), (0, 2, 1, 3, 4, 5))
    factor = tl.broadcast_to(factor, [C // WARPS, WARPS, BLOCKS, 8, 4, 2])
    return tl.reshape(factor, [C, 16, COLUMNS])
