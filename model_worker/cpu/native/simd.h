// Vectors of floats as wide as the compiled-for CPU has them, written with the compilers' generic vector extension, so
// that one source serves AVX-512, AVX2, NEON and plain scalar machines: what the CPU has, and arithmetic lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vsl {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VSL_AVX512 1
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define VSL_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define VSL_NEON 1
#endif

#if defined(VSL_AVX512) && defined(__AVX512BF16__)
#define VSL_AVX512_BF16 1
#endif
#if defined(VSL_AVX512) && defined(__AVX512VNNI__)
#define VSL_VNNI 1
#elif defined(VSL_AVX2) && defined(__AVXVNNI__)
#define VSL_AVX_VNNI 1
#endif

#if defined(VSL_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define VSL_NEON_DOT 1
#endif
#if defined(VSL_NEON_DOT) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define VSL_NEON_BF16 1
#endif

// Instructions that multiply and add pairs of bfloat16.
#if defined(VSL_AVX512_BF16) || defined(VSL_NEON_BF16)
#define VSL_PAIRS 1
#endif
// Instructions, or a few of them, that multiply and add four bytes at once in vectors of kLanes.
#if defined(VSL_AVX_VNNI) || defined(VSL_NEON)
#define VSL_QUADS 1
#elif (defined(VSL_AVX2) || defined(VSL_AVX512)) && !defined(VSL_VNNI)
// Instructions that multiply bytes and add two of the products in 16 bits.
#define VSL_BYTES 1
#endif

struct bf16 {
    uint16_t bits;
};

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef int8_t vb __attribute__((vector_size(kLanes)));

inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }

// v, of which compilers do not know whence it came. Tuned for Zen, gcc otherwise reads memory again for each use of what it
// has loaded, and a core can read no more than it can multiply.
template <class V>
inline V in_register(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

inline vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// Keeps a NaN in `b`.
inline vf vmax(vf a, vf b) {
#if defined(VSL_AVX512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(VSL_AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select((vi)(a > b), a, b);
#endif
}

inline vi vmax(vi a, vi b) {
#if defined(VSL_AVX512)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(VSL_AVX2)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    const vi larger = (vi)(a > b);
    return (a & larger) | (b & ~larger);
#endif
}

// Keeps a NaN in `b`.
inline vf vmin(vf a, vf b) {
#if defined(VSL_AVX512)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(VSL_AVX2)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select((vi)(a < b), a, b);
#endif
}

// 2^x with a relative error below 2e-7; 0 for x < -126, also -inf; NaN for NaN. x must be below 128.
// 2^fraction is a polynomial of degree 5, fitted for the least relative error on its interval.
inline vf exp2(vf x) {
#if defined(VSL_AVX512)
    // x - floor(x); 0 for -inf
    const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const vf p = ((((0.0018775766f * f + 0.0089893406f) * f + 0.0558263175f) * f + 0.2401536107f) * f + 0.6931530833f) *
                     f + 0.99999994f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p x 2^floor(x)
#else
    const vi tiny = (vi)(x < splat(-126.0f));
    x = vmax(splat(-126.0f), x);
    const vf shifted = x + splat(12582912.0f);  // 1.5 x 2^23: rounds x to a whole number in the low mantissa bits
    const vf f = x - (shifted - splat(12582912.0f));
    const vf p = ((((0.0013276470f * f + 0.0096755410f) * f + 0.0555071346f) * f + 0.2402212024f) * f + 0.6931469440f) *
                     f + 1.0000001192f;
    return (vf)(((vi)p + ((vi)shifted << 23)) & ~tiny);
#endif
}

// a / b to the last bit but in rare cases, for b from 1 to 2^126; an infinite `a` gives NaN.
inline vf divide(vf a, vf b) {
#if defined(VSL_AVX512)
    vf r = (vf)_mm512_rcp14_ps((__m512)b);
    r += r * (splat(1.0f) - b * r);  // Newton's step
    const vf quotient = a * r;
    return quotient + r * (a - b * quotient);
#else
    return a / b;
#endif
}

}  // namespace vsl
