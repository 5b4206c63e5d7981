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
def lanes(
    start, begin, C: tl.constexpr, EACH: tl.constexpr, ROW: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr
):
    """[C x 32, EACH] words of 8 outputs: of each unit what each thread of a warp wants, a quarter of a row's. Rows are
    threads, so that in shared memory, too, a warp's lie behind each other."""
    thread = tl.arange(0, C * 32)
    unit_of, lane = begin + thread // 32, thread % 32
    spot = unit_of * STEP + lane // 4 * ROW + lane % 4 * EACH
    place = start + spot[:, None] + tl.arange(0, EACH)[None, :]
    if UNITS // C * C == UNITS:
        words = tl.load(place, eviction_policy="evict_first")
    else:
        words = tl.load(place, mask=(unit_of < UNITS)[:, None], other=0, eviction_policy="evict_first")
    return words


@triton.jit
def rows8(words, C: tl.constexpr):
    """[C, 8, 4 x EACH] of `lanes`, for thread t to have its words where the matrix units want them. With EACH of 8,
    words 0 to 3 are of one instruction, so that registers of the other operand, too, lie behind each other."""
    EACH: tl.constexpr = words.shape[1]
    if EACH == 8:
        words = tl.reshape(words, [C, 8, 4, 2, 2, 2])
        words = tl.permute(words, (0, 1, 4, 2, 3, 5))
    return tl.reshape(words, [C, 8, 4 * EACH])


@triton.jit
def pair(first, second):
    """Of two [C, N, W], [C, 2 x N, W]."""
    C: tl.constexpr = first.shape[0]
    N: tl.constexpr = first.shape[1]
    W: tl.constexpr = first.shape[2]
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), [C, 2 * N, W])


@triton.jit
def x_group(
    x, order, begin, C: tl.constexpr, PART: tl.constexpr, K: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, ORDERED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """[C, GROUP, COLUMNS]: the inputs of each unit's group, ordered as `group` has the numbers, in each column."""
    unit = begin + tl.arange(0, C)
    column = unit[:, None] * UNIT + PART * GROUP + tl.arange(0, GROUP)[None, :]
    if ORDERED:
        column = tl.load(order + column, mask=column < K, other=0)
    if K == UNITS * UNIT and UNITS // C * C == UNITS:
        a = tl.load(x + column)
    else:
        a = tl.load(
            x + column, mask=(unit[:, None] * UNIT + PART * GROUP + tl.arange(0, GROUP)[None, :]) < K, other=0.0
        )
    if P > 16:  # as `rows8`
        a = tl.reshape(a, [C, GROUP // 32, 4, 2, 2, 2])
        a = tl.reshape(tl.permute(a, (0, 1, 4, 2, 3, 5)), [C, GROUP])
    return tl.broadcast_to(a[:, :, None], [C, GROUP, COLUMNS])


@triton.jit
def factors(start, begin, C: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr):
    """[C x 32]: of 8 outputs and each unit, those that each thread of a warp wants."""
    thread = tl.arange(0, C * 32)
    unit_of = begin + thread // 32
    place = start + unit_of * STEP + thread % 32 // 4
    return tl.load(place) if UNITS // C * C == UNITS else tl.load(place, mask=unit_of < UNITS, other=0)


@triton.jit
def spread(factor, C: tl.constexpr):
    """[C, 8, COLUMNS] of `factors`, where the matrix units have their results."""
    factor = tl.reshape(factor, [C, 8, 4, 1])
    return tl.reshape(tl.broadcast_to(factor, [C, 8, 4, 2]), [C, 8, COLUMNS])
