// Makes int8 and int4 weights, in the layout that linear.h draws, of matrices in bf16 or fp32.
// tests/model_worker/cpu/slab_packing.py does the same in plain torch, and says what is calculated.
#pragma once

#include "linear.h"

namespace vsl {

constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number, to even on ties

inline vf round_even(vf x) { return (x + splat(kRound)) - splat(kRound); }

inline float minimum(vf v) { return -maximum(-v); }

// Calls pack_row(row, slab) for each row of the matrix, and clears what fills up the last slab.
template <class PackRow>
inline void pack_slabs(Context& context, int64_t outputs, int64_t bytes, uint8_t* weights, const PackRow& pack_row) {
    run_stretches(context, (int)((outputs + kSlab - 1) / kSlab), [&](int slab, int) {
        uint8_t* const to = weights + slab * bytes;
        if ((slab + 1) * (int64_t)kSlab > outputs) std::memset(to, 0, bytes);
        for (int64_t row = slab * (int64_t)kSlab; row < outputs && row < (slab + 1) * (int64_t)kSlab; row++)
            pack_row(row, to);
    });
}

// inputs: a multiple of kGroup. scales: one an output.
template <class T>
void pack_int8(Context& context, const T* matrix, int64_t outputs, int64_t inputs, uint8_t* weights, float* scales) {
    constexpr float kLevels = 127, kSmallest = 1e-30f;
    pack_slabs(context, outputs, slab_bytes(kInt8, inputs), weights, [&](int64_t row, uint8_t* slab) {
        const T* const x = matrix + row * inputs;
        vf most = {};
        for (int64_t i = 0; i < inputs; i += kLanes) most = vmax(most, vmax(load(x + i), -load(x + i)));
        const float scale = std::fmax(maximum(most), kSmallest) / kLevels;
        scales[row] = scale;
        uint32_t* const units = (uint32_t*)slab + row % kSlab;
        int8_t codes[kGroup];
        for (int64_t i = 0; i < inputs; i += kGroup) {
            for (int j = 0; j < kGroup; j += kLanes) store(codes + j, load(x + i + j) / splat(scale));
            for (int j = 0; j < kGroup; j += 4) {
                uint32_t unit;
                std::memcpy(&unit, codes + j, 4);
                units[(i + j) / 4 * kSlab] = unit ^ 0x80808080u;  // flipping the highest bit adds 128
            }
        }
    });
}

// Codes less 8 for values of a group; 0 where all of them are the same, which the offset alone then gives.
inline void nearest_codes(const vf* values, float scale, float offset, vf* codes) {
    const vf divisor = splat(scale > 0 ? scale : 1.0f);
    for (int i = 0; i < kGroup / kLanes; i++)
        codes[i] = vmin(splat(7.0f), vmax(splat(-8.0f), round_even((values[i] - splat(offset)) / divisor)));
}

inline float total(const vf* values) {
    vf sums = values[0];
    for (int i = 1; i < kGroup / kLanes; i++) sums += values[i];
    return sum(sums);
}

// A group's scale and offset, which are rounded to bf16, and its codes, 0 to 15.
template <class T>
inline void quantize_group(const T* x, bf16* scale_out, bf16* offset_out, int32_t* codes_out) {
    constexpr int kVectors = kGroup / kLanes;
    vf values[kVectors], codes[kVectors], products[kVectors], squares[kVectors];
    for (int i = 0; i < kVectors; i++) values[i] = rounded_to(load(x + i * kLanes), (const bf16*)nullptr);
    vf low = values[0], high = values[0];
    for (int i = 1; i < kVectors; i++) low = vmin(low, values[i]), high = vmax(high, values[i]);
    const float lowest = minimum(low);
    float scale = (maximum(high) - lowest) / 15.0f, offset = lowest + 8.0f * scale;
    nearest_codes(values, scale, offset, codes);
    const float mean_code = total(codes) / kGroup, mean = total(values) / kGroup;
    for (int i = 0; i < kVectors; i++) {
        const vf spread = codes[i] - splat(mean_code);
        products[i] = spread * values[i], squares[i] = spread * spread;
    }
    const float variance = total(squares);
    if (variance > 0) scale = total(products) / variance;
    offset = mean - mean_code * scale;
    store_part(scale_out, splat(scale), 1);
    store_part(offset_out, splat(offset), 1);
    nearest_codes(values, to_float(*scale_out), to_float(*offset_out), codes);
    for (int i = 0; i < kVectors; i++) {
        const vi whole = __builtin_convertvector(codes[i] + splat(8.0f), vi);
        std::memcpy(codes_out + i * kLanes, &whole, sizeof whole);
    }
}

// inputs: a multiple of kGroup.
template <class T>
void pack_int4(Context& context, const T* matrix, int64_t outputs, int64_t inputs, uint8_t* weights) {
    pack_slabs(context, outputs, slab_bytes(kInt4, inputs), weights, [&](int64_t row, uint8_t* group) {
        const int64_t output = row % kSlab;
        for (int64_t i = 0; i < inputs; i += kGroup, group += kGroupBytes) {
            bf16* const scales = (bf16*)(group + kSlab * kGroup / 2) + output;
            int32_t codes[kGroup];
            quantize_group(matrix + row * inputs + i, scales, scales + kSlab, codes);
            for (int u = 0; u < kGroup / 8; u++) {
                uint32_t unit = 0;
                for (int j = 0; j < 8; j++) unit |= (uint32_t)codes[u * 8 + j] << (j / 2 * 4 + j % 2 * 16);
                ((uint32_t*)group)[u * kSlab + output] = unit;
            }
        }
    });
}

}  // namespace vsl
