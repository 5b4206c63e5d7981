// Rows of queries, keys and values brought into the order in which chunk.h multiplies them, and sums back into rows.
#pragma once

#include <algorithm>

#include "dot.h"
#include "simd_lanes.h"

namespace vsl {

// Keys in a block, a multiple of 32. What it is with AMX is worth 40 % there: packing and the sums' way through the cache
// cost as much as the products. Without it the products take most of the time, and smaller blocks suit smaller caches.
#if defined(VSL_AMX)
constexpr int kBlockKeys = 256;
#else
constexpr int kBlockKeys = 128;
#endif

// kLanes rows of head_dim elements, each times its scale, if it is of int8 -> [padded_dim][kLanes], zero beyond head_dim.
template <class T>
inline void pack_columns(const T* const* rows, int head_dim, int padded_dim, float* out,
                         [[maybe_unused]] const float* scales = nullptr) {
    for (int d = 0; d < padded_dim; d += kLanes, out += kLanes * kLanes) {
        vf block[kLanes];
        for (int i = 0; i < kLanes; i++) {
            block[i] = load_up_to(rows[i] + d, head_dim - d);
            if constexpr (std::is_same_v<T, int8_t>) block[i] *= splat(scales[i]);
        }
        transpose(block);
        for (int i = 0; i < kLanes; i++) store(out + i * kLanes, block[i]);
    }
}

// As above, transposed in pairs.
inline void pack_columns(const bf16* const* rows, int head_dim, int padded_dim, float* out, const float* = nullptr) {
    for (int d = 0; d < padded_dim; d += 2 * kLanes) {
        vf block[kLanes];
        if (d + 2 * kLanes <= head_dim)
            for (int i = 0; i < kLanes; i++) block[i] = load((const float*)(rows[i] + d));
        else
            for (int i = 0; i < kLanes; i++) {
                block[i] = vf{};
                std::memcpy(block + i, rows[i] + d, (head_dim - d) * sizeof(bf16));
            }
        transpose(block);
        for (int i = 0; i < std::min(kLanes, (padded_dim - d) / 2); i++, out += 2 * kLanes) {
            store(out, (vf)((vu)block[i] << 16));
            store(out + kLanes, (vf)((vu)block[i] & 0xffff0000u));
        }
    }
}

// [head_dim][kLanes] sums times factor -> that many elements of each of the first `used` lanes' rows.
template <class T>
inline void unpack_columns(const float* sums, vf factor, int used, T* const* rows, int head_dim) {
    int d = 0;
#if !defined(VSL_PAIRS)
    if constexpr (std::is_same_v<T, bf16>)
        for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
            vf block[kLanes];
            for (int i = 0; i < kLanes; i++) {
                const float* const from = sums + (d + 2 * i) * kLanes;
                block[i] = (vf)pair_to_bf16(load(from) * factor, load(from + kLanes) * factor);
            }
            transpose(block);
            for (int i = 0; i < used; i++) store((float*)(rows[i] + d), block[i]);
        }
#endif
    for (; d + kLanes <= head_dim; d += kLanes) {
        vf block[kLanes];
        for (int i = 0; i < kLanes; i++) block[i] = load(sums + (d + i) * kLanes) * factor;
        transpose(block);
        for (int i = 0; i < used; i++) store(rows[i] + d, block[i]);
    }
    for (; d < head_dim; d++) {
        T values[kLanes];
        store(values, load(sums + d * kLanes) * factor);
        for (int i = 0; i < used; i++) rows[i][d] = values[i];
    }
}

#if defined(VSL_AVX512_BF16)
// Of 32 elements from d on those within head_dim.
inline __mmask32 mask32(int head_dim, int d) {
    const int left = head_dim - d;
    return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
}

// As above, [padded_dim / 2][kLanes] pairs.
inline void pack_columns(const bf16* const* rows, int head_dim, int padded_dim, uint32_t* out) {
    for (int d = 0; d < padded_dim; d += 32, out += 16 * kLanes) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_maskz_loadu_epi16(mask32(head_dim, d), rows[i] + d);
        transpose(block);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * kLanes, block[i]);
    }
}

// [padded][padded_dim / 2] pairs, zero beyond head_dim.
inline void pack_keys(const bf16* const* rows, int padded, int head_dim, int padded_dim, uint32_t* out) {
    for (int i = 0; i < padded; i++, out += padded_dim / 2)
        for (int d = 0; d < padded_dim; d += 32)
            _mm512_storeu_si512(out + d / 2, _mm512_maskz_loadu_epi16(mask32(head_dim, d), rows[i] + d));
}

// [head_dim][kBlockKeys / 2] pairs of adjacent keys' values.
// A quarter of a vector takes 8 values of one key out of 8; each quarter is transposed in itself.
inline void pack_values(const bf16* const* rows, int padded, int head_dim, uint32_t* out) {
    for (int key = 0; key < padded; key += 32)
        for (int d = 0; d < head_dim; d += 8) {
            __m512i block[8];
            for (int i = 0; i < 8; i++) {
                const auto quarter = [&](int j) { return _mm_loadu_si128((__m128i*)(rows[key + 8 * j + i] + d)); };
                block[i] = _mm512_castsi128_si512(quarter(0));
                block[i] = _mm512_inserti32x4(block[i], quarter(1), 1);
                block[i] = _mm512_inserti32x4(block[i], quarter(2), 2);
                block[i] = _mm512_inserti32x4(block[i], quarter(3), 3);
            }
            transpose_quarters(block);
            for (int i = 0; i < 8; i++) _mm512_storeu_si512(out + (d + i) * (kBlockKeys / 2) + key / 2, block[i]);
        }
}
#elif defined(VSL_PAIRS)
inline uint32_t pair(bf16 low, bf16 high) { return low.bits | (uint32_t)high.bits << 16; }

inline void pack_columns(const bf16* const* rows, int head_dim, int padded_dim, uint32_t* out) {
    for (int d = 0; d < padded_dim; d += 2)
        for (int i = 0; i < kLanes; i++) *out++ = d < head_dim ? pair(rows[i][d], rows[i][d + 1]) : 0;
}

inline void pack_keys(const bf16* const* rows, int padded, int head_dim, int padded_dim, uint32_t* out) {
    for (int i = 0; i < padded; i++, out += padded_dim / 2) {
        std::memcpy(out, rows[i], head_dim * sizeof(bf16));
        std::memset(out + head_dim / 2, 0, (padded_dim - head_dim) * sizeof(bf16));
    }
}

inline void pack_values(const bf16* const* rows, int padded, int head_dim, uint32_t* out) {
    for (int key = 0; key < padded; key += 2)
        for (int d = 0; d < head_dim; d++)
            out[d * (kBlockKeys / 2) + key / 2] = pair(rows[key][d], rows[key + 1][d]);
}
#endif

}  // namespace vsl
