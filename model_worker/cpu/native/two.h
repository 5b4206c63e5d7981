// Rows taken two vectors at a time, in the order in which their elements are quickest to take apart and to put together: of
// bfloat16 the even ones and the odd ones, which are a shift and a mask away. Widening 8 of them takes a shuffle, and
// narrowing two.
#pragma once

#include "simd_memory.h"

#define VSL_INLINE __attribute__((always_inline))

namespace vsl {

#if defined(VSL_AVX512_BF16)
// For permutexvar: element i of the lower half, then element i of the upper one, for each i.
inline __m512i interleaved_halves() {
    alignas(64) uint16_t from[32];
    for (int i = 0; i < 16; i++) from[2 * i] = (uint16_t)i, from[2 * i + 1] = (uint16_t)(16 + i);
    return _mm512_load_si512(from);
}
#endif

// Two vectors as bfloat16, `low` in the lower halves of the lanes. Of a NaN see round_to_bf16.
inline vu pair_to_bf16(vf low, vf high) {
#if defined(VSL_AVX512_BF16)
    return (vu)_mm512_permutexvar_epi16(interleaved_halves(), (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#elif defined(VSL_PAIRS)
    return (vu)widen(narrow(low)) >> 16 | (vu)widen(narrow(high));
#else
    return round_to_bf16(low) >> 16 | (round_to_bf16(high) & 0xffff0000u);
#endif
}

// 2 x kLanes elements: of bfloat16 the even and the odd ones, of float the first and the second half.
struct Two {
    vf a, b;
};

inline Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
inline Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
inline Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
inline Two operator*(Two x, vf y) { return {x.a * y, x.b * y}; }

inline Two two_of(vu pairs) { return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)}; }

inline Two rounded_to(Two x, const float*) { return x; }
inline Two rounded_to(Two x, const bf16*) {
#if defined(VSL_PAIRS)
    return two_of(pair_to_bf16(x.a, x.b));
#else
    return {(vf)(round_to_bf16(x.a) & 0xffff0000u), (vf)(round_to_bf16(x.b) & 0xffff0000u)};
#endif
}

inline Two load_two(const float* p) { return {load(p), load(p + kLanes)}; }
inline Two load_two(const bf16* p) { return two_of((vu)load((const float*)p)); }

inline void store_two(float* p, Two v) { store(p, v.a), store(p + kLanes, v.b); }
inline void store_two(bf16* p, Two v) { store((float*)p, (vf)pair_to_bf16(v.a, v.b)); }

// As load_two and store_two of the first `left` elements, if there are no more; the others are zero.
template <class T>
inline Two load_two(const T* p, int64_t left) {
    if (left >= 2 * kLanes) return load_two(p);
    T elements[2 * kLanes] = {};
    std::memcpy(elements, p, left * sizeof(T));
    return load_two(elements);
}

template <class T>
inline void store_two(T* p, Two v, int64_t left) {
    if (left >= 2 * kLanes) return store_two(p, v);
    T elements[2 * kLanes];
    store_two(elements, v);
    std::memcpy(p, elements, left * sizeof(T));
}

// Calls work(i, left) for the elements from every i = 0, 2 x kLanes, .. below size. Inlined, it has no branches of load_two
// and store_two but for the last ones.
template <class Work>
inline void for_twos(int64_t size, const Work& work) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) work(i, 2 * kLanes);
    if (i < size) work(i, size - i);
}

}  // namespace vsl
