// The C interface of the CPU kernels; model_worker/cpu/api.py is its only caller and checks the arguments.
// `dtype` is 0 for float32 and 1 for bfloat16. Strides are in elements. Keys and values are of `dtype` too, or, where
// `scales` is not 0, int8 with scales that begin so many bytes after each page's start (kv_int8.h).
#include "attention.h"
#include "elementwise.h"
#include "layers.h"
#include "pack.h"

using namespace vsl;

namespace {

template <class F>
void with_dtype(int dtype, const F& f) {
    if (dtype == 1)
        f((bf16*)nullptr);
    else
        f((float*)nullptr);
}

// As with_dtype, and with the type of what the KV pool holds.
template <class F>
void with_dtypes(int dtype, int64_t scales, const F& f) {
    with_dtype(dtype, [&](auto* type) {
        if (scales != 0)
            f(type, (int8_t*)nullptr);
        else
            f(type, type);
    });
}

}  // namespace

extern "C" {

void* vsl_create(void* parallel, int threads) {
    Context* context = new Context;
    context->parallel = (ParallelFn)parallel;
    context->threads = parallel == nullptr ? 1 : threads;
    context->amx = request_amx();
    context->scratch = std::vector<Scratch>(context->threads);
    context->gates = std::vector<Scratch>(context->threads);
    return context;
}

void vsl_destroy(void* context) { delete (Context*)context; }

// What is used of the CPU, as model_worker/cpu/targets.py names it.
const char* vsl_instruction_set(void* context) {
    if (((Context*)context)->amx) return "amx";
#if defined(VSL_AVX512_BF16)
    return "avx512_bf16";
#elif defined(VSL_AVX512)
    return "avx512";
#elif defined(VSL_AVX_VNNI)
    return "avx_vnni";
#elif defined(VSL_AVX2)
    return "avx2";
#else
    return "baseline";
#endif
}

void vsl_paged_attention(void* context, int dtype, const void* query, int64_t query_stride, const void* keys,
                         const void* values, int64_t page_size, int64_t page_stride, int64_t token_stride,
                         int64_t head_stride, int64_t scales, const int32_t* query_start, const int32_t* context_lengths,
                         const int32_t* page_table, int64_t page_table_stride, int rows, int heads, int kv_heads,
                         int head_dim, float scale, int64_t split_tokens, void* out) {
    with_dtypes(dtype, scales, [&](auto* type, auto* stored) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Stored = std::remove_pointer_t<decltype(stored)>;
        const AttentionArgs<T, Stored> args{
            (const T*)query, query_stride, (const Stored*)keys, (const Stored*)values,
            PoolLayout{page_size, page_stride, token_stride, head_stride, scales}, query_start, context_lengths,
            page_table, page_table_stride, rows, heads, kv_heads, head_dim, scale, split_tokens, (T*)out, (int64_t)heads * head_dim};
        PagedAttention<T, Stored>(*(Context*)context, args).run();
    });
}

void vsl_store_kv(void* context, int dtype, const void* key, int64_t key_token, int64_t key_head, const void* value,
                  int64_t value_token, int64_t value_head, void* keys, void* values, int64_t page_size,
                  int64_t page_stride, int64_t token_stride, int64_t head_stride, int64_t scales, const int64_t* slots,
                  int64_t tokens, int kv_heads, int head_dim) {
    with_dtypes(dtype, scales, [&](auto* type, auto* stored) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Stored = std::remove_pointer_t<decltype(stored)>;
        store_kv(*(Context*)context, (const T*)key, key_token, key_head, (const T*)value, value_token, value_head,
                 (Stored*)keys, (Stored*)values, PoolLayout{page_size, page_stride, token_stride, head_stride, scales},
                 slots, tokens, kv_heads, head_dim);
    });
}

void vsl_rms_norm(void* context, int dtype, const void* x, int64_t x_stride, void* residual, const void* weight,
                  void* out, int64_t rows, int64_t size, float eps) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rms_norm(*(Context*)context, (const T*)x, x_stride, (T*)residual, (const T*)weight, (T*)out, rows, size, eps);
    });
}

void vsl_qkv_rope_store(void* context, int dtype, const void* qkv, int64_t qkv_stride, const void* query_weight,
                        const void* key_weight, float eps, const void* cos, const void* sin, int64_t angle_stride,
                        void* query, void* keys, void* values, int64_t page_size, int64_t page_stride,
                        int64_t token_stride, int64_t head_stride, int64_t scales, const int64_t* slots, int64_t tokens,
                        int heads, int kv_heads, int head_dim) {
    with_dtypes(dtype, scales, [&](auto* type, auto* stored) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Stored = std::remove_pointer_t<decltype(stored)>;
        qkv_rope_store(*(Context*)context,
                       QkvRope<T, Stored>{(const T*)qkv, qkv_stride, (const T*)query_weight, (const T*)key_weight, eps,
                                          (const T*)cos, (const T*)sin, angle_stride, (T*)query, (Stored*)keys,
                                          (Stored*)values,
                                          PoolLayout{page_size, page_stride, token_stride, head_stride, scales}, slots,
                                          tokens, heads, kv_heads, head_dim});
    });
}

void vsl_silu_mul(void* context, int dtype, const void* gate, const void* up, int64_t stride, void* out, int64_t rows,
                  int64_t size) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        silu_mul(*(Context*)context, (const T*)gate, (const T*)up, stride, (T*)out, rows, size);
    });
}

void vsl_argmax(void* context, int dtype, const void* x, int64_t stride, int64_t* out, int64_t rows, int64_t size) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        argmax(*(Context*)context, (const T*)x, stride, out, rows, size);
    });
}

void vsl_linear(void* context, int dtype, int format, const void* weights, const float* scales, int64_t inputs,
                int64_t outputs, const void* x, int64_t x_stride, int64_t rows, void* out) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run_linear(*(Context*)context, Linear<T>{format, (const uint8_t*)weights, scales, inputs, outputs, (const T*)x,
                                                 x_stride, rows, (T*)out, outputs});
    });
}

// matrix: [outputs, inputs], contiguous.
void vsl_pack_int8(void* context, int dtype, const void* matrix, int64_t outputs, int64_t inputs, void* weights,
                   float* scales) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pack_int8(*(Context*)context, (const T*)matrix, outputs, inputs, (uint8_t*)weights, scales);
    });
}

void vsl_pack_int4(void* context, int dtype, const void* matrix, int64_t outputs, int64_t inputs, void* weights) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pack_int4(*(Context*)context, (const T*)matrix, outputs, inputs, (uint8_t*)weights);
    });
}

void vsl_decoder_layers(void* context, int dtype, const DecoderLayers* layers, const DecoderStep* step) {
    with_dtypes(dtype, layers->pool.scales, [&](auto* type, auto* stored) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Stored = std::remove_pointer_t<decltype(stored)>;
        run_decoder_layers<T, Stored>(*(Context*)context, *layers, *step);
    });
}

void vsl_gather_rows(void* context, const void* weights, int64_t units, const int64_t* ids, int64_t count, void* out) {
    gather_rows(*(Context*)context, (const uint32_t*)weights, units, ids, count, (uint32_t*)out);
}

}  // extern "C"
