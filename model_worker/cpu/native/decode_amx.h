// Attention of one new token on AMX, as decode.h has it, with the query heads in the lanes: keys are the rows of tiles
// where they lie in the pool, the softmax of a block of 16 tokens runs for 16 heads at once, and values are summed two
// tokens at a time (AVX512-BF16). A core that reads memory as fast as it can has little time left to calculate: what
// matters is that this takes few instructions.
#pragma once

#include "decode.h"
#include "dot.h"

#if defined(VSL_AMX)

namespace vsl {

constexpr int kHeadLanes = 16;  // query heads that are worked on together
static_assert(kBlockTokens == 16, "a block's keys are the rows of a tile");

// The cache lines that will be read next, asked for a few at a time.
struct LinesAhead {
    const char *next = nullptr, *end = nullptr;

    void set(const bf16* first, int64_t elements) { next = (const char*)first, end = (const char*)(first + elements); }
    void ask(int lines) {
        for (int i = 0; i < lines && next < end; i++, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Memory of one range's calculation.
struct AmxDecodeScratch {
    alignas(64) float scores[kBlockTokens * kHeadLanes];           // [token][head]
    alignas(64) uint32_t weights[kBlockTokens / 2 * kHeadLanes];   // [pair of tokens][head], bf16 pairs
    alignas(64) float decay[kHeadLanes];
};

// Whether attend_range_amx knows the shapes; they are those of the KV pool, for ranges that begin at whole blocks.
inline bool fits_amx_decode(const PoolLayout& layout, int heads, int kv_heads, int head_dim) {
    const int group = heads / kv_heads;
    return kHeadLanes % group == 0 && head_dim % 32 == 0 && layout.page_size % kBlockTokens == 0 &&
           layout.head_stride == head_dim && layout.token_stride == (int64_t)kv_heads * head_dim;
}

// queries [heads <= 16, head_dim] -> [head_dim / 32][16 pairs of d][16 heads]; heads that are not there are zero.
inline void turn_queries(const bf16* query, int heads, int head_dim, uint32_t* out) {
    for (int d = 0; d < head_dim; d += 32, out += 16 * kHeadLanes) {
        __m512i rows[16];
        for (int h = 0; h < 16; h++)
            rows[h] = h < heads ? _mm512_loadu_si512(query + (int64_t)h * head_dim + d) : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * kHeadLanes, rows[i]);
    }
}

#define VSL_SCORE(tile, keys_tile, query_tile, head)                                                      \
    do {                                                                                                  \
        ahead.ask(16);                                                                                    \
        _tile_loadd(keys_tile, keys + (head) * head_dim + d, token_stride * 2);                           \
        _tile_loadd(query_tile, queries + d * (kHeadLanes / 2) + (head) * group, kHeadLanes * 4);         \
        _tile_dpbf16ps(tile, keys_tile, query_tile);                                                      \
    } while (0)

// scores[token][head] = keys . queries for `kv_heads` KV heads of a block of tokens.
inline void score_block(const bf16* keys, int64_t token_stride, const uint32_t* queries, int kv_heads, int group,
                        int head_dim, LinesAhead& ahead, float* scores) {
    finish_stores(scores);
    int kv = 0;
    for (; kv + 4 <= kv_heads; kv += 4) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < head_dim; d += 32) {
            VSL_SCORE(0, 4, 6, kv);
            VSL_SCORE(1, 5, 7, kv + 1);
            VSL_SCORE(2, 4, 6, kv + 2);
            VSL_SCORE(3, 5, 7, kv + 3);
        }
        _tile_stored(0, scores + kv * group, kHeadLanes * 4);
        _tile_stored(1, scores + (kv + 1) * group, kHeadLanes * 4);
        _tile_stored(2, scores + (kv + 2) * group, kHeadLanes * 4);
        _tile_stored(3, scores + (kv + 3) * group, kHeadLanes * 4);
    }
    for (; kv < kv_heads; kv++) {
        _tile_zero(0);
        for (int d = 0; d < head_dim; d += 32) VSL_SCORE(0, 4, 6, kv);
        _tile_stored(0, scores + kv * group, kHeadLanes * 4);
    }
    finish_stores(scores);
}

#undef VSL_SCORE

// The online softmax of `count` tokens for all lanes. scale is in units of log 2.
inline void weigh_block(AmxDecodeScratch& s, int count, float scale, vf& most, vf& total) {
    const __m512i interleave = interleaved_halves();
    vf scores[kBlockTokens], largest = most;
    for (int i = 0; i < count; i++) {
        scores[i] = load(s.scores + i * kHeadLanes) * splat(scale);
        largest = vmax(largest, scores[i]);
    }
    const vf decay = exp2(most - largest);
    vf sum = total * decay;
    for (int i = 0; i < count; i++) {
        scores[i] = exp2_for_bf16(scores[i] - largest);
        sum += scores[i];
    }
    for (int i = count; i < kBlockTokens; i++) scores[i] = vf{};
    for (int i = 0; i < kBlockTokens; i += 2) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)scores[i + 1], (__m512)scores[i]);
        _mm512_store_si512(s.weights + i / 2 * kHeadLanes, _mm512_permutexvar_epi16(interleave, halves));
    }
    store(s.decay, decay);
    most = largest, total = sum;
}

// sums[head] = sums[head] x decay + weights . values for kHeads heads of one KV head and 32 x kChunks elements. The two
// vectors of each 32 elements have elements 8 q .. 8 q + 3 and 8 q + 4 .. 8 q + 7 of each quarter q: what unpacking
// makes.
template <int kHeads, int kChunks>
inline void add_value_pairs(const bf16* values, int64_t token_stride, int count, const AmxDecodeScratch& s, int head,
                            float* sums, int head_dim, LinesAhead* ahead) {
    vf total[kHeads][kChunks][2];
    for (int g = 0; g < kHeads; g++)
        for (int c = 0; c < kChunks; c++)
            for (int half = 0; half < 2; half++)
                total[g][c][half] = load(sums + g * head_dim + c * 32 + half * 16) * splat(s.decay[head + g]);
    for (int i = 0; i < count; i += 2) {
        const bf16* const row = values + i * token_stride;
        const uint32_t* const weights = s.weights + i / 2 * kHeadLanes + head;
        if (ahead != nullptr) ahead->ask(2 * kChunks);
        for (int c = 0; c < kChunks; c++) {
            const __m512i a = _mm512_loadu_si512(row + c * 32);
            const __m512i b = i + 1 < count ? _mm512_loadu_si512(row + token_stride + c * 32) : _mm512_setzero_si512();
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
            for (int g = 0; g < kHeads; g++) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights[g]);
                total[g][c][0] = (vf)_mm512_dpbf16_ps((__m512)total[g][c][0], weight, low);
                total[g][c][1] = (vf)_mm512_dpbf16_ps((__m512)total[g][c][1], weight, high);
            }
        }
    }
    for (int g = 0; g < kHeads; g++)
        for (int c = 0; c < kChunks; c++)
            for (int half = 0; half < 2; half++)
                store(sums + g * head_dim + c * 32 + half * 16, total[g][c][half]);
}

// One KV head's values for its kHeads query heads.
template <int kHeads>
inline void add_block_values(const bf16* values, int64_t token_stride, int count, const AmxDecodeScratch& s, int head,
                             float* sums, int head_dim, LinesAhead* ahead) {
    constexpr int kChunks = kHeads >= 8 ? 1 : kHeads >= 4 ? 2 : 4;
    int d = 0;
    for (; d + 32 * kChunks <= head_dim; d += 32 * kChunks)
        add_value_pairs<kHeads, kChunks>(values + d, token_stride, count, s, head, sums + d, head_dim, ahead);
    for (; d < head_dim; d += 32)
        add_value_pairs<kHeads, 1>(values + d, token_stride, count, s, head, sums + d, head_dim, ahead);
}

inline void add_values_of(int group, const bf16* values, int64_t token_stride, int count, const AmxDecodeScratch& s,
                          int head, float* sums, int head_dim, LinesAhead* ahead) {
    const auto add = [&](auto heads, int g) {
        constexpr int kHeads = decltype(heads)::value;
        add_block_values<kHeads>(values, token_stride, count, s, head + g, sums + (int64_t)g * head_dim, head_dim,
                                 g == 0 ? ahead : nullptr);
    };
    if (group == 1) return add(std::integral_constant<int, 1>(), 0);
    if (group == 2) return add(std::integral_constant<int, 2>(), 0);
    if (group == 4) return add(std::integral_constant<int, 4>(), 0);
    for (int g = 0; g < group; g += 8) add(std::integral_constant<int, 8>(), g);
}

// Puts the elements of each 32 into their order; see add_value_pairs.
inline void order_sums(float* sums, int64_t size) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t i = 0; i < size; i += 32) {
        const __m512 a = (__m512)load(sums + i), b = (__m512)load(sums + i + 16);
        store(sums + i, (vf)_mm512_permutex2var_ps(a, first, b));
        store(sums + i + 16, (vf)_mm512_permutex2var_ps(a, second, b));
    }
}

// As attend_range. follow: where the keys and values lie that this core will read next, and how many tokens of them;
// they follow the range's own. queries: memory of [heads / 16 rounded up, head_dim x 8].
inline void attend_range_amx(const bf16* query, const CacheView<bf16>& cache, int64_t begin, int64_t end, int heads,
                             int kv_heads, int head_dim, float scale, const Partial& out, uint32_t* queries,
                             int64_t follow, int follow_tokens) {
    const int group = heads / kv_heads;
    const int64_t token_stride = cache.layout.token_stride;
    for (int h = 0; h < heads; h += kHeadLanes)
        turn_queries(query + (int64_t)h * head_dim, std::min(kHeadLanes, heads - h), head_dim,
                     queries + (int64_t)h / 2 * head_dim);
    for (int h = 0; h < heads; h++) out.maximum[h] = kNoScore, out.total[h] = 0;
    std::memset(out.values, 0, (size_t)heads * head_dim * sizeof(float));
    AmxDecodeScratch s;
    // 0-3: scores, 4 and 5: keys, 6 and 7: queries, of which each KV head uses as many columns as it has heads.
    const Tiles tiles([&](int tile) { return tile == 4 || tile == 5 ? 64 : group * 4; });
    int64_t now = locate(cache.pages, cache.layout, begin);
    for (int64_t first = begin; first < end; first += kBlockTokens) {
        const int count = (int)std::min<int64_t>(kBlockTokens, end - first);
        const bool last = first + kBlockTokens >= end;
        const int64_t next = last ? follow : locate(cache.pages, cache.layout, first + kBlockTokens);
        const int64_t next_tokens = last ? follow_tokens : std::min<int64_t>(kBlockTokens, end - first - kBlockTokens);
        LinesAhead next_keys, next_values;
        next_keys.set(cache.keys + next, next_tokens * token_stride);
        next_values.set(cache.values + next, next_tokens * token_stride);
        if (first + 2 * kBlockTokens < end)  // a line of the block after that, so that its address is translated
            __builtin_prefetch(cache.keys + locate(cache.pages, cache.layout, first + 2 * kBlockTokens), 0, 2);
        for (int h = 0; h < heads; h += kHeadLanes) {
            const int lanes = std::min(kHeadLanes, heads - h);
            const int64_t at = now + (int64_t)(h / group) * head_dim;
            score_block(cache.keys + at, token_stride, queries + (int64_t)h / 2 * head_dim, lanes / group, group,
                        head_dim, next_keys, s.scores);
            vf most, total;
            if (lanes == kHeadLanes)
                most = load(out.maximum + h), total = load(out.total + h);
            else
                most = load_part(out.maximum + h, lanes), total = load_part(out.total + h, lanes);
            weigh_block(s, count, scale, most, total);
            store_part(out.maximum + h, most, lanes);
            store_part(out.total + h, total, lanes);
            for (int kv = 0; kv < lanes / group; kv++)
                add_values_of(group, cache.values + at + (int64_t)kv * head_dim, token_stride, count, s, kv * group,
                              out.values + (int64_t)(h + kv * group) * head_dim, head_dim, &next_values);
        }
        now = next;
    }
    order_sums(out.values, (int64_t)heads * head_dim);
}

}  // namespace vsl

#endif
