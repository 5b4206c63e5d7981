// Causal attention of a step's tokens over the paged KV pool: plans the work items of all rows and runs them together.
#pragma once

#include <algorithm>

#include "decode.h"

namespace vsl {

template <class T>
struct AttentionArgs {
    const T* query;  // [tokens, heads, head_dim], tokens query_stride apart
    int64_t query_stride;
    const T *keys, *values;
    PoolLayout layout;
    const int32_t* query_start;      // [rows + 1]
    const int32_t* context_lengths;  // [rows], new tokens included
    const int32_t* page_table;       // [rows, pages], rows page_stride apart
    int64_t page_table_stride;
    int rows, heads, kv_heads, head_dim;
    float scale;
    int64_t split_tokens;  // length of the ranges that a context is split into; 0: chosen by load
    T* out;                // [tokens, heads, head_dim]
};

// One query token, or one of the ranges of its context.
struct DecodeItem {
    int32_t token;
    int32_t row;
    int32_t range, ranges;
    int64_t begin, end, context;
    float* partials;  // of all the token's ranges
    std::atomic<int>* left;
};

constexpr int64_t kLeastSplit = 64;  // tokens; shorter ranges cost more in merging than they win

template <class T>
void paged_attention(Context& context, const AttentionArgs<T>& a) {
    const float scale = a.scale * 1.4426950409f;
    const int64_t token_out = (int64_t)a.heads * a.head_dim;
    int64_t tokens_to_read = 0, queries = 0;
    for (int row = 0; row < a.rows; row++) {
        const int64_t n = a.query_start[row + 1] - a.query_start[row];
        tokens_to_read += n * a.context_lengths[row];
        queries += n;
    }
    int64_t split = a.split_tokens;
    if (split <= 0) {
        const int64_t wanted = context.threads == 1 ? tokens_to_read : tokens_to_read / (context.threads * 4) + 1;
        split = std::max(kLeastSplit, (wanted + kBlockTokens - 1) / kBlockTokens * kBlockTokens);
    }

    std::vector<DecodeItem> items;
    items.reserve(queries * 2);
    size_t floats = 0, counters = 0;
    const size_t partial = Partial::floats(a.heads, a.head_dim);
    for (int row = 0; row < a.rows; row++) {
        const int64_t first = a.query_start[row], n = a.query_start[row + 1] - first;
        for (int64_t i = 0; i < n; i++) {
            const int64_t length = a.context_lengths[row] - n + i + 1;
            if (length <= 0) {  // a row of padding
                std::memset((void*)(a.out + (first + i) * token_out), 0, token_out * sizeof(T));
                continue;
            }
            const int64_t ranges = (length + split - 1) / split;
            for (int64_t r = 0; r < ranges; r++)
                items.push_back({(int32_t)(first + i), row, (int32_t)r, (int32_t)ranges, r * split,
                                 std::min(length, (r + 1) * split), length, (float*)floats,
                                 (std::atomic<int>*)counters});
            floats += ranges * partial;
            counters++;
        }
    }
    const size_t counter_bytes = (counters * sizeof(std::atomic<int>) + 63) / 64 * 64;
    char* memory = (char*)context.shared.reserve(counter_bytes + floats * sizeof(float));
    std::memset(memory, 0, counter_bytes);
    for (DecodeItem& item : items) {
        item.partials = (float*)(memory + counter_bytes) + (size_t)item.partials;
        item.left = (std::atomic<int>*)memory + (size_t)item.left;
    }

    run_items(context, (int)items.size(), [&](int index, int) {
        const DecodeItem& item = items[index];
        const CacheView<T> cache{a.keys, a.values, a.page_table + item.row * a.page_table_stride, a.layout};
        float* own = item.partials + item.range * partial;
        attend_range(a.query + item.token * a.query_stride, cache, item.begin, item.end, a.heads, a.kv_heads,
                     a.head_dim, scale, Partial::at(own, a.heads));
        if (item.left->fetch_add(1, std::memory_order_acq_rel) == item.ranges - 1)
            merge_ranges(item.partials, item.ranges, a.heads, a.head_dim, a.out + item.token * token_out);
    });
}

}  // namespace vsl
