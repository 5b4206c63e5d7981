// Attention of one new token over its request's cached tokens. Scores and sums are fp32; the softmax is the online one
// of FlashAttention (Dao et al., 2022), and long contexts are split among threads and merged as in Flash-Decoding (Dao
// et al., 2023).
//
// A range of tokens is read once, all KV heads of a block of tokens before the next block, because in the pool the
// heads of a token lie side by side: memory is then read in the order in which it lies. With every cache line that is
// used, one of the next block is prefetched; prefetching in bursts would stall, as a core can only wait for some 16
// lines at a time. The query heads that share a KV head are computed together.
#pragma once

#include "elementwise.h"
#include "simd_products.h"

namespace vsl {

constexpr int kBlockTokens = 16;    // a multiple of kLanes; small, as two blocks' pages should fit the first-level TLB
#if defined(VSL_NEON)
constexpr int kSums = 16;  // scores that are summed side by side, each in a register
#else
constexpr int kSums = kLanes;
#endif
constexpr float kNoScore = -1e30f;  // a maximum below every score, yet finite: infinities subtract to NaN

// One request's cached tokens. Stored: the model's type, or int8_t.
template <class Stored>
struct CacheView {
    static constexpr bool kScaled = std::is_same_v<Stored, int8_t>;

    const Stored *keys, *values;
    const int32_t* pages;
    PoolLayout layout;
};

// The scales of a block's keys and values for one KV head, in int8.
struct BlockScales {
    float keys[kBlockTokens], values[kBlockTokens];
};

// What a range of tokens contributes, per query head: maximum score, sum of weights, weighted sum of values.
struct Partial {
    float *maximum, *total, *values;  // [heads], [heads], [heads, head_dim]

    static size_t floats(int heads, int head_dim) { return (size_t)heads * (head_dim + 2); }
    static Partial at(float* memory, int heads) { return {memory, memory + heads, memory + 2 * heads}; }
};

// Where the token at `position` lies, in elements.
inline int64_t locate(const int32_t* pages, const PoolLayout& layout, int64_t position) {
    return pages[position / layout.page_size] * layout.page_stride + position % layout.page_size * layout.token_stride;
}

// Where each of `count` tokens from position `first` on lies, in elements; the rest of the block repeats the last one.
inline void locate(const int32_t* pages, const PoolLayout& layout, int64_t first, int count, int64_t* offsets) {
    int64_t page = first / layout.page_size, place = first % layout.page_size;
    for (int i = 0; i < count; i++) {
        offsets[i] = pages[page] * layout.page_stride + place * layout.token_stride;
        if (++place == layout.page_size) place = 0, page++;
    }
    for (int i = count; i < kBlockTokens; i++) offsets[i] = offsets[count - 1];
}

// As locate, where the scales of the first KV head lie, in bytes.
inline void locate_scales(const int32_t* pages, PoolLayout layout, int64_t first, int count, int64_t* offsets) {
    layout.token_stride = sizeof(float);
    locate(pages, layout, first, count, offsets);
    for (int i = 0; i < kBlockTokens; i++) offsets[i] += layout.scales;
}

// The scales of a block's tokens for one KV head; offsets are those of locate_scales.
template <class Stored>
inline void read_scales(const CacheView<Stored>& cache, int kv_head, const int64_t* offsets, BlockScales& scales) {
    const int64_t head = kv_head * cache.layout.scale_stride();
    const char *keys = (const char*)cache.keys + head, *values = (const char*)cache.values + head;
    for (int i = 0; i < kBlockTokens; i++) {
        std::memcpy(scales.keys + i, keys + offsets[i], sizeof(float));
        std::memcpy(scales.values + i, values + offsets[i], sizeof(float));
    }
}

// Asks for the cache lines of elements [d, d + n) of a row into the second-level cache.
template <class T>
inline void prefetch(const T* row, int d, int n) {
    for (int i = 0; i < n * (int)sizeof(T); i += 64) __builtin_prefetch((const char*)(row + d) + i, 0, 2);
}

// sums[g * tokens + i] += query g . key i, lane by lane, for kSums / G tokens. Prefetches the rows at `ahead`.
template <int G, class T, class Stored>
inline void multiply_keys(const T* query, const Stored* keys, const int64_t* offsets, const int64_t* ahead,
                          int head_dim, vf* sums) {
    constexpr int kTokens = kSums / G, kLine = 64 / sizeof(Stored);
    for (int d = 0; d < head_dim; d += kLanes) {
        const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
        vf q[G];
        for (int g = 0; g < G; g++) {
            const T* p = query + g * head_dim + d;
            q[g] = n == kLanes ? load(p) : load_part(p, n);
        }
        for (int i = 0; i < kTokens; i++) {
            const Stored* p = keys + offsets[i] + d;
            if (d % kLine == 0) prefetch(keys + ahead[i], d, kLine);
            const vf k = n == kLanes ? load(p) : load_part(p, n);
            for (int g = 0; g < G; g++) sums[g * kTokens + i] += q[g] * k;
        }
    }
}

#if defined(VSL_AVX512_BF16)
template <int G>
inline void multiply_keys(const bf16* query, const bf16* keys, const int64_t* offsets, const int64_t* ahead,
                          int head_dim, vf* sums) {
    constexpr int kTokens = kSums / G;
    for (int d = 0; d < head_dim; d += 32) {
        const __mmask32 mask = head_dim - d < 32 ? (1u << (head_dim - d)) - 1 : ~0u;
        __m512bh q[G];
        for (int g = 0; g < G; g++) q[g] = (__m512bh)_mm512_maskz_loadu_epi16(mask, query + g * head_dim + d);
        for (int i = 0; i < kTokens; i++) {
            prefetch(keys + ahead[i], d, 32);
            const __m512bh k = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys + offsets[i] + d);
            for (int g = 0; g < G; g++) {
                vf& s = sums[g * kTokens + i];
                s = (vf)_mm512_dpbf16_ps((__m512)s, q[g], k);
            }
        }
    }
}
#elif defined(VSL_PAIRS)
template <int G>
inline void multiply_keys(const bf16* query, const bf16* keys, const int64_t* offsets, const int64_t* ahead,
                          int head_dim, vf* sums) {
    constexpr int kTokens = kSums / G;
    for (int d = 0; d < head_dim; d += 2 * kLanes) {
        vf q[G];
        for (int g = 0; g < G; g++) q[g] = load((const float*)(query + g * head_dim + d));
        for (int i = 0; i < kTokens; i++) {
            if (d % 32 == 0) prefetch(keys + ahead[i], d, 32);
            const vf k = load((const float*)(keys + offsets[i] + d));
            for (int g = 0; g < G; g++) sums[g * kTokens + i] = multiply_bf16(sums[g * kTokens + i], q[g], k);
        }
    }
}
#endif

// sums[g, d ..] = sums[g, d ..] * decay[g] + weights[g] . values, for `vectors` vectors of the head dimension.
template <class Stored, int G, int kVectors>
inline void add_values(const Stored* values, const int64_t* offsets, const int64_t* ahead, int count,
                       const float (*weights)[kBlockTokens], const float* decay, float* sums, int head_dim, int d) {
    vf total[G][kVectors];
    for (int g = 0; g < G; g++)
        for (int j = 0; j < kVectors; j++) total[g][j] = load(sums + g * head_dim + d + j * kLanes) * splat(decay[g]);
    for (int i = 0; i < count; i++) {
        const Stored* row = values + offsets[i] + d;
        prefetch(values + ahead[i], d, kVectors * kLanes);
        vf v[kVectors];
        for (int j = 0; j < kVectors; j++) v[j] = load(row + j * kLanes);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < kVectors; j++) total[g][j] += splat(weights[g][i]) * v[j];
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < kVectors; j++) store(sums + g * head_dim + d + j * kLanes, total[g][j]);
}

// One block of tokens for G query heads that share a KV head. scale is in units of log 2: weights are powers of two.
template <int G, class T, class Stored>
inline void attend_block(const T* query, const Stored* keys, const Stored* values, const int64_t* offsets,
                         const int64_t* ahead, const BlockScales& scales, int count, int head_dim, float scale,
                         float* maximum_out, float* total_out, float* sums) {
    constexpr bool kScaled = CacheView<Stored>::kScaled;
    constexpr int kTokens = kSums / G;
    float scores[G][kBlockTokens], decay[G];
    for (int first = 0; first < count; first += kTokens) {
        vf products[kSums] = {};
        multiply_keys<G>(query, keys, offsets + first, ahead + first, head_dim, products);
        float lanes[kSums];
        for (int i = 0; i < kSums; i += kLanes) store(lanes + i, sum_each(products + i) * splat(scale));
        for (int g = 0; g < G; g++) std::memcpy(scores[g] + first, lanes + g * kTokens, kTokens * sizeof(float));
    }
    if constexpr (kScaled)
        for (int g = 0; g < G; g++)
            for (int i = 0; i < kBlockTokens; i += kLanes)
                store(scores[g] + i, load(scores[g] + i) * load(scales.keys + i));
    for (int g = 0; g < G; g++)
        for (int i = count; i < kBlockTokens; i++) scores[g][i] = -INFINITY;
    for (int g = 0; g < G; g++) {
        vf most = splat(maximum_out[g]);
        for (int i = 0; i < kBlockTokens; i += kLanes) most = vmax(most, load(scores[g] + i));
        const float largest = maximum(most);
        vf total = {};
        for (int i = 0; i < kBlockTokens; i += kLanes) {
            const vf weight = exp2(load(scores[g] + i) - splat(largest));
            total += weight;
            store(scores[g] + i, kScaled ? weight * load(scales.values + i) : weight);
        }
        decay[g] = std::exp2(maximum_out[g] - largest);
        maximum_out[g] = largest;
        total_out[g] = total_out[g] * decay[g] + sum(total);
    }
    int d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
        add_values<Stored, G, 4>(values, offsets, ahead, count, scores, decay, sums, head_dim, d);
    for (; d + kLanes <= head_dim; d += kLanes)
        add_values<Stored, G, 1>(values, offsets, ahead, count, scores, decay, sums, head_dim, d);
    for (; d < head_dim; d++)
        for (int g = 0; g < G; g++) {
            float s = sums[g * head_dim + d] * decay[g];
            for (int i = 0; i < count; i++) s += scores[g][i] * to_float(values[offsets[i] + d]);
            sums[g * head_dim + d] = s;
        }
}

// Tokens [begin, end) of one request for all heads of its one query, [heads, head_dim]. Fills `out`.
template <class T, class Stored>
void attend_range(const T* query, const CacheView<Stored>& cache, int64_t begin, int64_t end, int heads, int kv_heads,
                  int head_dim, float scale, const Partial& out) {
    const int group = heads / kv_heads;
    for (int h = 0; h < heads; h++) out.maximum[h] = kNoScore, out.total[h] = 0;
    std::memset(out.values, 0, (size_t)heads * head_dim * sizeof(float));
    int64_t buffers[2][kBlockTokens], scale_offsets[kBlockTokens];
    int64_t *now = buffers[0], *next = buffers[1];
    int count = (int)(end - begin < kBlockTokens ? end - begin : kBlockTokens);
    locate(cache.pages, cache.layout, begin, count, now);
    for (int64_t first = begin; first < end; first += kBlockTokens) {
        const int64_t left = end - first - count;
        const int next_count = (int)(left < kBlockTokens ? left : kBlockTokens);
        if (next_count > 0) locate(cache.pages, cache.layout, first + count, next_count, next);
        if (cache.kScaled) locate_scales(cache.pages, cache.layout, first, count, scale_offsets);
        for (int kv = 0; kv < kv_heads; kv++) {
            const int64_t head = kv * cache.layout.head_stride;
            const Stored *keys = cache.keys + head, *values = cache.values + head;
            BlockScales scales;
            if (cache.kScaled) read_scales(cache, kv, scale_offsets, scales);
            // The rows of the next block, in the order in which they lie, dealt out to this block's rows.
            int64_t ahead[kBlockTokens];
            for (int i = 0; i < kBlockTokens; i++) {
                const int row = kv * kBlockTokens + i, token = row / kv_heads;
                ahead[i] = token < next_count
                               ? next[token] + (row - token * kv_heads) * cache.layout.head_stride - head
                               : now[i];
            }
            for (int g = 0; g < group;) {
                const int h = kv * group + g;
                const T* q = query + (int64_t)h * head_dim;
                float *m = out.maximum + h, *t = out.total + h, *sums = out.values + (int64_t)h * head_dim;
                const int64_t* rows_ahead = g == 0 ? ahead : now;
                if (group - g >= 4) {
                    attend_block<4>(q, keys, values, now, rows_ahead, scales, count, head_dim, scale, m, t, sums);
                    g += 4;
                } else if (group - g >= 2) {
                    attend_block<2>(q, keys, values, now, rows_ahead, scales, count, head_dim, scale, m, t, sums);
                    g += 2;
                } else {
                    attend_block<1>(q, keys, values, now, rows_ahead, scales, count, head_dim, scale, m, t, sums);
                    g += 1;
                }
            }
        }
        int64_t* const swap = now;
        now = next, next = swap;
        count = next_count;
    }
}

// Merges the partial results of a query's ranges into its output, [heads, head_dim]. Leaves each range's weight in the
// place of its maximum.
template <class T>
void merge_ranges(float* partials, int64_t ranges, int heads, int head_dim, T* out) {
    const size_t size = Partial::floats(heads, head_dim);
    for (int h = 0; h < heads; h++) {
        float most = kNoScore, total = 0;
        for (int64_t r = 0; r < ranges; r++) most = std::fmax(most, partials[r * size + h]);
        for (int64_t r = 0; r < ranges; r++) {
            partials[r * size + h] = std::exp2(partials[r * size + h] - most);
            total += partials[r * size + h] * partials[r * size + heads + h];
        }
        for (int64_t r = 0; r < ranges; r++) partials[r * size + h] /= total;
        for (int d = 0; d < head_dim; d += kLanes) {
            const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
            vf sums = {};
            for (int64_t r = 0; r < ranges; r++) {
                const float* p = partials + r * size + 2 * heads + (int64_t)h * head_dim + d;
                sums += splat(partials[r * size + h]) * (n == kLanes ? load(p) : load_part(p, n));
            }
            if (n == kLanes)
                store(out + (int64_t)h * head_dim + d, sums);
            else
                store_part(out + (int64_t)h * head_dim + d, sums, n);
        }
    }
}

}  // namespace vsl
