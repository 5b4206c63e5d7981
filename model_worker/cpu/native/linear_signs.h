// int8 for many rows without VNNI: magnitudes of x are multiplied by weights that take its signs. A few weights are kept with
// each of the 16 ways to sign four inputs, and each row takes those that it needs: no operation flips them, and no sums of
// other rows are wanted in registers.
#pragma once

#include "linear.h"
#include "simd_products.h"

namespace vsl {

#if defined(VSL_BYTES)

// From here on preparing the weights costs less than it saves.
constexpr int64_t kSignRows = 160;
constexpr int kSigns = 16, kSignQuads = 4, kSignOutputs = 32;  // 8 KiB of weights; 16 KiB are a sixth slower
constexpr int64_t kSignInputs = 256;  // of many rows, which stay in the second-level cache for the other outputs of a slab
static_assert(kGroup % (4 * kSignQuads) == 0);

// Whether the products of eight inputs, whose magnitudes are `eight`, can be too large for 16 bits where those of 0, 1, 4 and 5,
// or of 2, 3, 6 and 7, are added: if the magnitudes of four add up to more than `most`. The same of the next eight inputs.
inline bool too_large_together(__m128i sixteen, int16_t most) {
    const __m128i twos = _mm_maddubs_epi16(sixteen, _mm_set1_epi8(1)), fours = _mm_add_epi16(twos, _mm_srli_epi64(twos, 32));
    return _mm_movemask_epi8(_mm_cmpgt_epi16(fours, _mm_set1_epi16(most))) & 0x0f0f;
}

// What a row is multiplied by at once: magnitudes, and where the weights of each four inputs are among those signed, in bytes.
struct alignas(32) SignedCodes {
    static constexpr uint32_t kWide = 1u << 31;  // in places[0]: products are added in 32 bits
    static constexpr int kMost = 258;            // x 127 = 32766

    int32_t magnitudes[kSignQuads];
    uint32_t places[kSignQuads];

    void set(const int8_t* codes) {
        constexpr int kBytes = kSignOutputs * 4, kStep = kSigns * kBytes;
        const __m128i whole = _mm_loadu_si128((const __m128i*)codes), most = _mm_abs_epi8(whole);
        const __m128i bits = _mm_and_si128(_mm_cmpgt_epi8(__m128i{}, whole), _mm_set1_epi32(0x08040201));
        const __m128i signs = _mm_madd_epi16(_mm_maddubs_epi16(bits, _mm_set1_epi8(1)), _mm_set1_epi16(1));
        _mm_store_si128((__m128i*)magnitudes, most);
        _mm_store_si128((__m128i*)places, _mm_add_epi32(_mm_mullo_epi32(signs, _mm_set1_epi32(kBytes)),
                                                        _mm_setr_epi32(0, kStep, 2 * kStep, 3 * kStep)));
        if (too_large_together(most, kMost)) places[0] |= kWide;
    }
};

// signed_[quad][signs][output], of codes plus 128. A code is at least -127, so that its negative is one too.
inline void sign_weights(const uint32_t* weights, uint32_t* signed_) {
    typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));
    constexpr int kVectors = kSignOutputs / kLanes;
    Bytes codes[kSignQuads][kVectors];
    for (int q = 0; q < kSignQuads; q++)
        for (int v = 0; v < kVectors; v++) {
            vu units;
            std::memcpy(&units, weights + q * kSlab + v * kLanes, sizeof units);
            __builtin_prefetch(weights + (kSignQuads + q) * kSlab + v * kLanes, 0, 2);
            codes[q][v] = (Bytes)(units ^ 0x80808080u);
        }
#pragma GCC unroll 1  // else the flips are constants, which gcc makes of general registers each time
    for (uint32_t signs = 0; signs < kSigns; signs++, signed_ += kSignOutputs) {
        const Bytes flips = (Bytes)(vu{} + (signs * 0x00204081u & 0x01010101u) * 0xffu);  // a bit to each byte
        for (int q = 0; q < kSignQuads; q++)
            for (int v = 0; v < kVectors; v++) {
                const Bytes negative = (codes[q][v] ^ flips) - flips;
                std::memcpy(signed_ + q * kSigns * kSignOutputs + v * kLanes, &negative, sizeof negative);
            }
    }
}

// The vectors of weights that `place` stands for.
struct SignedWeights {
    const uint32_t* outputs;

    SignedWeights(const uint32_t* signed_, uint32_t place) : outputs((const uint32_t*)((const uint8_t*)signed_ + place)) {
        asm("" : "+r"(outputs));  // else gcc adds the place to each address anew, of which each costs an operation
    }
    vs times(int v, int32_t magnitudes) const {
        vi weights;
        std::memcpy(&weights, outputs + v * kLanes, sizeof weights);
        return multiply_bytes((vu)splat(magnitudes), weights);
    }
};

// Adds the products of 16 inputs and 32 outputs to sums[rows][kSignOutputs].
inline void multiply_signed(const uint32_t* signed_, const SignedCodes* x, int64_t rows, int32_t* sums) {
    constexpr int kVectors = kSignOutputs / kLanes;
    for (const SignedCodes* const end = x + rows; x != end; x++, sums += kSignOutputs) {
        vi into[kVectors];
        for (int v = 0; v < kVectors; v++) into[v] = load_as<vi>(sums + v * kLanes);
        if (__builtin_expect(x->places[0] & SignedCodes::kWide, 0)) {
#pragma GCC unroll 1
            for (int q = 0; q < kSignQuads; q++) {
                const SignedWeights weights(signed_, x->places[q] & ~SignedCodes::kWide);
                for (int v = 0; v < kVectors; v++) into[v] += add_pairs(weights.times(v, x->magnitudes[q]));
            }
        } else {
#pragma GCC unroll 2
            for (int q = 0; q < kSignQuads; q += 2) {
                const SignedWeights a(signed_, x->places[q]), b(signed_, x->places[q + 1]);
                for (int v = 0; v < kVectors; v++)
                    into[v] += add_pairs(a.times(v, x->magnitudes[q]) + b.times(v, x->magnitudes[q + 1]));
            }
        }
        for (int v = 0; v < kVectors; v++) store_as(sums + v * kLanes, into[v]);
    }
}

// Rows in the form in which signed weights are multiplied: [16 inputs][row]. Only those of pieces of kSignRows or more.
struct SignedRows {
    static constexpr int kInputs = 4 * kSignQuads, kHalves = kSlab / kSignOutputs;

    SignedCodes* x;
    int64_t rows, inputs;

    size_t bytes() const { return rows * (inputs / kInputs) * sizeof(SignedCodes); }

    // Rows begin..end of kGroup inputs from number i on.
    void pack(const int8_t* codes, int64_t i, int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; row++)
            for (int64_t j = i; j < i + kGroup; j += kInputs) x[j / kInputs * rows + row].set(codes + row * inputs + j);
    }

    // Calls store(row, 64 sums) for rows begin..end; sums are those of the codes, with nothing to be taken from them.
    template <class Store>
    void multiply(const uint32_t* weights, int64_t begin, int64_t end, Scratch& memory, const Store& store) const {
        const int64_t count = end - begin;
        uint32_t* const signed_ =
            (uint32_t*)memory.reserve((kSignQuads * kSigns * kSignOutputs + count * kSlab) * sizeof(uint32_t));
        int32_t* const sums = (int32_t*)(signed_ + kSignQuads * kSigns * kSignOutputs);  // [kHalves][count][kSignOutputs]
        std::memset(sums, 0, count * kSlab * sizeof(int32_t));
        for (int64_t block = 0; block < inputs; block += kSignInputs)
            for (int half = 0; half < kHalves; half++)
                for (int64_t i = block; i < std::min(inputs, block + kSignInputs); i += kInputs) {
                    sign_weights(weights + i / 4 * kSlab + half * kSignOutputs, signed_);
                    multiply_signed(signed_, x + i / kInputs * rows + begin, count, sums + half * count * kSignOutputs);
                }
        for (int64_t row = 0; row < count; row++) {
            int32_t all[kSlab];
            for (int half = 0; half < kHalves; half++)
                std::memcpy(all + half * kSignOutputs, sums + (half * count + row) * kSignOutputs, kSignOutputs * sizeof(int32_t));
            store(begin + row, all);
        }
    }
};

#endif

}  // namespace vsl
