// Keys and values in 8 bits; model_worker/kv_int8.py describes the format and is what this is tested against.
#pragma once

#include "simd_lanes.h"

namespace vsl {

constexpr float kInt8Levels = 127;

// The largest |x| of n values, or NaN if one is NaN: as whole numbers, bits order like this.
template <class T>
inline float largest_magnitude(const T* x, int n) {
    vi most = {};
    for (int i = 0; i < n; i += kLanes) {
        const vi bits = (vi)(n - i < kLanes ? load_part(x + i, n - i) : load(x + i)) & splat(0x7fffffff);
        most = vmax(most, bits);
    }
    const int32_t largest = maximum(most);
    float result;
    std::memcpy(&result, &largest, sizeof result);
    return result;
}

// Writes the codes of n values and returns their scale, which is not finite if one of them is not.
template <class T>
inline float quantize_row(const T* x, int8_t* codes, int n) {
    const float scale = largest_magnitude(x, n) / kInt8Levels;
    const vf divisor = splat(scale > 0 ? scale : 1.0f), most = splat(kInt8Levels);
    const auto code = [&](vf v) { return vmax(splat(-kInt8Levels), vmin(most, v / divisor)); };
    int i = 0;
#if defined(VSL_AVX2)
    const auto whole = [&](int at) { return (vi)_mm256_cvtps_epi32((__m256)code(load(x + at))); };
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        store_bytes(codes + i, whole(i), whole(i + kLanes), whole(i + 2 * kLanes), whole(i + 3 * kLanes));
#endif
    for (; i + kLanes <= n; i += kLanes) store(codes + i, code(load(x + i)));
    if (i < n) store_part(codes + i, code(load_part(x + i, n - i)), n - i);
    return scale;
}

}  // namespace vsl
