// Attention of a chunk of a request's new tokens over its cached ones: blocks of queries against blocks of keys, with
// the online softmax of FlashAttention (Dao et al., 2022). The lanes are queries (see dot.h): lane r of a block is
// token r / group, query head r % group of the block's KV head.
#pragma once

#include "chunk_pack.h"
#include "decode.h"

namespace vsl {

#if defined(VSL_AMX)
constexpr int kMostBlockQueries = 512;  // see kBlockKeys
#else
constexpr int kMostBlockQueries = 256;
#endif

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
    static constexpr int kMultiple = Dot::kMultiple;
    static constexpr bool kPairs = Dot::kDepth == 2;

    ChunkAttention(const Chunk<T, Stored>& chunk, Scratch& scratch, bool tiles)
        : chunk_(chunk),
          tiles_(tiles),
          keys_in_place_(tiles && !kScaled && chunk.cache.layout.page_size % 16 == 0 && chunk.head_dim % 32 == 0),
          lanes_(chunk.tokens * chunk.group),
          end_(chunk.first_context + chunk.tokens - 1),
          panels_((lanes_ + kLanes - 1) / kLanes),
          padded_dim_(padded(chunk.head_dim)),
          depth_(padded_dim_ / Dot::kDepth) {
        const size_t panels = panels_;
        const size_t block = (size_t)kBlockKeys * padded_dim_, square = (size_t)kPanelGroup * kBlockKeys * kLanes;
        float* memory = static_cast<float*>(scratch.reserve(
            (panels * kLanes * (3 + 2 * padded_dim_) + (kScaled && kPairs ? 3 : 2) * block + 2 * square +
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
        decoded_ = (bf16*)take(kScaled && kPairs ? block : 0);
        scores_ = take(square);
        weights_ = (Unit*)take(square);
        maximum_ = take(panels * kLanes);
        total_ = take(panels * kLanes);
        limit_ = (int32_t*)take(panels * kLanes);
        zeros_ = (Stored*)take(padded_dim_);
    }

    void run() {
        Rows rows[2];
        locate_block(0, rows[0]);
        next_ = &rows[0], fetched_ = 0;
        start();
        const int step = tiles_ ? 2 : kPanelGroup;
        for (int64_t first = 0, block = 0; first < end_; first += kBlockKeys, block++) {
            const Rows& now = rows[block % 2];
            locate_block(first + kBlockKeys, rows[(block + 1) % 2]);
            next_ = &rows[(block + 1) % 2];
            fetched_ = 0;
            if constexpr (!kPairs)
                pack_floats(now);
            else if constexpr (kScaled)
                decode_block(now);
            else
                pack_block(now);
            for (int panel = 0, panels; panel < panels_; panel += panels) {
                // The last four as two and two: alone, one panel's sums would wait for each other.
                panels = step == 3 && panels_ - panel == 4 ? 2 : std::min(step, panels_ - panel);
                // The last lane sees most. What no lane of the group sees is left out.
                const int64_t seen = limit_[(panel + panels) * kLanes - 1] - first;
                if (seen <= 0) continue;
                const int used = kPairs ? (int)std::min<int64_t>(padded(now.count), (seen + 31) / 32 * 32)
                                        : (int)(std::min<int64_t>(now.count, seen) + 3) / 4 * 4;
                attend(panel, panels, first, used);
            }
        }
        for (int panel = 0; panel < panels_; panel++) finish_panel(panel);
    }

   private:
    static int padded(int n) { return (n + kMultiple - 1) / kMultiple * kMultiple; }

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
        if (kPairs) std::memset(sums_, 0, (size_t)panels_ * padded_dim_ * kLanes * sizeof(float));
        std::memset((void*)zeros_, 0, padded_dim_ * sizeof(Stored));
        if (kPairs) std::memset((void*)values_, 0, (size_t)kBlockKeys * padded_dim_ * sizeof(float));
        for (int panel = 0; panel < panels_; panel++) {
            const T* rows[kLanes];
            for (int i = 0; i < kLanes; i++) {
                rows[i] = query_row(std::min(panel * kLanes + i, lanes_ - 1));
                prefetch(query_row(std::min((panel + 2) * kLanes + i, lanes_ - 1)), 0, chunk_.head_dim);
            }
            fetch_ahead((kBlockKeys + panels_ - 1) / panels_);
            pack_columns(rows, chunk_.head_dim, padded_dim_, queries_ + (size_t)panel * depth_ * kLanes);
        }
        fetch_quota_ = (8 + panels_ - 1) / panels_;  // weigh asks panels x kBlockKeys / 8 times
    }

    // Keys to [panel of keys][depth_][kLanes], values to [panel of head_dim][kBlockKeys][kLanes].
    void pack_floats(const Rows& block) {
        const PoolLayout& layout = chunk_.cache.layout;
        const int64_t kv_head = chunk_.kv_head;
        for (int first = 0; first < block.count; first += kLanes) {
            const Stored *keys[kLanes], *values[kLanes];
            float key_scales[kLanes] = {}, value_scales[kLanes] = {};
            for (int i = 0; i < kLanes; i++) {
                const bool used = first + i < block.count;
                const int64_t offset = used ? block.offsets[first + i] + kv_head * layout.head_stride : 0;
                keys[i] = used ? chunk_.cache.keys + offset : zeros_;
                values[i] = used ? chunk_.cache.values + offset : zeros_;
                if (kScaled && used) {
                    const int64_t scale = block.scale_offsets[first + i] + kv_head * layout.scale_stride();
                    std::memcpy(key_scales + i, (const char*)chunk_.cache.keys + scale, sizeof(float));
                    std::memcpy(value_scales + i, (const char*)chunk_.cache.values + scale, sizeof(float));
                }
            }
            pack_columns(keys, chunk_.head_dim, padded_dim_, keys_ + first * padded_dim_, key_scales);
            for (int d = 0; d < padded_dim_; d += kLanes) {
                float* const out = values_ + d * kBlockKeys + first * kLanes;
                const auto put = [&](int i, vf v) {
                    store(out + i * kLanes, kScaled ? v * splat(value_scales[i]) : v);
                };
                if (d + kLanes <= chunk_.head_dim)
                    for (int i = 0; i < kLanes; i++) put(i, load(values[i] + d));
                else
                    for (int i = 0; i < kLanes; i++) put(i, load_part(values[i] + d, chunk_.head_dim - d));
            }
        }
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
            pack_keys(keys, padded, chunk_.head_dim, padded_dim_, keys_);
        pack_values(values, padded, chunk_.head_dim, values_);
    }

    // As pack_block, of int8.
    void decode_block(const Rows& block) {
        const int padded = (block.count + 31) / 32 * 32;
        decode_rows(chunk_.cache.keys, block, padded, (bf16*)keys_);
        decode_rows(chunk_.cache.values, block, padded, decoded_);
        const bf16* rows[kBlockKeys];
        for (int i = 0; i < padded; i++) rows[i] = decoded_ + (size_t)i * padded_dim_;
        pack_values(rows, padded, chunk_.head_dim, values_);
    }

    // Codes times their scales: [padded][padded_dim_], zero beyond the block and head_dim.
    void decode_rows(const Stored* pool, const Rows& block, int padded, bf16* out) const {
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

    Product<FloatDot> value_product(const float* values) const {
        Product<FloatDot> p{};
        p.a = values, p.a_panel = kBlockKeys * kLanes;
        return p;
    }

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
        p.a = keys_, p.a_row = depth_, p.a_depth = 1, p.a_panel = depth_ * kLanes;
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
        p.rows = padded_dim_, p.depth = keys / Dot::kDepth, p.accumulate = kPairs || first > 0;
        product(p, panels);
    }

    // Scores -> weights of one panel, and its running maximum, total and sums with them.
    void soften(int panel, int j, int64_t first, int keys) {
        float* const scores = scores_ + (size_t)j * kBlockKeys * kLanes;
        float *const maximum = maximum_ + panel * kLanes, *const total = total_ + panel * kLanes;
        if (limit_[panel * kLanes] < first + keys) {
            vi limit;
            std::memcpy(&limit, limit_ + panel * kLanes, sizeof limit);
            for (int key = std::max(0, (int)(limit_[panel * kLanes] - first)); key < keys; key++) {
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
        if ((!kPairs && first == 0) || std::memcmp(&before, &largest, sizeof before) == 0) return;
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
            store((float*)weights + key / 2 * kLanes, (vf)pair_to_bf16(even, odd));
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
        unpack_columns(sums, factor, used, rows, chunk_.head_dim);
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
    bf16* decoded_;         // [kBlockKeys][padded_dim_], values of int8 before they are packed
    const Unit* key_tiles_[kBlockKeys / 16];  // or where each 16 keys lie
    float* scores_;            // [group of panels][kBlockKeys][kLanes]
    Unit* weights_;            // [group of panels][kBlockKeys / kDepth][kLanes], panels kBlockKeys x kLanes apart
    Stored* zeros_;            // [padded_dim_]
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
