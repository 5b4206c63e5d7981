// Linear layers with AVX-512's instructions that multiply and add pairs of bfloat16 (AVX512-BF16) and quadruples of
// 8-bit integers (AVX512-VNNI). A few rows at a time against all 64 outputs of a slab; see linear.h for the layout.
#pragma once

#include "linear.h"

namespace vsl {

#if defined(VSL_AVX512)

constexpr int kDotRows = 6;   // x 4 vectors of outputs: 24 of the 32 registers hold sums

inline void prefetch_slab_row(const uint32_t* units) {
    for (int j = 0; j < kPanels; j++) _mm_prefetch((const char*)(units + j * 16) + kAhead, _MM_HINT_T0);
}

#if defined(VSL_AVX512_BF16)
struct PairUnits {
    using Sum = __m512;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(Sum sum, __m512i weights, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
    }
};
#endif

#if defined(VSL_VNNI)
struct QuadUnits {
    using Sum = __m512i;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum multiply_add(Sum sum, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(sum, weights, x); }
};
#endif

// sums[row][panel]. x: rows of 32-bit units, `stride` apart.
template <class Units, int kRows>
inline void dot_slab(const uint32_t* slab, const uint32_t* x, int64_t stride, int64_t units,
                     typename Units::Sum (*sums)[kPanels]) {
    typename Units::Sum into[kRows][kPanels];
    for (int r = 0; r < kRows; r++)
        for (int j = 0; j < kPanels; j++) into[r][j] = Units::zero();
    for (int64_t k = 0; k < units; k++, slab += kSlab) {
        prefetch_slab_row(slab);
        __m512i weights[kPanels];
        for (int j = 0; j < kPanels; j++) weights[j] = _mm512_loadu_si512(slab + j * 16);
        for (int r = 0; r < kRows; r++) {
            const __m512i unit = _mm512_set1_epi32((int)x[r * stride + k]);
            for (int j = 0; j < kPanels; j++) into[r][j] = Units::multiply_add(into[r][j], weights[j], unit);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int j = 0; j < kPanels; j++) sums[r][j] = into[r][j];
}

// As dot_slab for 1 to kDotRows rows.
template <class Units>
inline void dot_rows(const uint32_t* slab, const uint32_t* x, int64_t stride, int64_t units, int rows,
                     typename Units::Sum (*sums)[kPanels]) {
    switch (rows) {
        case 1: return dot_slab<Units, 1>(slab, x, stride, units, sums);
        case 2: return dot_slab<Units, 2>(slab, x, stride, units, sums);
        case 3: return dot_slab<Units, 3>(slab, x, stride, units, sums);
        case 4: return dot_slab<Units, 4>(slab, x, stride, units, sums);
        case 5: return dot_slab<Units, 5>(slab, x, stride, units, sums);
        default: return dot_slab<Units, 6>(slab, x, stride, units, sums);
    }
}

// Rounds 32 outputs of a row, from number `output` on, into place; what fills up the last slab is left out.
inline void store_two(const Linear<bf16>& linear, int64_t row, int64_t output, __m512 a, __m512 b) {
    const int64_t left = linear.outputs - output;
    if (left <= 0) return;
    const __m512i pair = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)narrow((vf)a)), (__m256i)narrow((vf)b), 1);
    bf16* const out = linear.out + row * linear.out_stride + output;
    _mm512_mask_storeu_epi16(out, left >= 32 ? ~0u : (1u << left) - 1, pair);
}

inline void store_two(const Linear<float>& linear, int64_t row, int64_t output, __m512 a, __m512 b) {
    const int64_t left = linear.outputs - output;
    if (left <= 0) return;
    float* const out = linear.out + row * linear.out_stride + output;
    _mm512_mask_storeu_ps(out, left >= 16 ? 0xffff : (1u << left) - 1, a);
    if (left > 16) _mm512_mask_storeu_ps(out + 16, left >= 32 ? 0xffff : (1u << (left - 16)) - 1, b);
}

// The same for whole-number sums of int8.
template <class T>
inline void store_two(const Linear<T>& linear, const QuantizedRows& x, int64_t row, int64_t output, __m512i a,
                      __m512i b) {
    const __m512 row_scale = _mm512_set1_ps(x.scales[row]);
    const __m512i shift = _mm512_set1_epi32(x.sums[row]);  // what the 128 added to each weight gave
    const auto value = [&](__m512i sums, int64_t first) {
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(linear.scales + first), row_scale);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, shift)), scale);
    };
    store_two(linear, row, output, value(a, output), value(b, output + 16));
}

#if defined(VSL_AVX512_BF16)

// Rows begin..end of a slab's outputs.
inline void dot_bf16(const Linear<bf16>& linear, int64_t slab, int64_t begin, int64_t end) {
    const int64_t inputs = linear.inputs;
    const uint32_t* const weights = (const uint32_t*)(linear.weights + slab * slab_bytes(kBf16, inputs));
    for (int64_t row = begin; row < end; row += kDotRows) {
        const int count = (int)std::min<int64_t>(kDotRows, end - row);
        __m512 sums[kDotRows][kPanels];
        const bf16* const x = linear.x + row * linear.x_stride;
        dot_rows<PairUnits>(weights, (const uint32_t*)x, linear.x_stride / 2, inputs / 2, count, sums);
        for (int r = 0; r < count; r++)
            for (int j = 0; j < kPanels; j += 2)
                store_two(linear, row + r, slab * kSlab + j * 16, sums[r][j], sums[r][j + 1]);
    }
}

// The bf16 values of c - 8 for the sixteen codes c, twice: the fifth bit of an index belongs to the next code.
inline __m512i code_values() {
    alignas(64) uint16_t table[32];
    for (int c = 0; c < 32; c++) {
        const float value = (float)(c % 16 - 8);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        table[c] = (uint16_t)(bits >> 16);
    }
    return _mm512_load_si512(table);
}

constexpr int kInt4Rows = 4;

// Panels panel .. panel + kCount of an int4 slab for kRows rows of pairs.
template <int kRows, int kCount>
inline void int4_panels(const uint8_t* slab, int panel, const uint32_t* x, int64_t stride, const float* group_sums,
                        int64_t inputs, float* values) {
    constexpr int kShare = kGroupBytes / kPanels * kCount;  // of a group's bytes
    const __m512i table = code_values();
    const int64_t groups = inputs / kGroup;
    __m512 total[kRows][kCount];
    for (int r = 0; r < kRows; r++)
        for (int p = 0; p < kCount; p++) total[r][p] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, slab += kGroupBytes) {
        for (int line = 0; line < kShare; line += 64)
            _mm_prefetch((const char*)slab + kAhead + panel / kCount * kShare + line, _MM_HINT_T0);
        __m512 sums[kRows][kCount];
        for (int r = 0; r < kRows; r++)
            for (int p = 0; p < kCount; p++) sums[r][p] = _mm512_setzero_ps();
        for (int u = 0; u < 4; u++) {
            __m512i units[kCount];
            for (int p = 0; p < kCount; p++)
                units[p] = _mm512_loadu_si512(slab + u * kSlab * 4 + (panel + p) * 64);
            for (int j = 0; j < 4; j++) {
                __m512i weights[kCount];
                for (int p = 0; p < kCount; p++)
                    weights[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(units[p], 4 * j), table);
                for (int r = 0; r < kRows; r++) {
                    const __m512i unit = _mm512_set1_epi32((int)x[r * stride + g * (kGroup / 2) + u * 4 + j]);
                    for (int p = 0; p < kCount; p++) sums[r][p] = PairUnits::multiply_add(sums[r][p], weights[p], unit);
                }
            }
        }
        const bf16* const scales = (const bf16*)(slab + kSlab * kGroup / 2) + panel * 16;
        for (int p = 0; p < kCount; p++) {
            const __m512 scale = (__m512)load(scales + p * 16), offset = (__m512)load(scales + kSlab + p * 16);
            for (int r = 0; r < kRows; r++) {
                total[r][p] = _mm512_fmadd_ps(scale, sums[r][p], total[r][p]);
                total[r][p] = _mm512_fmadd_ps(offset, _mm512_set1_ps(group_sums[r * groups + g]), total[r][p]);
            }
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int p = 0; p < kCount; p++) _mm512_storeu_ps(values + r * kSlab + (panel + p) * 16, total[r][p]);
}

// 1 to kInt4Rows rows of a slab. values: [rows][64].
inline void int4_rows(const uint8_t* slab, const uint32_t* x, int64_t stride, const float* group_sums, int64_t inputs,
                      int rows, float* values) {
    if (rows == 1) return int4_panels<1, 4>(slab, 0, x, stride, group_sums, inputs, values);
    if (rows == 2) return int4_panels<2, 4>(slab, 0, x, stride, group_sums, inputs, values);
    for (int panel = 0; panel < kPanels; panel += 2) {
        if (rows == 3)
            int4_panels<3, 2>(slab, panel, x, stride, group_sums, inputs, values);
        else
            int4_panels<4, 2>(slab, panel, x, stride, group_sums, inputs, values);
    }
}

inline void dot_int4(const Linear<bf16>& linear, const float* group_sums, int64_t slab, int64_t begin, int64_t end) {
    const int64_t inputs = linear.inputs;
    const uint8_t* const weights = linear.weights + slab * slab_bytes(kInt4, inputs);
    for (int64_t row = begin; row < end; row += kInt4Rows) {
        const int count = (int)std::min<int64_t>(kInt4Rows, end - row);
        float values[kInt4Rows * kSlab];
        int4_rows(weights, (const uint32_t*)(linear.x + row * linear.x_stride), linear.x_stride / 2,
                  group_sums + row * (inputs / kGroup), inputs, count, values);
        for (int r = 0; r < count; r++)
            store_slab(values + r * kSlab, linear.out + (row + r) * linear.out_stride + slab * kSlab,
                       linear.outputs - slab * kSlab);
    }
}
#endif  // VSL_AVX512_BF16

#if defined(VSL_VNNI)
template <class T>
inline void dot_int8(const Linear<T>& linear, const QuantizedRows& x, int64_t slab, int64_t begin, int64_t end) {
    const int64_t inputs = linear.inputs;
    const uint32_t* const weights = (const uint32_t*)(linear.weights + slab * slab_bytes(kInt8, inputs));
    for (int64_t row = begin; row < end; row += kDotRows) {
        const int count = (int)std::min<int64_t>(kDotRows, end - row);
        __m512i sums[kDotRows][kPanels];
        dot_rows<QuadUnits>(weights, (const uint32_t*)(x.codes + row * inputs), inputs / 4, inputs / 4, count, sums);
        for (int r = 0; r < count; r++)
            for (int j = 0; j < kPanels; j += 2)
                store_two(linear, x, row + r, slab * kSlab + j * 16, sums[r][j], sums[r][j + 1]);
    }
}
#endif

#endif  // VSL_AVX512

}  // namespace vsl
