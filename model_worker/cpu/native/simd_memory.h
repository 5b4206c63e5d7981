// Vectors from memory and into it. bfloat16 and int8 are loaded to and stored from fp32.
#pragma once

#include "simd.h"

namespace vsl {

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// A vector at any address, of elements of any type. Not by memcpy: of a vector within an array gcc may make two copies by way
// of the stack, each of which waits for the one before.
template <class V>
struct __attribute__((packed, may_alias)) Anywhere {
    V value;
};

template <class V>
inline V load_as(const void* p) {
    return ((const Anywhere<V>*)p)->value;
}

template <class V>
inline void store_as(void* p, V v) {
    ((Anywhere<V>*)p)->value = v;
}

inline vf load(const float* p) { return load_as<vf>(p); }

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

inline vf load(const bf16* p) { return widen(load_as<vh>(p)); }

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
    return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf);
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

inline void store(float* p, vf v) { store_as(p, v); }
inline void store(bf16* p, vf v) { store_as(p, narrow(v)); }

// The lowest byte of each lane.
inline void store_bytes(int8_t* p, vi v) {
#if defined(VSL_NEON)
    const int16x4_t half = vmovn_s32((int32x4_t)v);
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
    std::memcpy(p, &four, sizeof four);
#else
    store_as(p, __builtin_convertvector(v, vb));
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

}  // namespace vsl
