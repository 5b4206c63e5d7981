// What goes from one lane of a vector to another: sums and maxima over lanes, transposition.
#pragma once

#include "simd_memory.h"

namespace vsl {

inline float sum(vf v) {
#if defined(VSL_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(VSL_AVX2)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#elif defined(VSL_NEON)
    return vaddvq_f32((float32x4_t)v);
#else
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += v[i];
    return total;
#endif
}

// Ignores NaN, or returns it, as it happens.
inline float maximum(vf v) {
#if defined(VSL_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(VSL_AVX2)
    __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#elif defined(VSL_NEON)
    return vmaxvq_f32((float32x4_t)v);
#else
    float best = v[0];
    for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

inline int32_t maximum(vi v) {
#if defined(VSL_AVX512)
    return _mm512_reduce_max_epi32((__m512i)v);
#elif defined(VSL_AVX2)
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_srli_epi64(half, 32)));
#else
    int32_t best = v[0];
    for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

#if defined(__clang__)
#define VSL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VSL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// v[0..kLanes) -> one vector whose lane i is the sum of the lanes of v[i]. Destroys v.
inline vf sum_each(vf* v) {
#if defined(VSL_AVX512)
#define VSL_PAIR(n, lo, hi)                                                                     \
    for (int i = 0; i < n; i++) {                                                               \
        const vf a = v[2 * i], b = v[2 * i + 1];                                                \
        v[i] = VSL_SHUFFLE(a, b, VSL_UNPACK lo) + VSL_SHUFFLE(a, b, VSL_UNPACK hi);             \
    }
#define VSL_UNPACK(...) __VA_ARGS__
    VSL_PAIR(8, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    VSL_PAIR(4, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    VSL_PAIR(2, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    VSL_PAIR(1, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef VSL_PAIR
#undef VSL_UNPACK
    return v[0];
#elif defined(VSL_AVX2)
    for (int n = 4; n >= 2; n /= 2)
        for (int i = 0; i < n; i++) v[i] = (vf)_mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    // Each half of v[0] and v[1] has four lanes' sums of its own half.
    return (vf)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x20) +
           (vf)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x31);
#elif defined(VSL_NEON)
    return (vf)vpaddq_f32(vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]),
                          vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]));
#else
    float sums[kLanes];
    for (int i = 0; i < kLanes; i++) sums[i] = sum(v[i]);
    return load(sums);
#endif
}

// rows[i][j] <-> rows[j][i], of kLanes x kLanes 32-bit numbers.
#if defined(VSL_AVX512)
inline void transpose(__m512i* rows) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // rows[4 a + b] now holds, in each quarter c, column 4 c + b of rows 4 a .. 4 a + 3.
    for (int b = 0; b < 4; b++) {
        const __m512i x = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x44);
        const __m512i y = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xee);
        const __m512i z = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x44);
        const __m512i w = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xee);
        t[b] = _mm512_shuffle_i32x4(x, z, 0x88);
        t[4 + b] = _mm512_shuffle_i32x4(x, z, 0xdd);
        t[8 + b] = _mm512_shuffle_i32x4(y, w, 0x88);
        t[12 + b] = _mm512_shuffle_i32x4(y, w, 0xdd);
    }
    for (int i = 0; i < 16; i++) rows[i] = t[i];
}
inline void transpose(vf* rows) { transpose((__m512i*)rows); }
#elif defined(VSL_AVX2)
inline void transpose(vf* rows) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    // u[4 a + b] now holds, in each half c, column 4 c + b of rows 4 a .. 4 a + 3.
    for (int b = 0; b < 4; b++) {
        rows[b] = (vf)_mm256_permute2f128_ps(u[b], u[4 + b], 0x20);
        rows[4 + b] = (vf)_mm256_permute2f128_ps(u[b], u[4 + b], 0x31);
    }
}
#else
inline void transpose(vf* rows) {
    const vf a = VSL_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5), b = VSL_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
    const vf c = VSL_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5), d = VSL_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = VSL_SHUFFLE(a, c, 0, 1, 4, 5), rows[1] = VSL_SHUFFLE(a, c, 2, 3, 6, 7);
    rows[2] = VSL_SHUFFLE(b, d, 0, 1, 4, 5), rows[3] = VSL_SHUFFLE(b, d, 2, 3, 6, 7);
}
#endif

}  // namespace vsl
