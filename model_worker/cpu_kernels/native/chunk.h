// Attention of a chunk of a request's new tokens over its cached ones: blocks of queries against blocks of keys, with
// the online softmax of FlashAttention (Dao et al., 2022). The lanes are queries (see dot.h): lane r of a block is
// token r / group, query head r % group of the block's KV head.
#pragma once

#include "decode.h"
#include "dot.h"

namespace vsl {

// Multiples of 32. What they are with AMX is worth 40 % there: packing and the sums' way through the cache cost as much
// as the products. Without it the products take all the time, and smaller blocks suit smaller caches.
#if defined(VSL_AMX)
constexpr int kBlockKeys = 256, kMostBlockQueries = 512;
#else
constexpr int kBlockKeys = 128, kMostBlockQueries = 256;
#endif
constexpr int kDepthMultiple = 32;      // what head_dim is padded to: AMX tiles take 32 values of k and 32 rows

template <class T>
struct Chunk {
    const T* query;  // of the block's first token and the KV head's first query head, [tokens, heads, head_dim]
    int64_t query_stride;
    CacheView<T> cache;
    int kv_head, group, head_dim;
    int tokens;             // in this block
    int64_t first_context;  // cached tokens that the block's first token sees, itself included; the next sees one more
    float scale;            // positive, in units of log 2
    T* out;                 // of the block's first token and the KV head's first query head
    int64_t out_stride;
};

// Packs the data of one chunk for Dot, multiplies, and keeps the running softmax.
template <class T, class Dot>
class ChunkAttention {
   public:
    using Unit = typename Dot::Unit;

    ChunkAttention(const Chunk<T>& chunk, Scratch& scratch, bool tiles)
        : chunk_(chunk),
          tiles_(tiles),
          lanes_(chunk.tokens * chunk.group),
          panels_((lanes_ + kLanes - 1) / kLanes),
          padded_dim_((chunk.head_dim + kDepthMultiple - 1) / kDepthMultiple * kDepthMultiple),
          depth_(padded_dim_ / Dot::kDepth) {
        float* memory = static_cast<float*>(scratch.reserve(floats(panels_) * sizeof(float)));
        const auto take = [&](size_t count) {
            float* const taken = memory;
            memory += count;
            return taken;
        };
        maximum_ = take((size_t)panels_ * kLanes);
        total_ = take((size_t)panels_ * kLanes);
        limit_ = (int32_t*)take((size_t)panels_ * kLanes);
        sums_ = take((size_t)panels_ * padded_dim_ * kLanes);
        queries_ = (Unit*)take((size_t)panels_ * padded_dim_ * kLanes);
        keys_ = (Unit*)take((size_t)kBlockKeys * padded_dim_);
        values_ = (Unit*)take((size_t)kBlockKeys * padded_dim_);
        scores_ = take((size_t)kPanelGroup * kBlockKeys * kLanes);
        weights_ = (Unit*)take((size_t)kPanelGroup * kBlockKeys * kLanes);
    }

    void run() {
        start();
        const int64_t context = chunk_.first_context + chunk_.tokens - 1;
        const int step = tiles_ ? 2 : kPanelGroup;
        for (int64_t first = 0; first < context; first += kBlockKeys) {
            const int count = (int)std::min<int64_t>(kBlockKeys, context - first);
            pack_block(first, count);
            for (int panel = 0; panel < panels_; panel += step) {
                const int panels = std::min(step, panels_ - panel);
                // The last lane sees most. What no lane of the group sees is left out.
                const int64_t seen = limit_[(panel + panels) * kLanes - 1] - first;
                if (seen <= 0) continue;
                const int used = (int)std::min<int64_t>((count + 31) / 32 * 32, (seen + 31) / 32 * 32);
                attend(panel, panels, first, used);
            }
        }
        finish();
    }

   private:
    size_t floats(int panels) const {
        return (size_t)panels * kLanes * (3 + 2 * padded_dim_) + 2 * (size_t)kBlockKeys * padded_dim_ +
               2 * (size_t)kPanelGroup * kBlockKeys * kLanes;
    }

    const T* query_row(int lane) const {
        return chunk_.query + lane / chunk_.group * chunk_.query_stride + lane % chunk_.group * chunk_.head_dim;
    }

    void start() {
        for (int lane = 0; lane < panels_ * kLanes; lane++) {
            const int used = std::min(lane, lanes_ - 1);  // lanes that are left over repeat the last query
            maximum_[lane] = kNoScore;
            total_[lane] = 0;
            limit_[lane] = (int32_t)(chunk_.first_context + used / chunk_.group);
        }
        std::memset(sums_, 0, (size_t)panels_ * padded_dim_ * kLanes * sizeof(float));
        for (int panel = 0; panel < panels_; panel++) {
            const T* rows[kLanes];
            for (int i = 0; i < kLanes; i++) rows[i] = query_row(std::min(panel * kLanes + i, lanes_ - 1));
            pack_columns(rows, queries_ + (size_t)panel * depth_ * kLanes);
        }
    }

    // kLanes rows of head_dim values -> [depth_][kLanes] units, zero beyond head_dim.
    void pack_columns(const T* const* rows, float* out) {
        for (int d = 0; d < padded_dim_; d++)
            for (int i = 0; i < kLanes; i++) out[d * kLanes + i] = d < chunk_.head_dim ? to_float(rows[i][d]) : 0;
    }

    void pack_block(int64_t first, int count) {
        const int padded = (count + 31) / 32 * 32;
        const int64_t head = chunk_.kv_head * chunk_.cache.layout.head_stride;
        const T *key_rows[kBlockKeys], *value_rows[kBlockKeys];
        int64_t offsets[kBlockTokens];
        for (int i = 0; i < count; i += kBlockTokens) {
            const int n = std::min(kBlockTokens, count - i);
            locate(chunk_.cache.pages, chunk_.cache.layout, first + i, n, offsets);
            for (int j = 0; j < n; j++) {
                key_rows[i + j] = chunk_.cache.keys + offsets[j] + head;
                value_rows[i + j] = chunk_.cache.values + offsets[j] + head;
            }
        }
        pack_keys(key_rows, count, padded, keys_);
        pack_values(value_rows, count, padded, values_);
    }

    // [padded][depth_] units; what is beyond `count` or head_dim is zero.
    void pack_keys(const T* const* rows, int count, int padded, float* out) {
        for (int i = 0; i < padded; i++, out += padded_dim_) {
            int d = 0;
            if (i < count)
                for (; d < chunk_.head_dim; d++) out[d] = to_float(rows[i][d]);
            for (; d < padded_dim_; d++) out[d] = 0;
        }
    }

    // As keys: [padded][padded_dim_].
    void pack_values(const T* const* rows, int count, int padded, float* out) { pack_keys(rows, count, padded, out); }

    Product<FloatDot> value_product(const float* values) const {
        Product<FloatDot> p{};
        p.a = values, p.a_row = 1, p.a_depth = padded_dim_;
        return p;
    }

#if defined(VSL_AVX512_BF16)
    void pack_columns(const bf16* const* rows, uint32_t* out) {
        for (int d = 0; d < padded_dim_; d += 32, out += 16 * kLanes) {
            __m512i block[16];
            for (int i = 0; i < 16; i++) block[i] = _mm512_maskz_loadu_epi16(mask32(d), rows[i] + d);
            transpose(block);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * kLanes, block[i]);
        }
    }

    void pack_keys(const bf16* const* rows, int count, int padded, uint32_t* out) {
        for (int i = 0; i < padded; i++, out += depth_)
            for (int d = 0; d < padded_dim_; d += 32)
                _mm512_storeu_si512(
                    out + d / 2, i < count ? _mm512_maskz_loadu_epi16(mask32(d), rows[i] + d) : _mm512_setzero_si512());
    }

    // [padded_dim_][kBlockKeys / 2] units: pairs of adjacent keys' values.
    void pack_values(const bf16* const* rows, int count, int padded, uint32_t* out) {
        const auto row = [&](int key, int d) {
            const __mmask16 mask = key < count ? (__mmask16)mask32(d) : 0;
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[key < count ? key : 0] + d));
        };
        for (int key = 0; key < padded; key += 32)
            for (int d = 0; d < padded_dim_; d += 16) {
                __m512i block[16];
                for (int i = 0; i < 16; i++)
                    block[i] = _mm512_or_si512(row(key + 2 * i, d), _mm512_slli_epi32(row(key + 2 * i + 1, d), 16));
                transpose(block);
                for (int i = 0; i < 16; i++)
                    _mm512_storeu_si512(out + (d + i) * (kBlockKeys / 2) + key / 2, block[i]);
            }
    }

    __mmask32 mask32(int d) const {
        const int left = chunk_.head_dim - d;
        return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    }

    Product<PairDot> value_product(const uint32_t* values) const {
        Product<PairDot> p{};
        p.a = values, p.a_row = kBlockKeys / 2, p.a_depth = 1;
        return p;
    }
#endif

    void product(const Product<Dot>& p, int panels) {
#if defined(VSL_AMX)
        if constexpr (Dot::kDepth == 2)
            if (tiles_) return multiply_tiles(p, 0, panels - 1);
#endif
        multiply(p, panels);
    }

    // One block of keys for up to a group of panels.
    void attend(int panel, int panels, int64_t first, int keys) {
        Product<Dot> p{};
        p.a = keys_, p.a_row = depth_, p.a_depth = 1;
        p.b = queries_ + (size_t)panel * depth_ * kLanes, p.b_panel = (int64_t)depth_ * kLanes;
        p.c = scores_, p.c_panel = kBlockKeys * kLanes;
        p.rows = keys, p.depth = depth_, p.accumulate = false;
        product(p, panels);
        for (int j = 0; j < panels; j++) soften(panel + j, j, first, keys);
        p = value_product(values_);
        p.b = weights_, p.b_panel = kBlockKeys * kLanes;
        p.c = sums_ + (size_t)panel * padded_dim_ * kLanes, p.c_panel = (int64_t)padded_dim_ * kLanes;
        p.rows = padded_dim_, p.depth = keys / Dot::kDepth, p.accumulate = true;
        product(p, panels);
    }

    // Scores -> weights of one panel, and its running maximum, total and sums with them.
    void soften(int panel, int j, int64_t first, int keys) {
        float* const scores = scores_ + (size_t)j * kBlockKeys * kLanes;
        float *const maximum = maximum_ + panel * kLanes, *const total = total_ + panel * kLanes;
        if (limit_[panel * kLanes] < first + keys) {
            vi limit;
            std::memcpy(&limit, limit_ + panel * kLanes, sizeof limit);
            for (int key = 0; key < keys; key++) {
                const vi seen = (vi)(limit > splat((int32_t)(first + key)));
                store(scores + key * kLanes, select(seen, load(scores + key * kLanes), splat(-INFINITY)));
            }
        }
        vf most[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
        for (int key = 0; key < keys; key += 4)
            for (int i = 0; i < 4; i++) most[i] = vmax(most[i], load(scores + (key + i) * kLanes));
        const vf before = load(maximum), scale = splat(chunk_.scale);
        const vf largest = vmax(before, vmax(vmax(most[0], most[1]), vmax(most[2], most[3])) * scale);
        const vf decay = exp2(before - largest);
        const vf sum = weigh(scores, scale, largest, keys, weights_ + (size_t)j * kBlockKeys * kLanes);
        store(maximum, largest);
        store(total, load(total) * decay + sum);
        if (std::memcmp(&before, &largest, sizeof before) == 0) return;
        float* const sums = sums_ + (size_t)panel * padded_dim_ * kLanes;
        for (int d = 0; d < padded_dim_; d++) store(sums + d * kLanes, load(sums + d * kLanes) * decay);
    }

    static vf weigh(const float* scores, vf scale, vf largest, int keys, float* weights) {
        vf sum = {};
        for (int key = 0; key < keys; key++) {
            const vf w = exp2(load(scores + key * kLanes) * scale - largest);
            sum += w;
            store(weights + key * kLanes, w);
        }
        return sum;
    }

#if defined(VSL_AVX512_BF16)
    static vf weigh(const float* scores, vf scale, vf largest, int keys, uint32_t* weights) {
        vf sums[2] = {};
        for (int key = 0; key < keys; key += 2) {
            const vf even = exp2(load(scores + key * kLanes) * scale - largest);
            const vf odd = exp2(load(scores + (key + 1) * kLanes) * scale - largest);
            sums[0] += even, sums[1] += odd;
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)narrow(even));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)narrow(odd)), 16);
            _mm512_storeu_si512(weights + key / 2 * kLanes, _mm512_or_si512(low, high));
        }
        return sums[0] + sums[1];
    }
#endif

    void finish() {
        for (int panel = 0; panel < panels_; panel++) {
            const float* sums = sums_ + (size_t)panel * padded_dim_ * kLanes;
            const vf factor = splat(1.0f) / load(total_ + panel * kLanes);
            T* rows[kLanes];
            const int used = std::min(kLanes, lanes_ - panel * kLanes);
            for (int i = 0; i < used; i++) {
                const int lane = panel * kLanes + i;
                rows[i] = chunk_.out + lane / chunk_.group * chunk_.out_stride +
                          lane % chunk_.group * chunk_.head_dim;
            }
            int d = 0;
#if defined(VSL_AVX512)
            for (; d + 16 <= chunk_.head_dim; d += 16) {
                __m512i block[16];
                for (int i = 0; i < 16; i++) block[i] = (__m512i)(load(sums + (d + i) * kLanes) * factor);
                transpose(block);
                for (int i = 0; i < used; i++) store(rows[i] + d, (vf)block[i]);
            }
#endif
            for (; d < chunk_.head_dim; d++) {
                T values[kLanes];
                store(values, load(sums + d * kLanes) * factor);
                for (int i = 0; i < used; i++) rows[i][d] = values[i];
            }
        }
    }

    const Chunk<T>& chunk_;
    const bool tiles_;
    const int lanes_, panels_, padded_dim_, depth_;
    float *maximum_, *total_;  // [panels][kLanes]
    int32_t* limit_;           // [panels][kLanes]; how many tokens each lane sees
    float* sums_;              // [panels][padded_dim_][kLanes]
    Unit* queries_;            // [panels][depth_][kLanes]
    Unit *keys_, *values_;     // of one block
    float* scores_;            // [group of panels][kBlockKeys][kLanes]
    Unit* weights_;            // [group of panels][kBlockKeys / kDepth][kLanes], panels kBlockKeys x kLanes apart
};

inline void attend_chunk(const Chunk<float>& chunk, Scratch& scratch, bool) {
    ChunkAttention<float, FloatDot>(chunk, scratch, false).run();
}

inline void attend_chunk(const Chunk<bf16>& chunk, Scratch& scratch, bool amx) {
#if defined(VSL_AMX)
    if (amx) {
        const Tiles tiles;
        return ChunkAttention<bf16, PairDot>(chunk, scratch, true).run();
    }
#endif
#if defined(VSL_AVX512_BF16)
    ChunkAttention<bf16, PairDot>(chunk, scratch, false).run();
#else
    ChunkAttention<bf16, FloatDot>(chunk, scratch, false).run();
#endif
}

}  // namespace vsl
