// The two matrix products of attention over a chunk of query tokens, with the queries in the vector lanes:
//
//   scores[key, query]  = sum over d   of  keys[key, d]    x queries[d, query]
//   sums[d, query]     += sum over key of  values[d, key]  x weights[key, query]
//
// So both are  c[i, lane] (+)= sum over k of a(i, k) x b[k, lane],  where b and c come in panels of kLanes queries.
// No horizontal sum is needed, the softmax over keys runs lane by lane, and keys are used in the order in which they
// lie.
//
// A "unit" is 32 bits: one float (FloatDot), or two bfloat16 of adjacent k (PairDot), which AVX512-BF16 and AMX
// multiply and add at once. AMX multiplies tiles of 16 x 16 units.
#pragma once

#include "simd_products.h"
#include "two.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(VSL_AVX512_BF16) && defined(__linux__)
#define VSL_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vsl {

#if defined(VSL_AVX512) || defined(__aarch64__)
constexpr int kPanelGroup = 4;  // panels that are multiplied together; 4 rows of them fill the registers
#elif defined(VSL_AVX2)
constexpr int kPanelGroup = 3;  // 12 sums: 8 would have to wait for each other
#else
constexpr int kPanelGroup = 2;
#endif

struct FloatDot {
    using Unit = float;
    static constexpr int kDepth = 1;  // values of k in a unit
    static constexpr int kMultiple = kLanes;  // what head_dim and a block's keys are padded to
    static vf multiply_add(float a, vf b, vf c) { return splat(a) * b + c; }
};

#if defined(VSL_AVX512_BF16)
// 2^x with a relative error of 8e-5, a fiftieth of what rounding to bfloat16 may add. The polynomial is of degree 3,
// fitted for the least relative error; see exp2.
inline vf exp2_for_bf16(vf x) {
    const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const vf p = ((0.07802436f * f + 0.22606774f) * f + 0.69583313f) * f + 0.99992528f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}

struct PairDot {
    using Unit = uint32_t;
    static constexpr int kDepth = 2;
    static constexpr int kMultiple = 32;  // AMX tiles take 32 values of k and 32 rows
    static vf multiply_add(uint32_t a, vf b, vf c) {
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
};
#elif defined(VSL_PAIRS)
struct PairDot {
    using Unit = uint32_t;
    static constexpr int kDepth = 2;
    static constexpr int kMultiple = 32;  // AMX tiles take 32 values of k and 32 rows
    static vf multiply_add(uint32_t a, vf b, vf c) { return multiply_bf16(c, b, (vf)(a - vu{})); }
};
#endif

#if defined(VSL_AVX512)
// rows[i][8 q + j] <-> rows[j][8 q + i] of 16-bit numbers, for each quarter q of 8 vectors.
inline void transpose_quarters(__m512i* rows) {
    __m512i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm512_unpacklo_epi32(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm512_unpackhi_epi32(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        rows[2 * i] = _mm512_unpacklo_epi64(u[i], u[i + 4]);
        rows[2 * i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 4]);
    }
}
#endif

template <class Dot>
struct Product {
    const typename Dot::Unit* a;  // PairDot: a(i, k) = a[i * a_row + k * a_depth]. FloatDot: panels of rows, as b
    int64_t a_row, a_depth, a_panel;
    const typename Dot::Unit* const* a_tiles;  // AMX: where each 16 rows of a begin; null: all follow the first
    const typename Dot::Unit* b;  // [panel][k][kLanes], panels b_panel apart
    int64_t b_panel;
    float* c;  // [panel][i][kLanes], panels c_panel apart
    int64_t c_panel;
    int rows, depth;  // rows is a multiple of 4
    bool accumulate;
};

template <class Dot, int kPanels>
inline void multiply_panels(const Product<Dot>& p, int panel) {
    constexpr bool kPairs = Dot::kDepth == 2;
    for (int i = 0; i < p.rows; i += 4) {
        vf sums[4][kPanels];
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < kPanels; j++)
                sums[r][j] = p.accumulate ? load(p.c + (panel + j) * p.c_panel + (i + r) * kLanes) : vf{};
        const typename Dot::Unit* a = p.a + (kPairs ? i * p.a_row : i / kLanes * p.a_panel + i % kLanes);
        const typename Dot::Unit* b = p.b + panel * p.b_panel;
        for (int k = 0; k < p.depth; k++) {
            vf lanes[kPanels];
            for (int j = 0; j < kPanels; j++) lanes[j] = in_register(load((const float*)(b + j * p.b_panel + k * kLanes)));
            for (int r = 0; r < 4; r++) {
                const typename Dot::Unit x = kPairs ? a[r * p.a_row + k * p.a_depth] : a[k * kLanes + r];
                for (int j = 0; j < kPanels; j++) sums[r][j] = Dot::multiply_add(x, lanes[j], sums[r][j]);
            }
        }
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < kPanels; j++) store(p.c + (panel + j) * p.c_panel + (i + r) * kLanes, sums[r][j]);
    }
}

template <class Dot>
inline void multiply(const Product<Dot>& p, int panels) {
    int panel = 0;
    for (; panel + kPanelGroup <= panels; panel += kPanelGroup) multiply_panels<Dot, kPanelGroup>(p, panel);
    if (kPanelGroup > 2 && panel + 2 <= panels) multiply_panels<Dot, 2>(p, panel), panel += 2;
    if (panel < panels) multiply_panels<Dot, 1>(p, panel);
}

#if defined(VSL_AMX)

// The kernel lets a process use the tile registers once it has asked for them.
inline bool request_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// gcc does not know that the tile instructions read memory: what was written before must not be kept in registers.
inline void finish_stores(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

// Gives the eight tiles their sizes, and zeros: tile i has rows(i) rows of bytes(i).
template <class Rows, class Bytes>
inline void configure_tiles(const Rows& rows, const Bytes& bytes) {
    alignas(64) uint8_t palette[64] = {1};
    for (int tile = 0; tile < 8; tile++) palette[16 + 2 * tile] = bytes(tile), palette[48 + tile] = rows(tile);
    finish_stores(palette);
    _tile_loadconfig(palette);
}

// Eight tiles of 16 rows, of 64 bytes where nothing else is said, for as long as this lives.
class Tiles {
   public:
    Tiles() : Tiles([](int) { return 64; }) {}
    template <class Bytes>
    explicit Tiles(const Bytes& bytes) {
        configure_tiles([](int) { return 16; }, bytes);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// As multiply_panels, 32 rows at a time; a_depth is 1, rows a multiple of 32, depth of 16. Two panels, or the same
// panel twice.
inline void multiply_tiles(const Product<PairDot>& p, int panel, int second) {
    const uint32_t *b0 = p.b + panel * p.b_panel, *b1 = p.b + second * p.b_panel;
    finish_stores(p.c);
    for (int i = 0; i < p.rows; i += 32) {
        float *c00 = p.c + panel * p.c_panel + i * 16, *c01 = p.c + second * p.c_panel + i * 16;
        float *c10 = c00 + 256, *c11 = c01 + 256;
        if (p.accumulate) {
            _tile_loadd(0, c00, 64);
            _tile_loadd(1, c01, 64);
            _tile_loadd(2, c10, 64);
            _tile_loadd(3, c11, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const uint32_t* const a0 = p.a_tiles != nullptr ? p.a_tiles[i / 16] : p.a + i * p.a_row;
        const uint32_t* const a1 = p.a_tiles != nullptr ? p.a_tiles[i / 16 + 1] : a0 + 16 * p.a_row;
        for (int k = 0; k < p.depth; k += 16) {
            _tile_loadd(4, a0 + k, p.a_row * 4);
            _tile_loadd(6, b0 + k * 16, 64);
            _tile_loadd(7, b1 + k * 16, 64);
            _tile_loadd(5, a1 + k, p.a_row * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c00, 64);
        _tile_stored(1, c01, 64);
        _tile_stored(2, c10, 64);
        _tile_stored(3, c11, 64);
    }
    finish_stores(p.c);
}

#else

inline bool request_amx() { return false; }

#endif

}  // namespace vsl
