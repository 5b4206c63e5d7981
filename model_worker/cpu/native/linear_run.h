// Chooses how a linear layer is multiplied, or each part of one.
#pragma once

#include "linear_amx.h"
#include "linear_int4.h"
#include "linear_int8.h"

namespace vsl {

template <class T>
inline void run_int8(Context& context, const Linear<T>& linear) {
    const int64_t rows = linear.rows, inputs = linear.inputs;
    const QuantizedRows x(context.shared.reserve(QuantizedRows::bytes(rows, inputs)), rows, inputs);
    quantize_rows(context, linear, x);
#if defined(VSL_VNNI)
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, [[maybe_unused]] int worker) {
#if defined(VSL_AMX_LINEAR)
        if (context.amx && end - begin > 1 && inputs % 64 == 0)
            return tile_slab<Int8Tiles>(into, (const uint8_t*)x.codes, inputs, slab, begin, end, context.scratch[worker],
                                        [&](int64_t row, int64_t output, const int32_t* a, const int32_t* b) {
                                            store_two(into, x, row, output, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
                                        });
#endif
        dot_int8(into, x, slab, begin, end);
    });
#else
    run_bytes(context, linear, x);
#endif
}

#if defined(VSL_AVX512_BF16)
inline void run_pairs(Context& context, const Linear<bf16>& linear) {
    const bool int4 = linear.format == kInt4;
    const auto has_tiles = [&]([[maybe_unused]] int64_t rows) {
#if defined(VSL_AMX_LINEAR)
        return context.amx && rows >= (int4 ? kAmxInt4Rows : context.fixed_order ? 1 : 2);
#else
        return false;
#endif
    };
    float* group_sums = nullptr;
    if (int4 && (linear.parts != nullptr || !has_tiles(linear.rows))) {
        group_sums = (float*)context.shared.reserve(linear.rows * (linear.inputs / kGroup) * 4);
        sum_groups(context, linear, group_sums);
    }
    run_slabs(context, linear, [&](const Linear<bf16>& into, int64_t slab, int64_t begin, int64_t end, [[maybe_unused]] int worker) {
#if defined(VSL_AMX_LINEAR)
        if (has_tiles(end - begin))
            return tile_slab<Bf16Tiles>(into, (const uint8_t*)into.x, into.x_stride * 2, slab, begin, end, context.scratch[worker],
                                        [&](int64_t row, int64_t output, const int32_t* a, const int32_t* b) {
                                            store_two(into, row, output, _mm512_loadu_ps(a), _mm512_loadu_ps(b));
                                        });
#endif
        if (int4)
            dot_int4(into, group_sums, slab, begin, end);
        else
            dot_bf16(into, slab, begin, end);
    });
}
#endif

inline void run_linear(Context& context, const Linear<float>& linear) {
    if (linear.format == kInt8) return run_int8(context, linear);
    run_float(context, linear);
}

inline void run_linear(Context& context, const Linear<bf16>& linear) {
    if (linear.format == kInt8) return run_int8(context, linear);
#if defined(VSL_AVX512_BF16)
    run_pairs(context, linear);
#elif defined(VSL_NEON_BF16)
    if (linear.format == kInt4) return run_int4_bytes(context, linear);
    run_bf16_pairs(context, linear);
#elif defined(VSL_AVX2) || defined(VSL_AVX512) || defined(VSL_NEON)
    linear.format == kInt4 ? run_int4_bytes(context, linear) : run_float(context, linear);
#else
    run_float(context, linear);
#endif
}

}  // namespace vsl
