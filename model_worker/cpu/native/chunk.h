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

template <class T, class Stored>
struct Chunk {
    const T* query;  // of the block's first token and the KV head's first query head, [tokens, heads, head_dim]
    int64_t query_stride;
    CacheView<Stored> cache;
    int kv_head, group, head_dim;
    int tokens;             // in this block
    int64_t first_context;  // cached tokens that the block's first token sees, itself included; the next sees one more
    float scale;            // positive, in units of log 2
    T* out;                 // as query
    int64_t out_stride;
};

// Packs the data of one chunk for Dot, multiplies, and keeps the running softmax.
template <class T, class Stored, class Dot>
class ChunkAttention {
   public:
    static constexpr bool kScaled = CacheView<Stored>::kScaled;
    using Unit = typename Dot::Unit;
    using Element = std::conditional_t<Dot::kDepth == 2, bf16, float>;  // of a unit

    ChunkAttention(const Chunk<T, Stored>& chunk, Scratch& scratch, bool tiles)
        : chunk_(chunk),
          tiles_(tiles),
          keys_in_place_(tiles && !kScaled && chunk.cache.layout.page_size % 16 == 0 && chunk.head_dim % 32 == 0),
          lanes_(chunk.tokens * chunk.group),
          end_(chunk.first_context + chunk.tokens - 1),
          panels_((lanes_ + kLanes - 1) / kLanes),
          padded_dim_((chunk.head_dim + kDepthMultiple - 1) / kDepthMultiple * kDepthMultiple),
          depth_(padded_dim_ / Dot::kDepth) {
        const size_t panels = panels_;
        const size_t block = (size_t)kBlockKeys * padded_dim_, square = (size_t)kPanelGroup * kBlockKeys * kLanes;
        float* memory = static_cast<float*>(scratch.reserve(
            (panels * kLanes * (3 + 2 * padded_dim_) + (kScaled ? 3 : 2) * block + 2 * square +
             padded_dim_) *
            sizeof(float)));
        const auto take = [&](size_t count) {
            float* const taken = memory;
            memory += count;
            return taken;
        };
        sums_ = take(panels * padded_dim_ * kLanes);
        queries_ = (Unit*)take(panels * padded_dim_ * kLanes);
        keys_ = (Unit*)take(block);
        values_ = (Unit*)take(block);
        decoded_ = (Element*)take(kScaled ? block : 0);
        scores_ = take(square);
        weights_ = (Unit*)take(square);
        maximum_ = take(panels * kLanes);
        total_ = take(panels * kLanes);
        limit_ = (int32_t*)take(panels * kLanes);
        zeros_ = (T*)take(padded_dim_);
    }

    void run() {
        start();
        const int step = tiles_ ? 2 : kPanelGroup;
        Rows rows[2];
        locate_block(0, rows[0]);
        for (int64_t first = 0, block = 0; first < end_; first += kBlockKeys, block++) {
            const Rows& now = rows[block % 2];
            locate_block(first + kBlockKeys, rows[(block + 1) % 2]);
            next_ = &rows[(block + 1) % 2];
            fetched_ = 0;
            if constexpr (kScaled)
                decode_block(now);
            else
                pack_block(now);
            for (int panel = 0; panel < panels_; panel += step) {
                const int panels = std::min(step, panels_ - panel);
                // The last lane sees most. What no lane of the group sees is left out.
                const int64_t seen = limit_[(panel + panels) * kLanes - 1] - first;
                if (seen <= 0) continue;
                const int used = (int)std::min<int64_t>((now.count + 31) / 32 * 32, (seen + 31) / 32 * 32);
                attend(panel, panels, first, used);
            }
        }
        for (int panel = 0; panel < panels_; panel++) finish_panel(panel);
    }

   private:
    // Where a block's keys and values lie, of KV head 0.
    struct Rows {
        int count;
        int64_t offsets[kBlockKeys];
        int64_t scale_offsets[kScaled ? kBlockKeys : 1];  // of int8, in bytes
    };

    void locate_block(int64_t first, Rows& rows) const {
        rows.count = (int)std::max<int64_t>(0, std::min<int64_t>(kBlockKeys, end_ - first));
        for (int i = 0; i < rows.count; i += kBlockTokens) {
            const int count = std::min(kBlockTokens, rows.count - i);
            locate(chunk_.cache.pages, chunk_.cache.layout, first + i, count, rows.offsets + i);
            if constexpr (kScaled)
                locate_scales(chunk_.cache.pages, chunk_.cache.layout, first + i, count, rows.scale_offsets + i);
        }
    }

    // Asks for the keys and values of `count` more tokens of the next block.
    void fetch_ahead(int count) {
        const int64_t head = chunk_.kv_head * chunk_.cache.layout.head_stride;
        for (const int end = std::min(next_->count, fetched_ + count); fetched_ < end; fetched_++) {
            const int64_t offset = next_->offsets[fetched_] + head;
            prefetch(chunk_.cache.keys + offset, 0, chunk_.head_dim);
            prefetch(chunk_.cache.values + offset, 0, chunk_.head_dim);
        }
    }

    const T* query_row(int lane) const {
        return chunk_.query + lane / chunk_.group * chunk_.query_stride + lane % chunk_.group * chunk_.head_dim;
    }

    void start() {
        for (int lane = 0; lane < panels_ * kLanes; lane++) {  // lanes that are left over repeat the last query
            limit_[lane] = (int32_t)(chunk_.first_context + std::min(lane, lanes_ - 1) / chunk_.group);
            maximum_[lane] = kNoScore, total_[lane] = 0;
        }
        std::memset(sums_, 0, (size_t)panels_ * padded_dim_ * kLanes * sizeof(float));
        std::memset((void*)zeros_, 0, padded_dim_ * sizeof(T));
        std::memset((void*)values_, 0, (size_t)kBlockKeys * padded_dim_ * sizeof(float));
        for (int panel = 0; panel < panels_; panel++) {
            const T* rows[kLanes];
            for (int i = 0; i < kLanes; i++) rows[i] = query_row(std::min(panel * kLanes + i, lanes_ - 1));
            pack_columns(rows, queries_ + (size_t)panel * depth_ * kLanes);
        }
        fetch_quota_ = (8 + panels_ - 1) / panels_;  // weigh asks panels x kBlockKeys / 8 times
    }

    // kLanes rows of head_dim values -> [depth_][kLanes] units, zero beyond head_dim.
    void pack_columns(const T* const* rows, float* out) {
        for (int d = 0; d < padded_dim_; d++)
            for (int i = 0; i < kLanes; i++) out[d * kLanes + i] = d < chunk_.head_dim ? to_float(rows[i][d]) : 0;
    }

    void pack_block(const Rows& block) {
        const int padded = (block.count + 31) / 32 * 32;
        const int64_t first = chunk_.kv_head * chunk_.cache.layout.head_stride;
        const T *keys[kBlockKeys], *values[kBlockKeys];
        for (int i = 0; i < padded; i++) {
            keys[i] = i < block.count ? chunk_.cache.keys + block.offsets[i] + first : zeros_;
            values[i] = i < block.count ? chunk_.cache.values + block.offsets[i] + first : zeros_;
        }
        if (keys_in_place_)
            for (int i = 0; i < padded; i += 16)  // 16 keys that begin past the last one: those before, unseen, do as well
                key_tiles_[i / 16] = (const Unit*)keys[i < block.count ? i : i - 16];
        else
            pack_keys(keys, padded, keys_);
        pack_values(values, padded, values_);
    }

    // As pack_block, of int8.
    void decode_block(const Rows& block) {
        const int padded = (block.count + 31) / 32 * 32;
        decode_rows(chunk_.cache.keys, block, padded, (Element*)keys_);
        if constexpr (Dot::kDepth == 1) {
            decode_rows(chunk_.cache.values, block, padded, (Element*)values_);
        } else {
            decode_rows(chunk_.cache.values, block, padded, decoded_);
            const Element* rows[kBlockKeys];
            for (int i = 0; i < padded; i++) rows[i] = decoded_ + (size_t)i * padded_dim_;
            pack_values(rows, padded, values_);
        }
    }

    // Codes times their scales: [padded][padded_dim_], zero beyond the block and head_dim.
    void decode_rows(const Stored* pool, const Rows& block, int padded, Element* out) const {
        const PoolLayout& layout = chunk_.cache.layout;
        const int64_t kv_head = chunk_.kv_head;
        for (int i = 0; i < padded; i++, out += padded_dim_) {
            int d = 0;
            if (i < block.count) {
                const Stored* const codes = pool + block.offsets[i] + kv_head * layout.head_stride;
                float scale;
                std::memcpy(&scale, pool + block.scale_offsets[i] + kv_head * layout.scale_stride(), sizeof scale);
                for (; d + kLanes <= chunk_.head_dim; d += kLanes) store(out + d, load(codes + d) * splat(scale));
                if (const int left = chunk_.head_dim - d; left > 0) {
                    store_part(out + d, load_part(codes + d, left) * splat(scale), left);
                    d += left;
                }
            }
            std::memset((void*)(out + d), 0, (padded_dim_ - d) * sizeof *out);
        }
    }

    // [padded][depth_] units, zero beyond head_dim.
    void pack_keys(const T* const* rows, int padded, float* out) {
        for (int i = 0; i < padded; i++, out += padded_dim_) {
            int d = 0;
            for (; d < chunk_.head_dim; d++) out[d] = to_float(rows[i][d]);
            for (; d < padded_dim_; d++) out[d] = 0;
        }
    }

    // As keys: [padded][padded_dim_].
    void pack_values(const T* const* rows, int padded, float* out) { pack_keys(rows, padded, out); }

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

    void pack_keys(const bf16* const* rows, int padded, uint32_t* out) {
        for (int i = 0; i < padded; i++, out += depth_)
            for (int d = 0; d < padded_dim_; d += 32)
                _mm512_storeu_si512(out + d / 2, _mm512_maskz_loadu_epi16(mask32(d), rows[i] + d));
    }

    // [padded_dim_][kBlockKeys / 2] units: pairs of adjacent keys' values. Leaves what is beyond head_dim, zero.
    // A quarter of a vector takes 8 values of one key out of 8; each quarter is transposed in itself.
    void pack_values(const bf16* const* rows, int padded, uint32_t* out) {
        for (int key = 0; key < padded; key += 32)
            for (int d = 0; d < chunk_.head_dim; d += 8) {
                __m512i block[8];
                for (int i = 0; i < 8; i++) {
                    const auto quarter = [&](int j) { return _mm_loadu_si128((__m128i*)(rows[key + 8 * j + i] + d)); };
                    block[i] = _mm512_castsi128_si512(quarter(0));
                    block[i] = _mm512_inserti32x4(block[i], quarter(1), 1);
                    block[i] = _mm512_inserti32x4(block[i], quarter(2), 2);
                    block[i] = _mm512_inserti32x4(block[i], quarter(3), 3);
                }
                transpose_quarters(block);
                for (int i = 0; i < 8; i++)
                    _mm512_storeu_si512(out + (d + i) * (kBlockKeys / 2) + key / 2, block[i]);
            }
    }

    __mmask32 mask32(int d) const {
        const int left = chunk_.head_dim - d;
        return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    }
#elif defined(VSL_PAIRS)
    void pack_columns(const bf16* const* rows, uint32_t* out) {
        for (int d = 0; d < padded_dim_; d += 2)
            for (int i = 0; i < kLanes; i++) *out++ = d < chunk_.head_dim ? pair(rows[i][d], rows[i][d + 1]) : 0;
    }

    void pack_keys(const bf16* const* rows, int padded, uint32_t* out) {
        for (int i = 0; i < padded; i++, out += depth_) {
            std::memcpy(out, rows[i], chunk_.head_dim * sizeof(bf16));
            std::memset(out + chunk_.head_dim / 2, 0, (padded_dim_ - chunk_.head_dim) * sizeof(bf16));
        }
    }

    // [padded_dim_][kBlockKeys / 2] units: pairs of adjacent keys' values. Leaves what is beyond head_dim, zero.
    void pack_values(const bf16* const* rows, int padded, uint32_t* out) {
        for (int key = 0; key < padded; key += 2)
            for (int d = 0; d < chunk_.head_dim; d++)
                out[d * (kBlockKeys / 2) + key / 2] = pair(rows[key][d], rows[key + 1][d]);
    }

    static uint32_t pair(bf16 low, bf16 high) { return low.bits | (uint32_t)high.bits << 16; }
#endif

#if defined(VSL_PAIRS)
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
        if (keys_in_place_)
            p.a_tiles = key_tiles_, p.a_row = chunk_.cache.layout.token_stride / Dot::kDepth;
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

    vf weigh(const float* scores, vf scale, vf largest, int keys, float* weights) {
        vf sum = {};
        for (int key = 0; key < keys; key++) {
            if (key % 8 == 0) fetch_ahead(fetch_quota_);
            const vf w = exp2(load(scores + key * kLanes) * scale - largest);
            sum += w;
            store(weights + key * kLanes, w);
        }
        return sum;
    }

#if defined(VSL_AVX512_BF16)
    vf weigh(const float* scores, vf scale, vf largest, int keys, uint32_t* weights) {
        vf sums[2] = {};
        const __m512i interleaved = interleaved_halves();
        for (int key = 0; key < keys; key += 2) {
            if (key % 8 == 0) fetch_ahead(fetch_quota_);
            const vf even = exp2_for_bf16(load(scores + key * kLanes) * scale - largest);
            const vf odd = exp2_for_bf16(load(scores + (key + 1) * kLanes) * scale - largest);
            sums[0] += even, sums[1] += odd;
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            _mm512_storeu_si512(weights + key / 2 * kLanes, _mm512_permutexvar_epi16(interleaved, halves));
        }
        return sums[0] + sums[1];
    }
#elif defined(VSL_PAIRS)
    vf weigh(const float* scores, vf scale, vf largest, int keys, uint32_t* weights) {
        vf sum = {};
        for (int key = 0; key < keys; key += 2) {
            if (key % 8 == 0) fetch_ahead(fetch_quota_);
            const vf even = exp2(load(scores + key * kLanes) * scale - largest);
            const vf odd = exp2(load(scores + (key + 1) * kLanes) * scale - largest);
            sum += even + odd;
            const vf pairs = (vf)((vu)widen(narrow(even)) >> 16 | (vu)widen(narrow(odd)));
            store((float*)weights + key / 2 * kLanes, pairs);
        }
        return sum;
    }
#endif

    // [padded_dim_][kLanes] sums over their lanes' totals -> the rows of lanes that are not left over.
    void finish_panel(int panel) {
        const float* const sums = sums_ + (size_t)panel * padded_dim_ * kLanes;
        const vf factor = splat(1.0f) / load(total_ + panel * kLanes);
        const int used = std::min(kLanes, lanes_ - panel * kLanes);
        T* rows[kLanes];
        for (int i = 0; i < used; i++) {
            const int lane = panel * kLanes + i;
            rows[i] = chunk_.out + lane / chunk_.group * chunk_.out_stride + lane % chunk_.group * chunk_.head_dim;
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

    const Chunk<T, Stored>& chunk_;
    const bool tiles_, keys_in_place_;
    const int lanes_;
    const int64_t end_;  // tokens that the last lane sees
    const int panels_, padded_dim_, depth_;
    float *maximum_, *total_;  // [panels][kLanes]
    float* sums_;              // [panels][padded_dim_][kLanes]
    Unit* queries_;            // [panels][depth_][kLanes]
    int32_t* limit_;           // [panels][kLanes]; how many tokens each lane sees
    Unit *keys_, *values_;     // of one block
    Element* decoded_;         // [kBlockKeys][padded_dim_], values of int8 before they are packed
    const Unit* key_tiles_[kBlockKeys / 16];  // or where each 16 keys lie
    float* scores_;            // [group of panels][kBlockKeys][kLanes]
    Unit* weights_;            // [group of panels][kBlockKeys / kDepth][kLanes], panels kBlockKeys x kLanes apart
    T* zeros_;                 // [padded_dim_]
    const Rows* next_;         // the next block,
    int fetched_, fetch_quota_;  // how many of its tokens have been asked for, and how many are at a time
};

template <class Stored>
inline void attend_chunk(const Chunk<float, Stored>& chunk, Scratch& scratch, bool) {
    ChunkAttention<float, Stored, FloatDot>(chunk, scratch, false).run();
}

template <class Stored>
inline void attend_chunk(const Chunk<bf16, Stored>& chunk, Scratch& scratch, [[maybe_unused]] bool amx) {
#if defined(VSL_AMX)
    if (amx) {
        const Tiles tiles;
        return ChunkAttention<bf16, Stored, PairDot>(chunk, scratch, true).run();
    }
#endif
#if defined(VSL_PAIRS)
    ChunkAttention<bf16, Stored, PairDot>(chunk, scratch, false).run();
#else
    ChunkAttention<bf16, Stored, FloatDot>(chunk, scratch, false).run();
#endif
}

}  // namespace vsl
