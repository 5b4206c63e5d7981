// int4 by rows in 8 bits, with a scale for each group of inputs.
#pragma once

#include "linear_panels.h"

namespace vsl {

#if defined(VSL_AVX2) || defined(VSL_AVX512) || defined(VSL_NEON)

constexpr int kMostInt4Together = 4;  // rows

// Rows in 8 bits with a scale for each group of inputs, in the order of the bytes that an int4 unit is split into.
struct QuantizedGroups {
    int8_t* codes;        // [rows][inputs]
    float *scales, *sums;  // [rows][groups]; the sums are of what the codes stand for

    static size_t bytes(int64_t rows, int64_t inputs) { return rows * (inputs + inputs / kGroup * 8); }

    QuantizedGroups(void* memory, int64_t rows, int64_t inputs)
        : codes((int8_t*)memory), scales((float*)(codes + rows * inputs)), sums(scales + rows * (inputs / kGroup)) {}
};

template <class T>
inline void quantize_groups(const T* x, int64_t inputs, int8_t* codes, float* scales, float* sums) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int64_t i = 0; i < inputs; i += kGroup) {
        int8_t plain[kGroup];
        int32_t sum;
        quantize_row(x + i, kGroup, plain, scales, &sum);
        for (int k = 0; k < kGroup; k++) codes[i + k] = plain[k / 8 * 8 + kOrder[k % 8]];
        *sums++ = (float)(sum / 128) * *scales++;
    }
}

// Adds to totals[kRows][kSlab] the products of one group of inputs and, from output j on, kVectors vectors. A group's sums of
// products of 4-bit and 8-bit codes fit 16 bits: 16 x 15 x 127 = 30480. Meanwhile a share of the group at `next` is asked for.
template <int kRows, int kVectors>
inline void multiply_group(const uint8_t* group, int j, const int8_t* codes, int64_t stride, const float* scales,
                           const float* sums, int64_t groups, float* totals, const uint8_t* next) {
    constexpr int kLines = kGroupBytes / 64, kSteps = kGroup / 8, kShares = kSlab / (kVectors * kLanes) * kSteps;
    constexpr int kAsk = (kLines + kShares - 1) / kShares;
#if defined(VSL_QUADS)
    vi into[kRows][kVectors] = {};
#else
    vs into[kRows][kVectors] = {};
#endif
#pragma GCC unroll 1  // else registers run out
    for (int u = 0; u < kSteps; u++) {
        const int line = (j / (kVectors * kLanes) * kSteps + u) * kAsk;
        if (line < kLines)
            for (int i = 0; i < kAsk; i++) __builtin_prefetch(next + (line + i) * 64);
        const auto units = [&](int v) { return load_units(group + (u * kSlab + j + v * kLanes) * 4); };
        const auto add = [&](int r, int v, vu low, vu high) {
            int32_t x[2];  // each from memory into all lanes; as one number gcc would take them apart
            std::memcpy(x, codes + r * stride + u * 8, 4);
            std::memcpy(x + 1, codes + r * stride + u * 8 + 4, 4);
#if defined(VSL_QUADS)
            into[r][v] = multiply_quads(multiply_quads(into[r][v], (vi)low, x[0]), (vi)high, x[1]);
#else
            into[r][v] += multiply_bytes(low, splat(x[0])) + multiply_bytes(high, splat(x[1]));
#endif
        };
        if constexpr (kRows == 1) {
            for (int v = 0; v < kVectors; v++) add(0, v, units(v) & 0x0f0f0f0fu, units(v) >> 4 & 0x0f0f0f0fu);
        } else {
            vu low[kVectors], high[kVectors];
            for (int v = 0; v < kVectors; v++) low[v] = units(v) & 0x0f0f0f0fu, high[v] = units(v) >> 4 & 0x0f0f0f0fu;
            for (int r = 0; r < kRows; r++)
                for (int v = 0; v < kVectors; v++) add(r, v, low[v], high[v]);
        }
    }
    const bf16* const ends = (const bf16*)(group + kSlab * kGroup / 2) + j;
    for (int v = 0; v < kVectors; v++) {
        const vf scale = load(ends + v * kLanes), offset = load(ends + kSlab + v * kLanes) - scale * splat(8.0f);
        for (int r = 0; r < kRows; r++) {
#if defined(VSL_QUADS)
            const vf product = __builtin_convertvector(into[r][v], vf);
#else
            const vf product = __builtin_convertvector(add_pairs(into[r][v]), vf);
#endif
            float* const total = totals + r * kSlab + j + v * kLanes;
            store(total, load(total) + product * (scale * splat(scales[r * groups])) + offset * splat(sums[r * groups]));
        }
    }
}

template <int kRows>
inline void multiply_groups(const uint8_t* slab, int64_t row, const QuantizedGroups& x, int64_t inputs, float* totals) {
    // One row is multiplied by all of a group as it lies, which is then read from its first byte to its last.
    constexpr int kVectors = kRows == 1 && kLanes == 8 ? 8 : kLanes == 16 || kMoreRegisters == 2 ? 4 : 2;
    constexpr int64_t kNext = 2;  // groups from one to the one that is asked for meanwhile
    const int64_t groups = inputs / kGroup, half = (groups + 1) / 2;
    std::memset(totals, 0, kRows * kSlab * sizeof(float));
    const auto multiply = [&](int64_t g, int64_t begin, int64_t end) {
        const int64_t next = g + kNext < end ? g + kNext : groups + begin + (g + kNext - end);  // or of the next slab
        for (int j = 0; j < kSlab; j += kVectors * kLanes)
            multiply_group<kRows, kVectors>(slab + g * kGroupBytes, j, x.codes + row * inputs + g * kGroup, inputs,
                                            x.scales + row * groups + g, x.sums + row * groups + g, groups, totals,
                                            slab + next * kGroupBytes);
    };
    // Both halves of the inputs by turns: where a page of one ends, the other is in the middle of one, and read ahead by the core.
    for (int64_t g = 0; g < half; g++) {
        multiply(g, 0, half);
        if (half + g < groups) multiply(half + g, half, groups);
    }
}

template <class T>
inline void run_int4_bytes(Context& context, const Linear<T>& linear) {
    const int64_t inputs = linear.inputs, groups = inputs / kGroup;
    const QuantizedGroups x(context.shared.reserve(QuantizedGroups::bytes(linear.rows, inputs)), linear.rows, inputs);
    run_ranges(context, linear.rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            quantize_groups(linear.x + r * linear.x_stride, inputs, x.codes + r * inputs, x.scales + r * groups,
                            x.sums + r * groups);
    });
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int) {
        RowGroups<kMostInt4Together>(end - begin).each([&](int64_t first, auto count) {
            float totals[count * kSlab];
            multiply_groups<count>(into.weights + slab * slab_bytes(kInt4, inputs), begin + first, x, inputs, totals);
            for (int r = 0; r < count; r++)
                store_slab(totals + r * kSlab, into.out + (begin + first + r) * into.out_stride + slab * kSlab,
                           into.outputs - slab * kSlab);
        });
    });
}

#endif

}  // namespace vsl
