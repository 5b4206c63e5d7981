// Linear layers: out[row, o] = sum over i of x[row, i] x w[o, i], for weights kept in bfloat16, int8, int4 or fp32.
//
// Layout of the weights. 64 outputs lie side by side in a "slab"; a slab is one stretch of memory that is read from
// its first byte to its last, so that one row is multiplied as fast as memory is read:
//
//   bf16  [slab][inputs / 2][64] units of 2 inputs
//   int8  [slab][inputs / 4][64] units of 4 inputs, each code plus 128 and so without a sign
//   fp32  [slab][inputs][64]
//   int4  [slab][inputs / 32] groups of { [4][64] units of 8 inputs, [64] bf16 scales, [64] bf16 offsets }
//
// A unit is 32 bits of one output. In an int4 unit, input 2 j is nibble j of the lower half and input 2 j + 1 nibble j
// of the upper half; code c stands for (c - 8) x scale + offset. Outputs that fill up the last slab are zero.
// Sixteen units of bf16 or int8 in a row are both a vector and a row of the tile that AMX multiplies by.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "elementwise.h"
#include "parallel.h"

namespace vsl {

constexpr int kSlab = 64;   // outputs
constexpr int kGroup = 32;  // inputs that share a scale and an offset in int4
constexpr int kPanels = kSlab / 16;
constexpr int kGroupBytes = kSlab * kGroup / 2 + kSlab * 4;

constexpr int kAhead = 4096;  // bytes of weights that are asked for before they are multiplied

enum WeightFormat { kBf16 = 0, kInt8 = 1, kInt4 = 2, kFloat = 3 };

// Rows that have a matrix of their own, and how many rows after them their outputs are.
struct RowPart {
    const uint8_t* weights;
    const float* scales;
    int64_t begin, end, shift;
};

template <class T>
struct Linear {
    int format;
    const uint8_t* weights;
    const float* scales;  // int8 only: one an output, slabs x 64
    int64_t inputs, outputs;
    const T* x;
    int64_t x_stride, rows;
    T* out;
    int64_t out_stride;
    // Whether the first half of the outputs are gates of the second: out is silu(gate) x up, of half the outputs, each
    // of the three rounded. Outputs are then a multiple of 128.
    bool gated = false;
    // Instead of `weights`: matrices of this format and size. Each takes few rows, which may be the same ones.
    const RowPart* parts = nullptr;
    int64_t part_count = 0;
};

inline int64_t slab_bytes(int format, int64_t inputs) {
    if (format == kInt4) return inputs / kGroup * kGroupBytes;
    return inputs * kSlab * (format == kFloat ? 4 : format == kBf16 ? 2 : 1);
}

// Slabs of results.
template <class T>
inline int64_t slab_count(const Linear<T>& linear) {
    const int64_t slabs = (linear.outputs + kSlab - 1) / kSlab;
    return linear.gated ? slabs / 2 : slabs;
}

// Calls compute(linear, slab) to have rows begin..end of a slab's outputs in their place. With gates, that is called for
// the gates' slab and for the other one, into memory of the worker, and their product goes into place.
template <class T, class Compute>
inline void compute_slab(const Linear<T>& linear, int64_t slab, int64_t begin, int64_t end, Scratch& memory,
                         const Compute& compute) {
    if (!linear.gated) return compute(linear, slab);
    const int64_t size = (end - begin) * kSlab;
    T* const gate = (T*)memory.reserve(2 * size * sizeof(T));
    Linear<T> part = linear;
    part.out_stride = kSlab;
    for (int i = 0; i < 2; i++) {
        const int64_t source = slab + i * slab_count(linear);
        part.out = gate + i * size - begin * kSlab - source * kSlab;
        compute(part, source);
    }
    for (int64_t row = begin; row < end; row++) {
        const T* const from = gate + (row - begin) * kSlab;
        silu_mul_row(from, from + size, linear.out + row * linear.out_stride + slab * kSlab, (int64_t)kSlab);
    }
}

// Pieces of a layer: a block of rows against a slab. In larger blocks the rows of x fall out of the second-level cache
// between one slab and the next; in smaller ones weights are read again too often.
struct RowBlocks {
    int64_t rows, height, slabs;

    RowBlocks(int64_t rows, int64_t slabs) : rows(rows), slabs(slabs) {
        constexpr int64_t kMost = 640;
        const int64_t blocks = (rows + kMost - 1) / kMost;
        height = (rows + 32 * blocks - 1) / (32 * blocks) * 32;
    }

    int items() const { return (int)((rows + height - 1) / height * slabs); }
    int64_t begin(int item) const { return item / slabs * height; }
    int64_t end(int item) const { return std::min(rows, begin(item) + height); }
};

// Calls compute(linear, slab, first row, end of rows, worker) for every slab and block or part of rows, as compute_slab does.
template <class T, class Compute>
inline void run_slabs(Context& context, const Linear<T>& linear, const Compute& compute) {
    const int64_t slabs = slab_count(linear);
    const RowBlocks blocks(linear.rows, slabs);
    run_stretches(context, linear.parts == nullptr ? blocks.items() : (int)(linear.part_count * slabs), [&](int item, int worker) {
        const auto run = [&](const Linear<T>& linear, int64_t begin, int64_t end) {
            compute_slab(linear, item % slabs, begin, end, context.gates[worker],
                         [&](const Linear<T>& into, int64_t slab) { compute(into, slab, begin, end, worker); });
        };
        if (linear.parts == nullptr) return run(linear, blocks.begin(item), blocks.end(item));
        const RowPart& part = linear.parts[item / slabs];
        Linear<T> own = linear;
        own.weights = part.weights, own.scales = part.scales, own.out += part.shift * linear.out_stride;
        run(own, part.begin, part.end);
    });
}

// Rounds the sums of a slab's outputs of one row into place, `left` outputs of them.
template <class T>
inline void store_slab(const float* sums, T* out, int64_t left) {
    for (int i = 0; i < kSlab && i < left; i += kLanes) {
        if (left - i >= kLanes)
            store(out + i, load(sums + i));
        else
            store_part(out + i, load(sums + i), (int)(left - i));
    }
}

constexpr int kRowsAhead = 4;  // of outputs that are asked for before they are written: each lies in another page

// Asks for a slab's outputs of the row that is written kRowsAhead after `row`.
template <class T>
inline void prefetch_outputs(const Linear<T>& linear, int64_t slab, int64_t row) {
    for (int j = 0; j < kSlab; j += 64 / (int)sizeof(T))
        __builtin_prefetch(linear.out + (row + kRowsAhead) * linear.out_stride + slab * kSlab + j, 1);
}

// Rows `ids` of bf16 or fp32 weights as they were before they were packed, [count][units]; with scales, of int8 weights what
// they stand for, in fp32.
inline void gather_rows(Context& context, const uint32_t* weights, const float* scales, int64_t units, const int64_t* ids,
                        int64_t count, void* out) {
    run_ranges(context, count, std::max<int64_t>(1, 4096 / units), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const uint32_t* const from = weights + ids[i] / kSlab * units * kSlab + ids[i] % kSlab;
            if (scales == nullptr) {
                for (int64_t k = 0; k < units; k++) ((uint32_t*)out)[i * units + k] = from[k * kSlab];
                continue;
            }
            const float scale = scales[ids[i]];
            float* to = (float*)out + i * units * 4;
            for (int64_t k = 0; k < units; k++) {
                __builtin_prefetch(from + (k + 16) * kSlab);
                const uint32_t unit = from[k * kSlab];
                for (int j = 0; j < 4; j++) *to++ = (float)((int)(unit >> 8 * j & 255) - 128) * scale;
            }
        }
    });
}

// ------------------------------------------------------------------------------------------- x in other forms

// Rows in 8 bits with a scale each, for int8 weights.
struct QuantizedRows {
    int8_t* codes;  // [rows][inputs]
    float* scales;  // [rows]; NaN for a row that is not finite
    int32_t* sums;  // [rows], of 128 x the codes; run_bytes may have others

    static size_t bytes(int64_t rows, int64_t inputs) { return (rows * inputs + 63) / 64 * 64 + rows * 8; }

    QuantizedRows(void* memory, int64_t rows, int64_t inputs)
        : codes((int8_t*)memory),
          scales((float*)(codes + (rows * inputs + 63) / 64 * 64)),
          sums((int32_t*)(scales + rows)) {}
};

template <class T>
inline void quantize_row(const T* x, int64_t inputs, int8_t* codes, float* scale, int32_t* sum) {
    constexpr float kLevels = 127, kSmallest = 1e-30f;  // a row of zeros has a scale too
    vf most = {}, nothing = {};
    for (int64_t i = 0; i < inputs; i += kLanes) {
        const vf v = load(x + i);
        most = vmax(most, vmax(v, -v));
        nothing += v * splat(0.0f);  // NaN if v is not finite
    }
    const float largest = std::fmax(maximum(most), kSmallest);
    const vf factor = splat(kLevels / largest);
    vi total = {};
    const auto code = [&](int64_t i) {
        // Adding 1.5 x 2^23 rounds to a whole number, to even on ties, in the lowest bits.
        const vi whole = (vi)(load(x + i) * factor + splat(12582912.0f)) - splat((int32_t)0x4b400000);
        total += whole;
        return whole;
    };
#if defined(VSL_AVX2)
    for (int64_t i = 0; i < inputs; i += 4 * kLanes)
        store_bytes(codes + i, code(i), code(i + kLanes), code(i + 2 * kLanes), code(i + 3 * kLanes));
#else
    for (int64_t i = 0; i < inputs; i += kLanes) store_bytes(codes + i, code(i));
#endif
    int32_t codes_sum = 0;
    for (int j = 0; j < kLanes; j++) codes_sum += total[j];
    *sum = 128 * codes_sum;
    *scale = largest / kLevels + vsl::sum(nothing);
}

template <class T>
inline void quantize_rows(Context& context, const Linear<T>& linear, const QuantizedRows& rows) {
    run_ranges(context, linear.rows, std::max<int64_t>(1, 16384 / linear.inputs), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            quantize_row(linear.x + r * linear.x_stride, linear.inputs, rows.codes + r * linear.inputs,
                         rows.scales + r, rows.sums + r);
    });
}

// sums[row][group]: x summed over each group of inputs, which is what an int4 group's offset multiplies.
template <class T>
inline void sum_groups(Context& context, const Linear<T>& linear, float* sums) {
    run_ranges(context, linear.rows, 65536 / linear.inputs, [&](int64_t begin, int64_t end) {
        float* to = sums + begin * (linear.inputs / kGroup);
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < linear.inputs; i += kGroup) {
                vf total = {};
                for (int j = 0; j < kGroup; j += kLanes) total += load(linear.x + r * linear.x_stride + i + j);
                *to++ = sum(total);
            }
    });
}

}  // namespace vsl
