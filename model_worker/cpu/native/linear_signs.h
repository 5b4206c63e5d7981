// int8 for many rows without VNNI. As in linear_panels.h, magnitudes of x are multiplied by weights that take its signs; but
// here a few weights are kept with each of the 16 ways to sign four inputs, and each row takes those that it needs. That is
// three operations for a vector of products in place of four, and wants no sums of other rows in registers.
#pragma once

#include "linear.h"

namespace vsl {

#if defined(VSL_BYTES)

constexpr int64_t kSignRows = 96;  // from here on preparing the weights costs less than it saves
constexpr int kSigns = 16, kSignQuads = 4, kSignOutputs = 32;  // 8 KiB of weights; 16 KiB are a sixth slower
constexpr int64_t kSignInputs = 256;  // of many rows, which stay in the second-level cache for the other outputs of a slab
static_assert(kGroup % (4 * kSignQuads) == 0);

// What a row is multiplied by at once: magnitudes, and where the weights of each four inputs are among those signed.
struct SignedCodes {
    int32_t magnitudes[kSignQuads], places[kSignQuads];

    void set(const int8_t* codes) {
        const __m128i whole = _mm_loadu_si128((const __m128i*)codes);
        _mm_storeu_si128((__m128i*)magnitudes, _mm_abs_epi8(whole));
        const int negative = _mm_movemask_epi8(whole);
        for (int q = 0; q < kSignQuads; q++) places[q] = (q * kSigns + (negative >> 4 * q & 15)) * kSignOutputs;
    }
};

// signed_[quad][signs][output], of codes plus 128. A code is at least -127, so that its negative is one too.
inline void sign_weights(const uint32_t* weights, uint32_t* signed_) {
    typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));
    for (int q = 0; q < kSignQuads; q++)
        for (int j = 0; j < kSignOutputs; j += kLanes) {
            vu units;
            std::memcpy(&units, weights + q * kSlab + j, sizeof units);
            __builtin_prefetch(weights + (kSignQuads + q) * kSlab + j, 0, 2);
#pragma GCC unroll 16
            for (int signs = 0; signs < kSigns; signs++) {
                uint32_t flips = 0;
                for (int byte = 0; byte < 4; byte++) flips |= (signs >> byte & 1) * 0xffu << 8 * byte;
                const Bytes flipped = (Bytes)(units ^ (flips ^ 0x80808080u)), negative = flipped - (Bytes)(vu{} + flips);
                std::memcpy(signed_ + (q * kSigns + signs) * kSignOutputs + j, &negative, sizeof negative);
            }
        }
}

// Adds the products of 16 inputs and 32 outputs to sums[rows][kSlab].
inline void multiply_signed(const uint32_t* signed_, const SignedCodes* x, int64_t rows, int32_t* sums) {
    constexpr int kVectors = kSignOutputs / kLanes;
    for (int64_t r = 0; r < rows; r++, x++, sums += kSlab) {
        vi into[kVectors];
        for (int v = 0; v < kVectors; v++) std::memcpy(into + v, sums + v * kLanes, sizeof into[v]);
#pragma GCC unroll 4
        for (int q = 0; q < kSignQuads; q++) {
            const vu magnitudes = (vu)splat(x->magnitudes[q]);
            for (int v = 0; v < kVectors; v++) {
                vi weights;
                std::memcpy(&weights, signed_ + x->places[q] + v * kLanes, sizeof weights);
                into[v] += add_pairs(multiply_bytes(magnitudes, weights));
            }
        }
        for (int v = 0; v < kVectors; v++) std::memcpy(sums + v * kLanes, into + v, sizeof into[v]);
    }
}

// Calls store(into, slab, row, 64 sums) for all outputs; sums are those of the codes, with nothing to be taken from them.
template <class T, class Store>
inline void run_signs(Context& context, const Linear<T>& linear, const int8_t* codes, const Store& store) {
    constexpr int kInputs = 4 * kSignQuads;
    const int64_t rows = linear.rows, inputs = linear.inputs;
    SignedCodes* const x = (SignedCodes*)context.packed.reserve(rows * (inputs / kInputs) * sizeof(SignedCodes));
    run_ranges(context, inputs / kGroup, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kGroup; i < end * kGroup; i += kGroup)
            for (int64_t row = 0; row < rows; row++)
                for (int64_t j = i; j < i + kGroup; j += kInputs) x[j / kInputs * rows + row].set(codes + row * inputs + j);
    });
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int worker) {
        const uint32_t* const weights = (const uint32_t*)(linear.weights + slab * slab_bytes(kInt8, inputs));
        uint32_t* const signed_ = (uint32_t*)context.scratch[worker].reserve(
            (kSignQuads * kSigns * kSignOutputs + (end - begin) * kSlab) * sizeof(uint32_t));
        int32_t* const sums = (int32_t*)(signed_ + kSignQuads * kSigns * kSignOutputs);
        std::memset(sums, 0, (end - begin) * kSlab * sizeof(int32_t));
        for (int64_t block = 0; block < inputs; block += kSignInputs)
            for (int j = 0; j < kSlab; j += kSignOutputs)
                for (int64_t i = block; i < std::min(inputs, block + kSignInputs); i += kInputs) {
                    sign_weights(weights + i / 4 * kSlab + j, signed_);
                    multiply_signed(signed_, x + i / kInputs * rows + begin, end - begin, sums + j);
                }
        for (int64_t row = begin; row < end; row++) store(into, slab, row, sums + (row - begin) * kSlab);
    });
}

#endif

}  // namespace vsl
