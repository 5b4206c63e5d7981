// Chooses how a linear layer is multiplied, and spreads its slabs over the threads.
#pragma once

#include "linear_amx.h"

namespace vsl {

// Whether this CPU's instructions multiply `format`; int8 needs AVX512-VNNI.
inline bool can_multiply(int format) {
#if defined(VSL_VNNI)
    return format == kBf16 || format == kInt8 || format == kInt4;
#else
    return format == kBf16 || format == kInt4;
#endif
}

template <class T>
inline void run_int8(Context& context, const Linear<T>& linear) {
#if defined(VSL_VNNI)
    const int64_t rows = linear.rows, inputs = linear.inputs;
    const QuantizedRows x(context.shared.reserve(QuantizedRows::bytes(rows, inputs)), rows, inputs);
    quantize_rows(context, linear, x);
#if defined(VSL_AMX_LINEAR)
    if (context.amx && rows > 1 && inputs % 64 == 0)
        return run_tiles<Int8Tiles>(context, linear, (const uint8_t*)x.codes, inputs,
                                    [&](const Linear<T>& into, int64_t row, int64_t output, const int32_t* a,
                                        const int32_t* b) {
                                        store_two(into, x, row, output, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
                                    });
#endif
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int) { dot_int8(into, x, slab); });
#endif
}

// In fp32 throughout: for fp32 models with int4 weights, and for CPUs without AVX512-BF16.
template <class T>
inline void run_float(Context& context, const Linear<T>& linear) {
    const int64_t inputs = linear.inputs, groups = inputs / kGroup;
    float* const x = (float*)context.shared.reserve(linear.rows * (inputs + groups) * 4);
    float* const group_sums = x + linear.rows * inputs;
    for (int64_t r = 0; r < linear.rows; r++)
        for (int64_t i = 0; i < inputs; i += kLanes) store(x + r * inputs + i, load(linear.x + r * linear.x_stride + i));
    if (linear.format == kInt4) sum_groups(linear, group_sums);
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int) {
        if (linear.format == kInt4)
            float_rows<kInt4>(into, x, group_sums, slab);
        else
            float_rows<kBf16>(into, x, group_sums, slab);
    });
}

#if defined(VSL_AVX512_BF16)
inline void run_pairs(Context& context, const Linear<bf16>& linear) {
    const bool int4 = linear.format == kInt4;
#if defined(VSL_AMX_LINEAR)
    if (context.amx && linear.rows >= (int4 ? kAmxInt4Rows : 2))
        return run_tiles<Bf16Tiles>(context, linear, (const uint8_t*)linear.x, linear.x_stride * 2,
                                    [](const Linear<bf16>& into, int64_t row, int64_t output, const int32_t* a,
                                       const int32_t* b) {
                                        store_two(into, row, output, _mm512_loadu_ps(a), _mm512_loadu_ps(b));
                                    });
#endif
    float* group_sums = nullptr;
    if (int4) {
        group_sums = (float*)context.shared.reserve(linear.rows * (linear.inputs / kGroup) * 4);
        sum_groups(linear, group_sums);
    }
    run_slabs(context, linear, [&](const Linear<bf16>& into, int64_t slab, int) {
        if (int4)
            dot_int4(into, group_sums, slab);
        else
            dot_bf16(into, slab);
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
#else
    run_float(context, linear);
#endif
}

}  // namespace vsl
