// What Python hands to the kernels: one structure for each function, `void vsl_NAME(Context*, const NAMECall*)` with the
// name in lower case. model_worker/cpu/library.py reads this file and makes the same structures of it; a compiled
// object tells their sizes and offsets, which are compared when it is loaded. Only pointers, int64_t, float and structures.
//
// dtype is 0 for float32 and 1 for bfloat16. Strides are in elements. api.py describes shapes and checks them.
#pragma once

#include <cstdint>

namespace vsl {

// One layer's keys and values: of the model's dtype or, where `scales` is not 0, int8 with scales that begin so many
// bytes after each page's start (kv_int8.h).
struct Pool {
    void *keys, *values;
    int64_t page_size, page_stride, token_stride, head_stride, scales;
};

// linear.h draws the formats.
struct Matrix {
    const void *weights, *scales;
    int64_t inputs, outputs, format;
};

// Where the ranks of one machine meet: ranks.h.
struct Ranks {
    void* memory;
    int64_t rank, size, capacity;
};

struct PagedAttentionCall {
    int64_t dtype;
    const void* query;
    int64_t query_stride;
    Pool pool;
    const int32_t *query_start, *context_lengths, *page_table;
    int64_t page_table_stride, rows, heads, kv_heads, head_dim;
    float scale;
    void* out;
};

struct AddRmsNormCall {
    int64_t dtype;
    const void* x;
    int64_t x_stride;
    void* residual;
    const void* weight;
    void* out;
    int64_t rows, size;
    float eps;
};

struct QkvRopeStoreCall {
    int64_t dtype;
    const void* qkv;
    int64_t qkv_stride;
    const void *query_weight, *key_weight;
    float eps;
    const void *cos, *sin;
    int64_t angle_stride;
    void* query;
    Pool pool;
    const int64_t* slots;
    int64_t tokens, heads, kv_heads, head_dim;
};

struct SiluMulCall {
    int64_t dtype;
    const void *gate, *up;
    int64_t stride;
    void* out;
    int64_t rows, size;
};

struct ArgmaxCall {
    int64_t dtype;
    const void* x;
    int64_t stride;
    int64_t* out;
    int64_t rows, size;
};

struct LinearCall {
    int64_t dtype;
    Matrix matrix;
    const void* x;
    int64_t x_stride, rows;
    void* out;
};

// Quantises a contiguous [outputs, inputs] matrix into `into`, int8 or int4.
struct PackCall {
    int64_t dtype;
    const void* source;
    Matrix into;
};

// scales: of int8, whose rows come in fp32.
struct GatherRowsCall {
    const void* weights;
    const float* scales;
    int64_t units;
    const int64_t* ids;
    int64_t count;
    void* out;
};

// x becomes the sum over the ranks.
struct SumRanksCall {
    int64_t dtype;
    Ranks ranks;
    void* x;
    int64_t count;
};

struct GatherRanksCall {
    Ranks ranks;
    const void* x;
    int64_t bytes;
    void* out;
};

// A layer's experts that are here, `count` from number `first` on, each with a matrix of gate and up and one of down. width: of
// an expert's inner vectors. normalize: whether a token's top_k weights add up to 1.
struct Experts {
    const Matrix *gate_up, *down;
    int64_t count, first, top_k, width, normalize;
};

// One step of a program (program.h).
struct Operation {
    int64_t kind, target;  // target: where a product goes
    Matrix matrix;
    const void *weight, *second_weight;  // of norms
    void *keys, *values;
    const Experts* experts;
};

struct RunProgramCall {
    int64_t dtype;
    const Operation* operations;
    int64_t count;
    // Of the model.
    int64_t hidden, heads, kv_heads, head_dim;
    float scale, eps;
    Pool pool;  // the layout; keys and values are the operations'
    Ranks ranks;
    // Of the step.
    int64_t tokens, rows;
    void *update, *residual;  // [tokens, hidden]: in, the last block's output and the sum of those before; out, the same
    const void *cos, *sin;    // [tokens, head_dim / 2], rows angle_stride apart
    int64_t angle_stride;
    const int64_t* slots;  // [tokens]
    const int32_t *query_start, *context_lengths, *page_table;
    int64_t page_table_stride;
    double* seconds;  // [count], of each operation; null: not wanted
};

}  // namespace vsl
