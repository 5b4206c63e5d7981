// RMSNorm, q/k norm + rotary embedding + KV store, SiLU x up, argmax. Values are fp32 inside and are rounded to the
// tensor's dtype exactly where transformers' Qwen3 rounds them, so that bf16 results agree with it.
#pragma once

#include "abi.h"
#include "kv_int8.h"
#include "parallel.h"
#include "simd.h"

namespace vsl {

constexpr int64_t kElementsPerItem = 16384;  // less work than this is not worth waking another thread

// x / sqrt(mean(x^2) + eps), rounded, x weight, rounded. x may be out.
template <class T>
inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    vf squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes)
        for (int j = 0; j < 4; j++) {
            const vf v = load(x + i + j * kLanes);
            squares[j] += v * v;
        }
    for (; i < size; i += kLanes) {
        const vf v = i + kLanes <= size ? load(x + i) : load_part(x + i, (int)(size - i));
        squares[0] += v * v;
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)size;
    const vf factor = splat(1.0f / std::sqrt(mean + eps));
    for (i = 0; i + kLanes <= size; i += kLanes)
        store(out + i, load(weight + i) * rounded_to(load(x + i) * factor, out));
    if (i < size) {
        const int n = (int)(size - i);
        store_part(out + i, load_part(weight + i, n) * rounded_to(load_part(x + i, n) * factor, out), n);
    }
}

template <class T>
inline void add_row(const T* x, T* residual, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
    if (i < size) {
        const int n = (int)(size - i);
        store_part(residual + i, load_part(residual + i, n) + load_part(x + i, n), n);
    }
}

// residual += x; out = norm(residual). Rows of x lie x_stride apart.
template <class T>
void add_rms_norm(Context& context, const T* x, int64_t x_stride, T* residual, const T* weight, T* out, int64_t rows,
                  int64_t size, float eps) {
    run_ranges(context, rows, kElementsPerItem / size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            add_row(x + row * x_stride, residual + row * size, size);
            rms_norm_row(residual + row * size, weight, out + row * size, size, eps);
        }
    });
}

// Turns one head in place: out_i = x_i cos_i - x_(i + half) sin_i, out_(i + half) = x_(i + half) cos_i + x_i sin_i.
template <class T>
inline void rotate_row(T* x, const T* cos, const T* sin, int half) {
    for (int i = 0; i < half; i += kLanes) {
        const int n = half - i < kLanes ? half - i : kLanes;
        const bool full = n == kLanes;
        const vf c = full ? load(cos + i) : load_part(cos + i, n), s = full ? load(sin + i) : load_part(sin + i, n);
        const vf a = full ? load(x + i) : load_part(x + i, n);
        const vf b = full ? load(x + half + i) : load_part(x + half + i, n);
        const vf first = rounded_to(a * c, x) - rounded_to(b * s, x);
        const vf second = rounded_to(b * c, x) + rounded_to(a * s, x);
        if (full) {
            store(x + i, first);
            store(x + half + i, second);
        } else {
            store_part(x + i, first, n);
            store_part(x + half + i, second, n);
        }
    }
}

// The layout of keys and of values alike, in elements: [page, token, kv head, head dim], head dim contiguous. In int8
// the scales of a page, [kv head, token] floats, begin `scales` bytes after its start.
struct PoolLayout {
    int64_t page_size, page_stride, token_stride, head_stride, scales;

    explicit PoolLayout(const Pool& p)
        : page_size(p.page_size), page_stride(p.page_stride), token_stride(p.token_stride), head_stride(p.head_stride), scales(p.scales) {}

    struct Place {
        int64_t row, scale;  // of the first KV head, in elements
    };
    Place place(int64_t slot) const {
        const int64_t page = slot / page_size * page_stride, token = slot % page_size;
        return {page + token * token_stride, page + scales + token * (int64_t)sizeof(float)};
    }
    int64_t scale_stride() const { return page_size * (int64_t)sizeof(float); }  // from a KV head to the next
};

// Puts n elements of one KV head into their place in `pool`, which holds keys or values.
template <class T>
inline void put_row(const T* x, T* pool, const PoolLayout& layout, PoolLayout::Place place, int head, int n) {
    std::memcpy(pool + place.row + head * layout.head_stride, x, n * sizeof(T));
}

template <class T>
inline void put_row(const T* x, int8_t* pool, const PoolLayout& layout, PoolLayout::Place place, int head, int n) {
    const float scale = quantize_row(x, pool + place.row + head * layout.head_stride, n);
    std::memcpy(pool + place.scale + head * layout.scale_stride(), &scale, sizeof scale);
}

template <class T, class Stored>
struct QkvRope {
    const T* qkv;  // [tokens, (heads + 2 kv heads) x head_dim]: queries, keys, values
    int64_t qkv_stride;
    const T *query_weight, *key_weight;  // [head_dim]
    float eps;
    const T *cos, *sin;  // [tokens, head_dim / 2]
    int64_t angle_stride;
    T* query;  // out, [tokens, heads, head_dim]
    Stored *keys, *values;
    PoolLayout layout;
    const int64_t* slots;
    int64_t tokens;
    int heads, kv_heads, head_dim;
};

template <class T, class Stored>
void qkv_rope_store(Context& context, const QkvRope<T, Stored>& a) {
    const int64_t row_size = (int64_t)(a.heads + 2 * a.kv_heads) * a.head_dim;
    run_ranges(context, a.tokens, kElementsPerItem / row_size, [&](int64_t begin, int64_t end) {
        std::vector<T> key(a.head_dim);
        for (int64_t t = begin; t < end; t++) {
            const T* input = a.qkv + t * a.qkv_stride;
            const T *cos = a.cos + t * a.angle_stride, *sin = a.sin + t * a.angle_stride;
            for (int h = 0; h < a.heads; h++, input += a.head_dim) {
                T* out = a.query + (t * a.heads + h) * a.head_dim;
                rms_norm_row(input, a.query_weight, out, a.head_dim, a.eps);
                rotate_row(out, cos, sin, a.head_dim / 2);
            }
            const PoolLayout::Place place = a.layout.place(a.slots[t]);
            for (int h = 0; h < a.kv_heads; h++, input += a.head_dim) {
                rms_norm_row(input, a.key_weight, key.data(), a.head_dim, a.eps);
                rotate_row(key.data(), cos, sin, a.head_dim / 2);
                put_row(key.data(), a.keys, a.layout, place, h, a.head_dim);
            }
            for (int h = 0; h < a.kv_heads; h++, input += a.head_dim)
                put_row(input, a.values, a.layout, place, h, a.head_dim);
        }
    });
}

inline vf silu(vf x) { return divide(x, splat(1.0f) + exp2(vmin(splat(126.0f), x * splat(-1.4426950409f)))); }

// silu(gate), rounded, x up.
template <class T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, rounded_to(silu(load(gate + i)), out) * load(up + i));
    if (i < size) {
        const int n = (int)(size - i);
        store_part(out + i, rounded_to(silu(load_part(gate + i, n)), out) * load_part(up + i, n), n);
    }
}

// gate, up: rows x size, rows `stride` apart; out contiguous: silu(gate), rounded, x up.
template <class T>
void silu_mul(Context& context, const T* gate, const T* up, int64_t stride, T* out, int64_t rows, int64_t size) {
    run_ranges(context, rows, kElementsPerItem / size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            silu_mul_row(gate + row * stride, up + row * stride, out + row * size, size);
    });
}

// The largest of n values, NaN if one is NaN.
template <class T>
inline float largest(const T* values, int64_t n) {
    vf best = splat(-INFINITY);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const vf v = load(values + i);
        best = select((vi)(v > best) | (vi)(v != v), v, best);
    }
    float result = best[0];
    for (int lane = 1; lane < kLanes; lane++)
        if (best[lane] > result || best[lane] != best[lane]) result = best[lane];
    for (; i < n; i++) {
        const float v = to_float(values[i]);
        if (v > result || v != v) result = v;
    }
    return result;
}

// The index of each row's largest element, the lowest on ties; a NaN counts as the largest, as torch has it.
template <class T>
void argmax(Context& context, const T* x, int64_t stride, int64_t* out, int64_t rows, int64_t size) {
    constexpr int64_t kBlock = 1024;  // only the block that holds the maximum is searched for its place
    run_ranges(context, rows, kElementsPerItem / size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* values = x + row * stride;
            float best = -INFINITY;
            int64_t at = 0;
            for (int64_t block = 0; block < size && best == best; block += kBlock) {
                const float v = largest(values + block, size - block < kBlock ? size - block : kBlock);
                if (v > best || v != v) best = v, at = block;
            }
            const bool nan = best != best;
            while (nan ? to_float(values[at]) == to_float(values[at]) : to_float(values[at]) != best) at++;
            out[row] = at;
        }
    });
}

}  // namespace vsl
