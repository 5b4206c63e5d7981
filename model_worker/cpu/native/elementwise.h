// RMSNorm, q/k norm + rotary embedding + KV store, SiLU x up, argmax. Values are fp32 inside and are rounded to the
// tensor's dtype exactly where transformers' Qwen3 rounds them, so that bf16 results agree with it.
#pragma once

#include "abi.h"
#include "kv_int8.h"
#include "parallel.h"
#include "two.h"

namespace vsl {

constexpr int64_t kElementsPerItem = 16384;  // less work than this is not worth waking another thread

// 1 / sqrt(mean(x^2) + eps)
template <class T>
inline float norm_factor(const T* x, int64_t size, float eps) {
    Two squares[2] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes)
        for (int j = 0; j < 2; j++) {
            const Two v = load_two(x + i + 2 * j * kLanes);
            squares[j] = v * v + squares[j];
        }
    for (; i < size; i += 2 * kLanes) {
        const Two v = load_two(x + i, size - i);
        squares[0] = v * v + squares[0];
    }
    const Two total = squares[0] + squares[1];
    return 1.0f / std::sqrt(sum(total.a + total.b) / (float)size + eps);
}

// residual += x, and out = the norm of that: x its factor, rounded, x weight, rounded. out may be x.
template <class T>
inline void add_rms_norm_row(const T* x, T* residual, const T* weight, T* out, int64_t size, float eps) {
    for_twos(size, [&](int64_t i, int64_t left) VSL_INLINE {
        store_two(residual + i, load_two(residual + i, left) + load_two(x + i, left), left);
    });
    const vf factor = splat(norm_factor(residual, size, eps));
    for_twos(size, [&](int64_t i, int64_t left) VSL_INLINE {
        const Two v = rounded_to(load_two(residual + i, left) * factor, out);
        store_two(out + i, load_two(weight + i, left) * v, left);
    });
}

// residual += x; out = norm(residual). Rows of x lie x_stride apart.
template <class T>
void add_rms_norm(Context& context, const T* x, int64_t x_stride, T* residual, const T* weight, T* out, int64_t rows,
                  int64_t size, float eps) {
    run_ranges(context, rows, kElementsPerItem / size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            add_rms_norm_row(x + row * x_stride, residual + row * size, weight, out + row * size, size, eps);
    });
}

// One head's norm (see add_rms_norm_row), y, turned: out_i = y_i cos_i - y_(i + half) sin_i, out_(i + half) = y_(i + half)
// cos_i + y_i sin_i.
template <class T>
inline void norm_rotate_row(const T* x, vf factor, const T* weight, const T* cos, const T* sin, T* out, int head_dim) {
    const int half = head_dim / 2;
    for_twos(half, [&](int64_t i, int64_t left) VSL_INLINE {
        const auto norm = [&](int64_t at) VSL_INLINE {
            const Two v = rounded_to(load_two(x + at, left) * factor, out);
            return rounded_to(load_two(weight + at, left) * v, out);
        };
        const Two a = norm(i), b = norm(half + i), c = load_two(cos + i, left), s = load_two(sin + i, left);
        store_two(out + i, rounded_to(a * c, out) - rounded_to(b * s, out), left);
        store_two(out + half + i, rounded_to(b * c, out) + rounded_to(a * s, out), left);
    });
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
        std::vector<float> factors(a.heads + a.kv_heads);  // all first: one after another they would wait for each other
        for (int64_t t = begin; t < end; t++) {
            const T* input = a.qkv + t * a.qkv_stride;
            const T *cos = a.cos + t * a.angle_stride, *sin = a.sin + t * a.angle_stride;
            for (size_t h = 0; h < factors.size(); h++)
                factors[h] = norm_factor(input + h * a.head_dim, a.head_dim, a.eps);
            for (int h = 0; h < a.heads; h++, input += a.head_dim) {
                T* out = a.query + (t * a.heads + h) * a.head_dim;
                norm_rotate_row(input, splat(factors[h]), a.query_weight, cos, sin, out, a.head_dim);
            }
            const PoolLayout::Place place = a.layout.place(a.slots[t]);
            for (int h = 0; h < a.kv_heads; h++, input += a.head_dim) {
                norm_rotate_row(input, splat(factors[a.heads + h]), a.key_weight, cos, sin, key.data(), a.head_dim);
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
    for_twos(size, [&](int64_t i, int64_t left) VSL_INLINE {
        const Two g = load_two(gate + i, left);
        store_two(out + i, rounded_to(Two{silu(g.a), silu(g.b)}, out) * load_two(up + i, left), left);
    });
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
