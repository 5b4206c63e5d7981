// Decode attention in bfloat16, over a cache in bfloat16 or int8, with AVX2: as decode.h, with what a block of tokens needs in
// another order.
//
// A core asks for what it will read by itself, but only some 20 lines ahead and not into the next 4 KiB, which for two
// tokens of eight heads is too little at the speed at which they are multiplied. So a block is read in four streams, its
// quarters, side by side, and each stream asks for the lines that are kStepsAhead tokens further, one for each that it
// uses. First the scores of all heads, then a softmax of eight heads side by side, then the values.
//
// A vector of 16 values of bfloat16 is two of floats, the even and the odd ones, with an operation each, where 8 values
// that are widened take two. So queries are split alike, and sums of values brought into their order at the end. Codes of int8
// take two each, and half the reading.
#pragma once

#include "decode.h"

namespace vsl {

#if defined(VSL_AVX2)

constexpr int kStreams = 4, kStreamTokens = kBlockTokens / kStreams;
constexpr int kStepsAhead = 2;  // tokens of a stream; 1 and 3 are as quick, with int8 4 too

// 16 elements as the vectors of floats that are quickest to make of them.
template <class Stored>
struct Sixteen;

template <>
struct Sixteen<bf16> {
    static constexpr bool kSplit = true;  // into even and odd ones
    vu pairs;
    explicit Sixteen(const bf16* p) { std::memcpy(&pairs, p, sizeof pairs); }
    vf first() const { return (vf)(pairs << 16); }
    vf second() const { return (vf)(pairs & 0xffff0000u); }
};

template <>
struct Sixteen<int8_t> {
    static constexpr bool kSplit = false;
    const int8_t* p;
    explicit Sixteen(const int8_t* p) : p(p) {}
    vf first() const { return load(p); }
    vf second() const { return load(p + kLanes); }
};

template <class Stored>
constexpr int kLineElements = 64 / sizeof(Stored);

template <class Stored>
inline void ask_for(const Stored* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

// Where a block's tokens lie, and those of the block that is worked on next, in elements.
struct BlockPlaces {
    int64_t now[kBlockTokens], next[kBlockTokens];

    int64_t here(int stream, int token) const { return now[stream * kStreamTokens + token]; }
    int64_t there(int stream, int token) const { return next[stream * kStreamTokens + token]; }
};

// What stays in the first-level cache while a range is worked on.
struct RangeMemory {
    float* queries;                    // [heads][head_dim], scaled; for bfloat16 even values of 16 before the odd ones
    float* scores;                     // [kBlockTokens][stride]: eight heads are stored at once, of which some are none
    float *key_scales, *value_scales;  // as scores, for int8
    float *maximum, *total, *decay;    // [stride]
    int64_t stride;

    static size_t bytes(int heads, int head_dim) {
        return sizeof(float) * ((size_t)heads * head_dim + (3 * kBlockTokens + 3) * (size_t)stride_of(heads));
    }
    static int64_t stride_of(int heads) { return (heads + 2 * kLanes - 1) / kLanes * kLanes; }

    RangeMemory(void* memory, int heads, int head_dim) : queries((float*)memory), stride(stride_of(heads)) {
        scores = queries + (size_t)heads * head_dim;
        key_scales = scores + kBlockTokens * stride, value_scales = key_scales + kBlockTokens * stride;
        maximum = value_scales + kBlockTokens * stride, total = maximum + stride, decay = total + stride;
    }
};

// scores[..] of G query heads for each of kHeads KV heads side by side; `keys` and `ahead`: of the first of them.
template <int G, int kHeads, class Stored>
inline void score_token(const float* queries, const Stored* keys, const Stored* ahead, int64_t head_stride, int head_dim,
                        float* scores) {
    static_assert(G * kHeads <= kLanes);
    vf sums[kLanes] = {};
    for (int d = 0; d < head_dim; d += 2 * kLanes)
        for (int i = 0; i < kHeads; i++) {
            if (d % kLineElements<Stored> == 0) ask_for(ahead + i * head_stride + d);
            const Sixteen<Stored> k(keys + i * head_stride + d);
            const vf first = k.first(), second = k.second();
            for (int g = 0; g < G; g++) {
                const float* const q = queries + (i * G + g) * head_dim + d;
                sums[i * G + g] += first * load(q);
                sums[i * G + g] += second * load(q + kLanes);
            }
        }
    store(scores, sum_each(sums));
}

// sums[g] += the values of a token of each stream, for G query heads that share a KV head. weights: of the first stream's
// token, `stride` from one token of the block to the next.
template <int G, class Stored>
inline void add_tokens(const Stored* const* values, const Stored* const* ahead, int head_dim, const float* weights,
                       int64_t stride, float* sums) {
    vf weight[kStreams][G];
    for (int s = 0; s < kStreams; s++)
        for (int g = 0; g < G; g++) weight[s][g] = splat(weights[s * kStreamTokens * stride + g]);
    for (int d = 0; d < head_dim; d += 2 * kLanes) {
        vf first[G], second[G];
        for (int g = 0; g < G; g++)
            first[g] = load(sums + g * head_dim + d), second[g] = load(sums + g * head_dim + d + kLanes);
        if (ahead != nullptr && d % kLineElements<Stored> == 0)
            for (int s = 0; s < kStreams; s++) ask_for(ahead[s] + d);
        for (int s = 0; s < kStreams; s++) {
            const Sixteen<Stored> v(values[s] + d);
            const vf left = v.first(), right = v.second();
            for (int g = 0; g < G; g++) first[g] += weight[s][g] * left, second[g] += weight[s][g] * right;
        }
        for (int g = 0; g < G; g++)
            store(sums + g * head_dim + d, first[g]), store(sums + g * head_dim + d + kLanes, second[g]);
    }
}

// The scales of a block's tokens for all heads; offsets are those of locate_scales.
inline void spread_scales(const CacheView<int8_t>& cache, const int64_t* offsets, int heads, int kv_heads,
                          const RangeMemory& m) {
    for (int kv = 0, h = 0; kv < kv_heads; kv++) {
        BlockScales scales;
        read_scales(cache, kv, offsets, scales);
        for (int g = 0; g < heads / kv_heads; g++, h++)
            for (int i = 0; i < kBlockTokens; i++)
                m.key_scales[i * m.stride + h] = scales.keys[i], m.value_scales[i * m.stride + h] = scales.values[i];
    }
}

// Scores, relative to the largest so far, become weights; sums of values so far are to count `decay` times as much.
template <bool kScaled>
inline void weigh(const RangeMemory& m, int heads, int count) {
    for (int h = 0; h < heads; h += kLanes) {
        const vf before = load(m.maximum + h);
        vf most = before, total = {};
        for (int i = 0; i < count; i++) {
            const int64_t at = i * m.stride + h;
            if (kScaled) store(m.scores + at, load(m.scores + at) * load(m.key_scales + at));
            most = vmax(most, load(m.scores + at));
        }
        for (int i = 0; i < kBlockTokens; i++) {
            const int64_t at = i * m.stride + h;
            const vf weight = i < count ? exp2(load(m.scores + at) - most) : vf{};
            total += weight;
            store(m.scores + at, kScaled && i < count ? weight * load(m.value_scales + at) : weight);
        }
        const vf decay = exp2(before - most);
        store(m.maximum + h, most);
        store(m.total + h, load(m.total + h) * decay + total);
        store(m.decay + h, decay);
    }
}

// As attend_range. G query heads share a KV head, or the part of one that is worked on at once; kHeads KV heads are.
// follow: where the block lies that is read after this range.
template <class Stored, int G, int kHeads>
void attend_streams(const bf16* query, const CacheView<Stored>& cache, int64_t begin, int64_t end, int heads, int kv_heads,
                    int head_dim, float scale, const Partial& out, const RangeMemory& m, const int64_t* follow) {
    constexpr bool kScaled = CacheView<Stored>::kScaled;
    const int group = heads / kv_heads;
    const int64_t apart = cache.layout.head_stride;
    for (int64_t i = 0; i < (int64_t)heads * head_dim; i += 2 * kLanes) {
        const Sixteen<bf16> split(query + i);
        store(m.queries + i, (Sixteen<Stored>::kSplit ? split.first() : load(query + i)) * splat(scale));
        store(m.queries + i + kLanes, (Sixteen<Stored>::kSplit ? split.second() : load(query + i + kLanes)) * splat(scale));
    }
    for (int64_t h = 0; h < m.stride; h++) m.maximum[h] = kNoScore, m.total[h] = 0;
    for (int64_t i = 0; i < kBlockTokens * m.stride; i++) m.scores[i] = 0;  // those of no head too
    if (kScaled)
        for (int64_t i = 0; i < kBlockTokens * m.stride; i++) m.key_scales[i] = m.value_scales[i] = 0;
    std::memset(out.values, 0, (size_t)heads * head_dim * sizeof(float));
    BlockPlaces places;
    int64_t scales[2][kBlockTokens];  // of this block, and of the next one
    int count = (int)std::min<int64_t>(end - begin, kBlockTokens);
    locate(cache.pages, cache.layout, begin, count, places.now);
    if (kScaled) locate_scales(cache.pages, cache.layout, begin, count, scales[1]);
    for (int64_t first = begin; first < end; first += kBlockTokens) {
        const int next_count = (int)std::min<int64_t>(end - first - count, kBlockTokens);
        if (kScaled) std::memcpy(scales[0], scales[1], sizeof scales[0]);
        if (next_count > 0) {
            locate(cache.pages, cache.layout, first + count, next_count, places.next);
            if (kScaled) locate_scales(cache.pages, cache.layout, first + count, next_count, scales[1]);
        } else {
            std::memcpy(places.next, follow, sizeof places.next);
        }
        // Values follow the keys of a block, and the next block's keys its values.
        for (int t = 0; t < kStreamTokens; t++)
            for (int kv = 0; kv < kv_heads; kv += kHeads) {
                for (int i = t; kScaled && i < kHeads; i += kStreamTokens) {
                    const int64_t at = scales[1][0] + (kv + i) * cache.layout.scale_stride();
                    ask_for((const char*)cache.keys + at), ask_for((const char*)cache.values + at);
                }
                for (int s = 0; s < kStreams; s++) {
                    const int further = t + kStepsAhead;
                    const Stored* const keys = cache.keys + places.here(s, t) + kv * apart;
                    const Stored* const ahead = kv * apart + (further < kStreamTokens
                                                                  ? cache.keys + places.here(s, further)
                                                                  : cache.values + places.here(s, further - kStreamTokens));
                    float* const scores = m.scores + (s * kStreamTokens + t) * m.stride;
                    for (int h = kv * group; h < (kv + kHeads) * group; h += kHeads * G)
                        score_token<G, kHeads>(m.queries + (int64_t)h * head_dim, keys, ahead, apart, head_dim, scores + h);
                }
            }
        if constexpr (kScaled) spread_scales(cache, scales[0], heads, kv_heads, m);
        weigh<kScaled>(m, heads, count);
        for (int h = 0; h < heads; h++)
            if (m.decay[h] != 1)
                for (int d = 0; d < head_dim; d += kLanes) {
                    float* const sums = out.values + (int64_t)h * head_dim + d;
                    store(sums, load(sums) * splat(m.decay[h]));
                }
        for (int t = 0; t < kStreamTokens; t++)
            for (int kv = 0; kv < kv_heads; kv++) {
                const Stored *values[kStreams], *ahead[kStreams];
                for (int s = 0; s < kStreams; s++) {
                    const int further = t + kStepsAhead;
                    values[s] = cache.values + places.here(s, t) + kv * apart;
                    ahead[s] = kv * apart + (further < kStreamTokens ? cache.values + places.here(s, further)
                                                                     : cache.keys + places.there(s, further - kStreamTokens));
                }
                for (int g = 0; g < group;) {
                    const int h = kv * group + g;
                    const float* const weights = m.scores + t * m.stride + h;
                    float* const sums = out.values + (int64_t)h * head_dim;
                    const Stored* const* const asked = g == 0 ? ahead : nullptr;
                    if (group - g >= 2)
                        add_tokens<2>(values, asked, head_dim, weights, m.stride, sums), g += 2;
                    else
                        add_tokens<1>(values, asked, head_dim, weights, m.stride, sums), g += 1;
                }
            }
        std::memcpy(places.now, places.next, sizeof places.now);
        count = next_count;
    }
    std::memcpy(out.maximum, m.maximum, heads * sizeof(float));
    std::memcpy(out.total, m.total, heads * sizeof(float));
    for (int64_t i = 0; Sixteen<Stored>::kSplit && i < (int64_t)heads * head_dim; i += 2 * kLanes) {
        float* const sums = out.values + i;
        const __m256 even = (__m256)load(sums), odd = (__m256)load(sums + kLanes);
        const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        store(sums, (vf)_mm256_permute2f128_ps(low, high, 0x20));
        store(sums + kLanes, (vf)_mm256_permute2f128_ps(low, high, 0x31));
    }
}

// Query heads of a KV head that are worked on at once.
inline int heads_at_once(int heads, int kv_heads) { return std::min(heads / kv_heads, kLanes); }

inline bool fits_streams(int heads, int kv_heads, int head_dim) {
    return head_dim % 32 == 0 && heads / kv_heads % heads_at_once(heads, kv_heads) == 0;
}

template <class Stored, int G = kLanes>
void attend_range_avx2(const bf16* query, const CacheView<Stored>& cache, int64_t begin, int64_t end, int heads,
                       int kv_heads, int head_dim, float scale, const Partial& out, const RangeMemory& memory,
                       const int64_t* follow) {
    if constexpr (G > 1)
        if (heads_at_once(heads, kv_heads) < G)
            return attend_range_avx2<Stored, G - 1>(query, cache, begin, end, heads, kv_heads, head_dim, scale, out, memory,
                                                    follow);
    constexpr int kHeads = kLanes / G;
    const auto attend = kv_heads % kHeads == 0 ? attend_streams<Stored, G, kHeads> : attend_streams<Stored, G, 1>;
    attend(query, cache, begin, end, heads, kv_heads, head_dim, scale, out, memory, follow);
}

#endif

}  // namespace vsl
