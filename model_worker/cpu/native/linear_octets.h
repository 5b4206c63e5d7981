// int8 for some rows without VNNI, eight inputs at a time. Magnitudes of x are multiplied by weights whose bytes, codes plus
// 128, are flipped into codes where x is positive; where it is not, into less than their negatives by one, so that the
// magnitudes have to be added. Two products fit 16 bits, and nearly always four do: these are added there.
#pragma once

#include "linear_panels.h"
#include "linear_signs.h"

namespace vsl {

#if defined(VSL_BYTES)

// So many rows go through a slab together, as fast as it is read. More go one by one through a block of all outputs, which
// stays in the first-level cache: flips take the weights from there, and what each octet takes beside its products is done once
// for all outputs. Nor are the products of one row as often too large as those of several.
constexpr int kTogetherOctetRows = kLanes == 8 ? 2 : 4;
// Of a block: 16 KiB of weights, half of a first-level cache of 32 KiB.
constexpr int64_t kOctetInputs = 256;
constexpr int kMostOctets = kOctetInputs / 4;

// Of one row and eight inputs: two units, each multiplied by magnitudes after its bits were flipped.
struct Octet {
    int32_t magnitudes[2], flips[2];
};

// A block of inputs of some rows: octets[eights + more][rows]. Where the products of a row are too large to be added in 16 bits,
// the eight inputs, of which `places` tells, are there once more behind all others, half of the magnitudes zero each time.
struct alignas(64) OctetBlock {
    static constexpr int kMost = 256;  // x -128 = -32768

    int32_t eights, more;
    uint8_t places[kMostOctets / 2];
    Octet octets[];

    // Of so many rows: as far as one block lies from the next.
    static size_t bytes(int64_t rows) { return (sizeof(OctetBlock) + kMostOctets * rows * sizeof(Octet) + 63) / 64 * 64; }

    // middle: takes what the sums of each row's products are too large by.
    void set(const int8_t* codes, int64_t stride, int64_t inputs, int rows, int32_t* middle) {
        eights = (int32_t)(inputs / 8), more = 0;
        for (int eight = 0; eight < eights; eight++) {
            Octet* const to = octets + eight * rows;
            bool wide = false;
            for (int r = 0; r < rows; r++) {
                const __m128i whole = _mm_loadl_epi64((const __m128i*)(codes + r * stride + eight * 8));
                const __m128i most = _mm_abs_epi8(whole);
                const __m128i negative = _mm_cmpgt_epi8(__m128i{}, whole), flips = _mm_xor_si128(negative, _mm_set1_epi8(-128));
                _mm_storeu_si128((__m128i*)(to + r), _mm_unpacklo_epi64(most, flips));
                middle[r] -= _mm_cvtsi128_si32(_mm_sad_epu8(_mm_and_si128(most, negative), __m128i{}));
                wide |= too_large_together(most, kMost);
            }
            if (!wide) continue;
            Octet* const again = octets + (eights + more) * rows;
            std::memcpy(again, to, rows * sizeof(Octet));
            for (int r = 0; r < rows; r++) to[r].magnitudes[1] = again[r].magnitudes[0] = 0;
            places[more++] = (uint8_t)eight;
        }
    }
};

// Blocks of groups of rows, one after another.
struct OctetBlocks {
    uint8_t* first;
    size_t apart;

    OctetBlock& operator[](int64_t i) const { return *(OctetBlock*)(first + i * apart); }
};

// Adds the products of a block and, from `weights` on, kVectors vectors of outputs to sums[kRows][kSlab], or begins them. Once in
// mask + 1 octets, kAsk lines from `next` on are asked for. A function of its own: else registers are taken by what is around it.
template <int kRows, int kVectors, int kAsk>
__attribute__((noinline)) void multiply_octets(const uint32_t* weights, const OctetBlock& x, int32_t* sums, bool begin,
                                               const char*& next, int64_t mask) {
    vi into[kRows][kVectors] = {};
    if (!begin)
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) into[r][v] = load_as<vi>(sums + r * kSlab + v * kLanes);
    const auto multiply = [&](const uint32_t* units, const Octet* octets) VSL_INLINE {
        asm("" : "+r"(units));  // else gcc adds the place to each address anew
        const auto products = [&](int i, int r, vu weights) {
            return multiply_bytes((vu)splat(octets[r].magnitudes[i]), (vi)(weights ^ (vu)splat(octets[r].flips[i])));
        };
        // What is fewer, vectors or rows, stays in registers beside the sums.
        if constexpr (kRows >= kVectors) {
            vu first[kVectors], second[kVectors];
            for (int v = 0; v < kVectors; v++)
                first[v] = load_units(units + v * kLanes), second[v] = load_units(units + kSlab + v * kLanes);
            for (int r = 0; r < kRows; r++) {
                vs sum[kVectors];
                for (int v = 0; v < kVectors; v++) sum[v] = products(0, r, first[v]);
                for (int v = 0; v < kVectors; v++) sum[v] += products(1, r, second[v]);
                for (int v = 0; v < kVectors; v++) into[r][v] += add_pairs(sum[v]);
            }
        } else {
            for (int v = 0; v < kVectors; v++) {
                const vu first = load_units(units + v * kLanes), second = load_units(units + kSlab + v * kLanes);
                for (int r = 0; r < kRows; r++) into[r][v] += add_pairs(products(0, r, first) + products(1, r, second));
            }
        }
    };
    const char* line = next;
    const int64_t eights = x.eights;
    const Octet* octets = x.octets;
    const uint32_t* units = weights;
    for (int64_t k = 0; k < eights; k++, octets += kRows, units += 2 * kSlab) {
        if ((k & mask) == 0)
            for (int i = 0; i < kAsk; i++, line += 64) __builtin_prefetch(line, 0, 2);
        multiply(units, octets);
    }
    for (int k = 0; k < x.more; k++, octets += kRows) multiply(weights + x.places[k] * (2 * kSlab), octets);
    next = line;
    for (int r = 0; r < kRows; r++)
        for (int v = 0; v < kVectors; v++) store_as(sums + r * kSlab + v * kLanes, into[r][v]);
}

// So many rows, together or one by one.
struct OctetGroups {
    int64_t rows;

    bool together() const { return rows <= kTogetherOctetRows; }
    int64_t count() const { return together() ? 1 : rows; }
    int64_t size() const { return together() ? rows : 1; }
    size_t block_bytes() const { return OctetBlock::bytes(size()); }
};

// A block of a slab, by rows of which x has one block a group. next: the slab's next block.
inline void multiply_block(const uint32_t* weights, OctetGroups groups, const OctetBlocks& x, int32_t* sums, bool begin,
                           const char* next) {
    constexpr int kAll = kSlab / kLanes;
    if (groups.together())
        return with_count<kTogetherOctetRows>((int)groups.rows, [&](auto count) {
            constexpr int kMost = count == 1 ? 8 : 4, kVectors = kAll < kMost ? kAll : kMost, kPasses = kAll / kVectors;
            const char* line = count == 1 ? (const char*)weights + kNearAhead : next;
            for (int j = 0; j < kSlab; j += kVectors * kLanes)
                multiply_octets<count, kVectors, 8 / kPasses>(weights + j, x[0], sums + j, begin, line, 0);
        });
    const auto one_by_one = [&](auto lines) {
        const int64_t apart = groups.rows * x[0].eights * lines * 64 / (next - (const char*)weights);  // octets
        int64_t mask = 0;
        while (2 * mask + 2 <= apart) mask = 2 * mask + 1;
        for (int64_t row = 0; row < groups.rows; row++)
            multiply_octets<1, kAll, lines>(weights, x[row], sums + row * kSlab, begin, next, mask);
    };
    // As many asks as lines at least, of few rows too: with an eighth too few, all takes a fifth longer.
    if (groups.rows >= 8) return one_by_one(std::integral_constant<int, 1>());
    if (groups.rows >= 4) return one_by_one(std::integral_constant<int, 2>());
    one_by_one(std::integral_constant<int, 4>());
}

// Rows in this form, of pieces of the layer that have rows of their own: [piece][block of inputs][group of rows].
struct OctetRows {
    struct Group {
        int64_t row, count;
        size_t place, apart;  // of its first block, in bytes, and from one block to the next
    };

    uint8_t* x = nullptr;
    int64_t inputs, blocks;
    size_t bytes = 0;  // that x needs
    std::vector<Group> groups;
    std::vector<size_t> places;  // of the piece that begins with a row

    OctetRows(int64_t rows, int64_t inputs)
        : inputs(inputs), blocks((inputs + kOctetInputs - 1) / kOctetInputs), places(rows) {}

    void add(int64_t begin, int64_t end) {
        const OctetGroups those{end - begin};
        const size_t block = those.block_bytes(), apart = those.count() * block;
        places[begin] = bytes;
        for (int64_t g = 0; g < those.count(); g++)
            groups.push_back({begin + g * those.size(), those.size(), bytes + g * block, apart});
        bytes += blocks * apart;
    }

    // Of all rows of a group. middle: takes what the sums of each row are too large by.
    void pack(const Group& group, const int8_t* codes, int32_t* middle) const {
        for (int64_t r = group.row; r < group.row + group.count; r++) middle[r] = 0;
        const OctetBlocks into{x + group.place, group.apart};
        for (int64_t block = 0; block < blocks; block++)
            into[block].set(codes + group.row * inputs + block * kOctetInputs, inputs, size(block), (int)group.count,
                            middle + group.row);
    }

    // Calls store(row, 64 sums) for rows begin..end, which are a piece.
    template <class Store>
    void multiply(const uint8_t* weights, int64_t begin, int64_t end, Scratch& memory, const Store& store) const {
        int32_t* const sums = (int32_t*)memory.reserve((end - begin) * kSlab * sizeof(int32_t));
        const OctetGroups those{end - begin};
        const size_t apart = those.block_bytes();
        for (int64_t block = 0; block < blocks; block++) {
            const uint8_t* const next = weights + slab_bytes(kInt8, size(block));
            const OctetBlocks rows{x + places[begin] + block * those.count() * apart, apart};
            multiply_block((const uint32_t*)weights, those, rows, sums, block == 0, (const char*)next);
            weights = next;
        }
        for (int64_t row = begin; row < end; row++) store(row, sums + (row - begin) * kSlab);
    }

   private:
    int64_t size(int64_t block) const { return std::min(kOctetInputs, inputs - block * kOctetInputs); }
};

#endif

}  // namespace vsl
