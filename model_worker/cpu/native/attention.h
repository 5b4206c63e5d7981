// Causal attention of a step's tokens over the paged KV pool: plans the work items of all rows and runs them together.
#pragma once

#include <algorithm>

#include "chunk.h"
#include "decode.h"
#include "decode_amx.h"
#include "decode_avx2.h"

namespace vsl {

template <class T, class Stored>
struct AttentionArgs {
    const T* query;  // [tokens, heads, head_dim], tokens query_stride apart
    int64_t query_stride;
    const Stored *keys, *values;
    PoolLayout layout;
    const int32_t* query_start;      // [rows + 1]
    const int32_t* context_lengths;  // [rows], new tokens included
    const int32_t* page_table;       // [rows, pages], rows page_stride apart
    int64_t page_table_stride;
    int rows, heads, kv_heads, head_dim;
    float scale;
    T* out;  // [tokens, heads, head_dim], tokens out_stride apart
    int64_t out_stride;
};

// One query token, or one of the ranges of its context.
struct DecodeItem {
    int token, row;
    int range, ranges;
    int64_t begin, end;   // positions
    size_t partials;      // where those of the token's first range begin, in floats
    int counter;          // which of finished_ counts the token's ranges
};

// A block of a row's query tokens, for one KV head.
struct ChunkItem {
    int token, tokens, row, kv_head;
    int64_t first_context;

    int64_t work() const { return tokens * (first_context + tokens); }
};

// Contexts are worked on in ranges of this length, whatever else runs and on however many threads, so that the order of a
// row's sums does not depend on its batch. As quick as ranges cut to the load, at 1 to 16 rows and contexts of 192 to
// 2048.
constexpr int64_t kSplitTokens = 128;
constexpr int kLeastChunkTokens = 4;    // fewer new tokens run one by one
constexpr int kLeastBlockQueries = 64;  // lanes of a chunk's block; smaller ones read keys too often

template <class T, class Stored>
class PagedAttention {
   public:
    PagedAttention(Context& context, const AttentionArgs<T, Stored>& args)
        : context_(context),
          args_(args),
          group_(args.heads / args.kv_heads),
          token_size_((int64_t)args.heads * args.head_dim),
          scale_(args.scale * 1.4426950409f),
          partial_(Partial::floats(args.heads, args.head_dim)) {}

    void run() {
        plan();
        const int num_chunks = (int)chunks_.size();
        const auto work = [&](int index, int worker) {
            if (index < num_chunks)
                run_chunk(chunks_[index], context_.scratch[worker]);
            else
                run_decode(index - num_chunks, context_.scratch[worker]);
        };
        run_stretches(context_, num_chunks + (int)decodes_.size(), work, num_chunks);
    }

   private:
    void plan() {
#if defined(VSL_AMX)
        amx_decode_ = context_.amx && fits_amx_decode(args_.layout, args_.heads, args_.kv_heads, args_.head_dim);
#endif
        size_t floats = 0;
        for (int row = 0; row < args_.rows; row++) {
            if (args_.context_lengths[row] == 0)  // padding
                for (int64_t token = args_.query_start[row]; token < args_.query_start[row + 1]; token++)
                    std::memset((void*)(args_.out + token * args_.out_stride), 0, token_size_ * sizeof(T));
            else if (context_.fixed_order || num_new(row) < kLeastChunkTokens)
                floats += plan_decodes(row, floats);
            else
                plan_chunks(row);
        }
        // The most work first, so that what is left at the end is small.
        std::sort(chunks_.begin(), chunks_.end(), [](const ChunkItem& a, const ChunkItem& b) {
            return a.work() > b.work();
        });
        partials_ = (float*)context_.shared.reserve(floats * sizeof(float));
        finished_ = std::vector<std::atomic<int>>(counters_);
    }

    int64_t num_new(int row) const { return args_.query_start[row + 1] - args_.query_start[row]; }

    // Returns how many floats the partial results take.
    size_t plan_decodes(int row, size_t floats) {
        const size_t before = floats;
        const int64_t n = num_new(row);
        for (int64_t i = 0; i < n; i++) {
            const int64_t length = args_.context_lengths[row] - n + i + 1;
            const int ranges = (int)((length + kSplitTokens - 1) / kSplitTokens);
            for (int r = 0; r < ranges; r++)
                decodes_.push_back({(int)(args_.query_start[row] + i), row, r, ranges, r * kSplitTokens,
                                    std::min(length, (r + 1) * kSplitTokens), floats, counters_});
            counters_++;
            floats += ranges * partial_;
        }
        return floats - before;
    }

    // A context is not split: a range's partial sums would move with the number of tokens. For there to be enough for all
    // threads, blocks get smaller instead.
    void plan_chunks(int row) {
        const int parts = context_.threads == 1 ? 1 : 4 * context_.threads;
        const int64_t n = num_new(row), least = std::max<int64_t>(kLeastBlockQueries, n * args_.heads / parts);
        const int64_t most = std::min<int64_t>(kMostBlockQueries, least);
        const int64_t blocks = (n * group_ + most - 1) / most, block = (n + blocks - 1) / blocks;
        for (int64_t i = 0; i < n; i += block)
            for (int kv = 0; kv < args_.kv_heads; kv++)
                chunks_.push_back({(int)(args_.query_start[row] + i), (int)std::min(block, n - i), row, kv,
                                   args_.context_lengths[row] - n + i + 1});
    }

    CacheView<Stored> cache(int row) const {
        return {args_.keys, args_.values, args_.page_table + row * args_.page_table_stride, args_.layout};
    }

    void run_decode(int index, Scratch& scratch) {
        const DecodeItem& item = decodes_[index];
        float* const partials = partials_ + item.partials;
        attend(index, item, Partial::at(partials + item.range * partial_, args_.heads), scratch);
        if (finished_[item.counter].fetch_add(1, std::memory_order_acq_rel) == item.ranges - 1)
            merge_ranges(partials, item.ranges, args_.heads, args_.head_dim, args_.out + item.token * args_.out_stride);
    }

    void attend([[maybe_unused]] int index, const DecodeItem& item, const Partial& out,
                [[maybe_unused]] Scratch& scratch) {
        const T* const query = args_.query + item.token * args_.query_stride;
        // Workers go through the items in their order: the next one's first block follows.
        [[maybe_unused]] const DecodeItem& next = decodes_[std::min<size_t>(index + 1, decodes_.size() - 1)];
        [[maybe_unused]] const int next_tokens = (int)std::min<int64_t>(kBlockTokens, next.end - next.begin);
#if defined(VSL_AMX)
        if constexpr (std::is_same_v<T, bf16> && std::is_same_v<Stored, bf16>) {
            if (amx_decode_) {
                const int64_t follow = locate(cache(next.row).pages, args_.layout, next.begin);
                const int tokens = &next == &item ? 0 : next_tokens;
                uint32_t* const queries = (uint32_t*)scratch.reserve((args_.heads + 15) / 16 * 32 * args_.head_dim);
                return attend_range_amx(query, cache(item.row), item.begin, item.end, args_.heads, args_.kv_heads,
                                        args_.head_dim, scale_, out, queries, follow, tokens);
            }
        }
#elif defined(VSL_AVX2)
        if constexpr (std::is_same_v<T, bf16>) {
            if (fits_streams(args_.heads, args_.kv_heads, args_.head_dim)) {
                int64_t follow[kBlockTokens];
                locate(cache(next.row).pages, args_.layout, next.begin, next_tokens, follow);
                const size_t bytes = RangeMemory::bytes(args_.heads, args_.head_dim);
                return attend_range_avx2(query, cache(item.row), item.begin, item.end, args_.heads, args_.kv_heads,
                                         args_.head_dim, scale_, out,
                                         RangeMemory(scratch.reserve(bytes), args_.heads, args_.head_dim), follow);
            }
        }
#endif
        attend_range(query, cache(item.row), item.begin, item.end, args_.heads, args_.kv_heads, args_.head_dim, scale_,
                     out);
    }

    void run_chunk(const ChunkItem& item, Scratch& scratch) {
        const int64_t first = (int64_t)item.kv_head * group_ * args_.head_dim;
        const Chunk<T, Stored> chunk{args_.query + item.token * args_.query_stride + first,
                                     args_.query_stride,
                                     cache(item.row),
                                     item.kv_head,
                                     group_,
                                     args_.head_dim,
                                     item.tokens,
                                     item.first_context,
                                     scale_,
                                     args_.out + item.token * args_.out_stride + first,
                                     args_.out_stride};
        attend_chunk(chunk, scratch, context_.amx);
    }

    Context& context_;
    const AttentionArgs<T, Stored>& args_;
    const int group_;
    const int64_t token_size_;
    const float scale_;
    const size_t partial_;  // floats of one range's partial result
    std::vector<DecodeItem> decodes_;
    std::vector<ChunkItem> chunks_;
    bool amx_decode_ = false;
    int counters_ = 0;
    std::vector<std::atomic<int>> finished_;  // ranges that are done, of a token
    float* partials_ = nullptr;
};

}  // namespace vsl
