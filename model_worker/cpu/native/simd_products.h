// Sums of products of 16-bit integers, of bytes and of bfloat16, as far as the CPU has instructions for them.
#pragma once

#include "simd.h"

namespace vsl {

// sum + the products of pairs of 16-bit integers, of w and, the same two in all lanes, of x.
inline vi multiply_pairs(vi sum, vi w, int32_t x) {
#if defined(VSL_AVX512)
    return sum + (vi)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(VSL_AVX2)
    return sum + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else
    return sum + ((w << 16) >> 16) * splat((int32_t)(int16_t)x) + (w >> 16) * splat(x >> 16);
#endif
}

#if defined(VSL_AVX512) || defined(VSL_AVX2)
typedef int16_t vs __attribute__((vector_size(4 * kLanes)));

// The sums of adjacent products of bytes without a sign, of a, and with one, of b. They must fit 16 bits.
inline vs multiply_bytes(vu a, vi b) {
#if defined(VSL_AVX512)
    return (vs)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#else
    return (vs)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#endif
}

inline vi add_pairs(vs v) {
#if defined(VSL_AVX512)
    return (vi)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#else
    return (vi)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#endif
}
#endif

#if defined(VSL_NEON_BF16)
// sum + the products of pairs of bfloat16, of a and, the same two in all lanes, of x.
inline vf multiply_bf16(vf sum, vf a, vf x) {
    return (vf)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_f32((float32x4_t)a),
                           vreinterpretq_bf16_f32((float32x4_t)x));
}
#endif

#if defined(VSL_QUADS)
// Whether multiply_quads takes bytes of w without a sign. If not, they have one, and must not be -128 where x is.
#if defined(VSL_AVX_VNNI) || defined(VSL_NEON_BF16)
constexpr bool kUnsignedQuads = true;
#else
constexpr bool kUnsignedQuads = false;
#endif

// sum + the products of four bytes, of w and, the same four in all lanes and with a sign, of x.
inline vi multiply_quads(vi sum, vi w, int32_t x) {
#if defined(VSL_AVX_VNNI)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#else
    const int8x16_t fours = vreinterpretq_s8_s32(vdupq_n_s32(x));
#if defined(VSL_NEON_BF16)
    return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)w, fours);
#elif defined(VSL_NEON_DOT)
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, fours);
#else
    // Two products fit 16 bits.
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8(fours));
    const int16x8_t high = vmull_high_s8((int8x16_t)w, fours);
    return (vi)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
#endif
}
#endif

}  // namespace vsl
