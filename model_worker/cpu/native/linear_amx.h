// Linear layers on AMX: tiles of 16 rows of x times tiles of 16 outputs, summed in tile registers. See linear.h for the
// layout of the weights, of which sixteen rows of units are a tile's height.
//
// Registers: 0-3 sums, 4 and 5 rows of x, 6 and 7 weights. What decides is how many cache lines have to come from the
// second-level cache for each product of two tiles.
#pragma once

#include "dot.h"
#include "linear_dot.h"

#if defined(VSL_AMX) && defined(__AMX_INT8__) && defined(VSL_VNNI)
#define VSL_AMX_LINEAR 1

namespace vsl {

constexpr int kTileBytes = 1024, kTileSums = 256;
constexpr int kFewRows = 32;     // up to so many, each 16 rows go through a whole slab at once
constexpr int kAmxInt4Rows = 5;  // from here on unpacking int4 into tiles of bf16 costs less than vectors do
// Of many rows: so much of a slab stays in the first-level cache while they pass. Of fewer, x stays there too, and sums
// that go to memory and back cost more.
constexpr int kBlockSteps = 8, kBlockStepsOfFewer = 16;
constexpr int64_t kFewerRows = 64;

struct Bf16Tiles {
    static constexpr bool kWhole = false;  // whether sums are whole numbers
};
struct Int8Tiles {
    static constexpr bool kWhole = true;
};

#define VSL_TILE_DOT(sum, x, weights)            \
    do {                                         \
        if constexpr (Kind::kWhole)              \
            _tile_dpbsud(sum, x, weights);       \
        else                                     \
            _tile_dpbf16ps(sum, x, weights);     \
    } while (0)

// Where tiles are: tile (step k, block j of 16 outputs, or of 16 rows of x) begins at base + k x step + j x block, its
// rows `row` bytes apart.
struct TileLayout {
    const uint8_t* base;
    int64_t step, block, row;

    static TileLayout slab(const uint8_t* slab) { return {slab, 16 * kSlab * 4, 64, kSlab * 4}; }
    static TileLayout rows(const void* x, int64_t stride) { return {(const uint8_t*)x, 64, 16 * stride, stride}; }

    const uint8_t* at(int64_t k, int64_t j) const { return base + k * step + j * block; }
};

// The registers' heights: 16 rows of x and `lower` more.
inline void configure_heights(int upper, int lower) {
    const int heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    configure_tiles([&](int tile) { return std::max(1, heights[tile]); }, [](int) { return 64; });
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void store_sums(uint8_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileBytes, 64);
    _tile_stored(2, sums + 2 * kTileBytes, 64);
    _tile_stored(3, sums + 3 * kTileBytes, 64);
    finish_stores(sums);
}

// At most 16 rows, block `block` of x, against the four panels; weights where they lie. sums: 4 tiles.
template <class Kind>
inline void tile_row_block(const TileLayout& w, int64_t steps, const TileLayout& x, int64_t block, uint8_t* sums) {
    zero_sums();
    for (int64_t k = 0; k < steps; k++) {
        for (int line = 0; line < 4 * kTileBytes; line += 64)
            _mm_prefetch((const char*)w.at(k + 1, 0) + line, _MM_HINT_T0);
        _tile_loadd(4, x.at(k, block), x.row);
        _tile_loadd(6, w.at(k, 0), w.row);
        VSL_TILE_DOT(0, 4, 6);
        _tile_loadd(7, w.at(k, 1), w.row);
        VSL_TILE_DOT(1, 4, 7);
        _tile_loadd(6, w.at(k, 2), w.row);
        VSL_TILE_DOT(2, 4, 6);
        _tile_loadd(7, w.at(k, 3), w.row);
        VSL_TILE_DOT(3, 4, 7);
    }
    store_sums(sums);
}

// Steps begin..end of up to 32 rows, blocks `upper` and `lower` of x, against `panel` and the next one. w: tiles from
// step `begin` on. sums: 4 tiles, the upper rows' first; added to unless begin is 0. With each step, `lines` cache lines
// from `ahead` on are asked for: in bursts, they would hold up the tiles that are loaded meanwhile.
template <class Kind>
inline void tile_two_by_two(const TileLayout& w, int panel, int64_t begin, int64_t end, const TileLayout& x,
                            int64_t upper, int64_t lower, uint8_t* sums, const uint8_t*& ahead, int lines) {
    if (begin == 0) {
        zero_sums();
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + kTileBytes, 64);
        _tile_loadd(2, sums + 2 * kTileBytes, 64);
        _tile_loadd(3, sums + 3 * kTileBytes, 64);
    }
    for (int64_t k = begin; k < end; k++) {
        for (int line = 0; line < lines; line++, ahead += 64) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
        _tile_loadd(6, w.at(k - begin, panel), w.row);
        _tile_loadd(4, x.at(k, upper), x.row);
        VSL_TILE_DOT(0, 4, 6);
        _tile_loadd(7, w.at(k - begin, panel + 1), w.row);
        VSL_TILE_DOT(1, 4, 7);
        _tile_loadd(5, x.at(k, lower), x.row);
        VSL_TILE_DOT(2, 5, 6);
        VSL_TILE_DOT(3, 5, 7);
    }
    store_sums(sums);
}

// Hands two panels' sums to store(row, first output, 16 sums of each).
template <class Store>
inline void store_tiles(const int32_t* tiles, int panel, int64_t first_row, int rows, const Store& store) {
    for (int r = 0; r < rows; r++)
        store(first_row + r, panel * 16, tiles + r * 16, tiles + kTileSums + r * 16);
}

// Rows 0..rows against one slab whose memory is read here for the first time; at most kFewRows rows.
template <class Kind, class Store>
inline void tile_few_rows(const TileLayout& w, int64_t steps, const TileLayout& x, int rows, const Store& store) {
    alignas(64) int32_t sums[kPanels * kTileSums];
    for (int row = 0; row < rows; row += 16) {
        const int count = std::min(16, rows - row);
        configure_heights(count, count);
        tile_row_block<Kind>(w, steps, x, row / 16, (uint8_t*)sums);
        for (int panel = 0; panel < kPanels; panel += 2)
            store_tiles(sums + panel * kTileSums, panel, row, count, store);
    }
    _tile_release();
}

// One panel of an int4 group as a tile of bf16.
inline void unpack_tile(const uint8_t* group, int panel, uint8_t* tile) {
    const __m512i table = code_values(), upper = _mm512_set1_epi32((int)0xffff0000);
    alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    const bf16* const scales = (const bf16*)(group + kSlab * kGroup / 2) + panel * 16;
    const __m512 scale = (__m512)load(scales), offset = (__m512)load(scales + kSlab);
    for (int u = 0; u < 4; u++) {
        const __m512i units = _mm512_loadu_si512(group + (u * kSlab + panel * 16) * 4);
        for (int i = 0; i < 4; i++, tile += 64) {
            const __m512i pair = _mm512_permutexvar_epi16(_mm512_srli_epi16(units, 4 * i), table);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
            const __m512 low = _mm512_fmadd_ps(even, scale, offset), high = _mm512_fmadd_ps(odd, scale, offset);
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_store_si512(tile, _mm512_permutexvar_epi16(interleave, halves));
        }
    }
}

// Steps begin..end of an int4 slab as [step][panel][tile] of bf16.
inline void unpack_steps(const uint8_t* slab, int64_t begin, int64_t end, uint8_t* tiles) {
    for (int64_t k = begin; k < end; k++)
        for (int panel = 0; panel < kPanels; panel++, tiles += kTileBytes)
            unpack_tile(slab + k * kGroupBytes, panel, tiles);
    finish_stores(tiles);
}

// Rows against one slab, whose weights are used where they lie, but for int4. While rows are multiplied by some steps of
// the slab, the weights that follow are asked for.
template <class Kind, class Store>
inline void tile_many_rows(int format, const uint8_t* slab, int64_t steps, const TileLayout& x, int64_t rows,
                           Scratch& scratch, const Store& store) {
    const int64_t step_bytes = format == kInt4 ? kGroupBytes : kPanels * kTileBytes;
    const int64_t passes = (rows + 31) / 32 * (kPanels / 2);
    const int lines = (int)((step_bytes / 64 + passes - 1) / passes);
    const int block_steps = rows <= kFewerRows ? kBlockStepsOfFewer : kBlockSteps;
    int32_t* const sums = (int32_t*)scratch.reserve((rows + 31) / 32 * 8 * kTileBytes);
    alignas(64) uint8_t unpacked[kBlockStepsOfFewer * kPanels * kTileBytes];
    for (int64_t k = 0; k < steps; k += block_steps) {
        const int64_t stop = std::min(steps, k + block_steps);
        TileLayout w = TileLayout::slab(slab + k * step_bytes);
        if (format == kInt4) {
            unpack_steps(slab, k, stop, unpacked);
            w = {unpacked, kPanels * kTileBytes, kTileBytes, 64};
        }
        const uint8_t* ahead = slab + stop * step_bytes;
        for (int64_t row = 0; row < rows; row += 32) {
            const int count = (int)std::min<int64_t>(32, rows - row), lower = std::max(0, count - 16);
            if (row == 0 || count < 32) configure_heights(std::min(16, count), lower);
            for (int panel = 0; panel < kPanels; panel += 2) {
                int32_t* const tiles = sums + (row / 32 * 2 + panel / 2) * 4 * kTileSums;
                // Where there are no lower rows, the register takes one of the upper ones.
                tile_two_by_two<Kind>(w, panel, k, stop, x, row / 16, row / 16 + (lower > 0), (uint8_t*)tiles, ahead,
                                      lines);
                if (stop < steps) continue;
                store_tiles(tiles, panel, row, std::min(16, count), store);
                store_tiles(tiles + 2 * kTileSums, panel, row + 16, lower, store);
            }
        }
    }
    _tile_release();
}

// A slab of int4 as [step][panel][tile] of bf16.
inline void unpack_slab(const uint8_t* slab, int64_t groups, uint8_t* tiles) {
    for (int64_t g = 0; g < groups; g++, slab += kGroupBytes) {
        for (int line = 0; line < kGroupBytes; line += 64) _mm_prefetch((const char*)slab + kAhead + line, _MM_HINT_T0);
        for (int panel = 0; panel < kPanels; panel++, tiles += kTileBytes) unpack_tile(slab, panel, tiles);
    }
    finish_stores(tiles);
}

#undef VSL_TILE_DOT

// Rows begin..end of a slab's outputs. x: rows of bf16 or of codes, `stride` bytes apart. Calls store(row, output, 16 sums, 16
// more sums).
template <class Kind, class T, class Store>
inline void tile_slab(const Linear<T>& linear, const uint8_t* x, int64_t stride, int64_t slab, int64_t begin, int64_t end,
                      Scratch& scratch, const Store& store) {
    const int64_t steps = linear.inputs * (Kind::kWhole ? 1 : 2) / 64;
    const uint8_t* const weights = linear.weights + slab * slab_bytes(linear.format, linear.inputs);
    const TileLayout rows = TileLayout::rows(x + begin * stride, stride);
    const auto put = [&](int64_t row, int output, const int32_t* a, const int32_t* b) {
        store(begin + row, slab * kSlab + output, a, b);
    };
    if (end - begin > kFewRows)
        return tile_many_rows<Kind>(linear.format, weights, steps, rows, end - begin, scratch, put);
    TileLayout w = TileLayout::slab(weights);
    if (linear.format == kInt4) {
        uint8_t* const tiles = (uint8_t*)scratch.reserve(steps * kPanels * kTileBytes);
        unpack_slab(weights, steps, tiles);
        w = {tiles, kPanels * kTileBytes, kTileBytes, 64};
    }
    tile_few_rows<Kind>(w, steps, rows, (int)(end - begin), put);
}

}  // namespace vsl
#endif
