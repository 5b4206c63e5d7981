// Vectors of floats as wide as the compiled-for CPU has them, written with the compilers' generic vector extension, so
// that one source serves AVX-512, AVX2, NEON and plain scalar machines. bfloat16 is loaded to and stored from fp32.
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

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vf widen(vh h) {
#if defined(VSL_AVX512)  // gcc 12 makes seven instructions of the generic conversion
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(VSL_AVX2)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#elif defined(VSL_NEON)
    return (vf)vshll_n_u16((uint16x4_t)h, 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

inline vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return widen(h);
}

inline vf load(const int8_t* p) {
#if defined(VSL_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(VSL_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(VSL_NEON)  // compilers know no vectors of four bytes there
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
    vb b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

// The upper 16 bits of each lane are what it is in bfloat16, rounded to nearest even. Of a NaN some lower bit of the 16, or
// the next one, must be zero, or it becomes a number: none is otherwise that comes of bfloat16 or of arithmetic.
inline vu round_to_bf16(vf x) { return (vu)x + 0x7fff + (((vu)x >> 16) & 1); }

// Round to nearest even, NaN stays NaN.
inline vh narrow(vf x) {
#if defined(VSL_AVX512_BF16)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#elif defined(VSL_NEON_BF16)
    return (vh)vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x));
#else
    const vu bits = (round_to_bf16(x) | (vu)(x != x)) >> 16;
#if defined(VSL_AVX2)
    const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(bits, vh);
#endif
#endif
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
    vh h = narrow(v);
    std::memcpy(p, &h, sizeof h);
}

// The lowest byte of each lane.
inline void store_bytes(int8_t* p, vi v) {
#if defined(VSL_NEON)
    const int16x4_t half = vmovn_s32((int32x4_t)v);
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
    std::memcpy(p, &four, sizeof four);
#else
    const vb b = __builtin_convertvector(v, vb);
    std::memcpy(p, &b, sizeof b);
#endif
}

#if defined(VSL_AVX2)
// Each lane must fit a byte, or it becomes another one.
inline void store_bytes(int8_t* p, vi a, vi b, vi c, vi d) {
    const __m256i low = _mm256_packs_epi32((__m256i)a, (__m256i)b), high = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
#endif

// Round to nearest even. |v| must be below 128; a NaN becomes some number.
inline void store(int8_t* p, vf v) {
#if defined(VSL_AVX512)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#else
    constexpr float kShift = 12582912.0f;  // 1.5 x 2^23: rounds to a whole number in the low mantissa bits
    store_bytes(p, (vi)(v + splat(kShift)) - (vi)splat(kShift));
#endif
}

// The first n < kLanes elements; the other lanes are zero.
template <class T>
inline vf load_part(const T* p, int n) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

// As many elements as there are, kLanes at most; the other lanes are zero.
template <class T>
inline vf load_up_to(const T* p, int left) {
    return left >= kLanes ? load(p) : left > 0 ? load_part(p, left) : vf{};
}

template <class T>
inline void store_part(T* p, vf v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(T));
}

// What storing to T and loading again gives: the rounding that a tensor of that dtype would have done.
inline vf rounded_to(vf x, const float*) { return x; }
inline vf rounded_to(vf x, const bf16*) { return widen(narrow(x)); }

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
