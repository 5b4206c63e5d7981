// The C interface of the CPU kernels (abi.h). model_worker/cpu/api.py is its caller and checks the arguments.
#include "abi.h"
#include "pack.h"
#include "program.h"

using namespace vsl;

namespace {

template <class F>
void with_dtype(int64_t dtype, const F& f) {
    if (dtype == 1)
        f(bf16{});
    else
        f(0.0f);
}

// As with_dtype, and with the type of what the KV pool holds.
template <class F>
void with_dtypes(int64_t dtype, const Pool& pool, const F& f) {
    with_dtype(dtype, [&](auto type) {
        if (pool.scales != 0)
            f(type, int8_t{});
        else
            f(type, type);
    });
}

}  // namespace

extern "C" {

Context* vsl_create(void* parallel, int threads) {
    Context* context = new Context;
    context->parallel = (ParallelFn)parallel;
    context->threads = parallel == nullptr ? 1 : threads;
    context->amx = request_amx();
    context->scratch = std::vector<Scratch>(context->threads);
    context->gates = std::vector<Scratch>(context->threads);
    return context;
}

void vsl_destroy(Context* context) { delete context; }

void vsl_fix_order(Context* context) { context->fixed_order = true; }

// What is used of the CPU, as model_worker/cpu/targets.py names it.
const char* vsl_instruction_set(Context* context) {
    if (context->amx) return "amx";
#if defined(VSL_AVX512_BF16)
    return "avx512_bf16";
#elif defined(VSL_AVX512)
    return "avx512";
#elif defined(VSL_AVX_VNNI)
    return "avx_vnni";
#elif defined(VSL_AVX2)
    return "avx2";
#elif defined(VSL_NEON_BF16)
    return "neon_bf16";
#elif defined(VSL_NEON_DOT)
    return "neon_dotprod";
#elif defined(VSL_NEON)
    return "neon";
#else
    return "baseline";
#endif
}

void vsl_paged_attention(Context* context, const PagedAttentionCall* c) {
    with_dtypes(c->dtype, c->pool, [&](auto type, auto stored) {
        using T = decltype(type);
        using Stored = decltype(stored);
        const AttentionArgs<T, Stored> args{
            (const T*)c->query, c->query_stride, (const Stored*)c->pool.keys, (const Stored*)c->pool.values,
            PoolLayout(c->pool), c->query_start, c->context_lengths, c->page_table, c->page_table_stride, (int)c->rows,
            (int)c->heads, (int)c->kv_heads, (int)c->head_dim, c->scale, (T*)c->out,
            c->heads * c->head_dim};
        PagedAttention<T, Stored>(*context, args).run();
    });
}

void vsl_add_rms_norm(Context* context, const AddRmsNormCall* c) {
    with_dtype(c->dtype, [&](auto type) {
        using T = decltype(type);
        add_rms_norm(*context, (const T*)c->x, c->x_stride, (T*)c->residual, (const T*)c->weight, (T*)c->out, c->rows,
                 c->size, c->eps);
    });
}

void vsl_qkv_rope_store(Context* context, const QkvRopeStoreCall* c) {
    with_dtypes(c->dtype, c->pool, [&](auto type, auto stored) {
        using T = decltype(type);
        using Stored = decltype(stored);
        qkv_rope_store(*context,
                       QkvRope<T, Stored>{(const T*)c->qkv, c->qkv_stride, (const T*)c->query_weight,
                                          (const T*)c->key_weight, c->eps, (const T*)c->cos, (const T*)c->sin,
                                          c->angle_stride, (T*)c->query, (Stored*)c->pool.keys, (Stored*)c->pool.values,
                                          PoolLayout(c->pool), c->slots, c->tokens, (int)c->heads, (int)c->kv_heads,
                                          (int)c->head_dim});
    });
}

void vsl_silu_mul(Context* context, const SiluMulCall* c) {
    with_dtype(c->dtype, [&](auto type) {
        using T = decltype(type);
        silu_mul(*context, (const T*)c->gate, (const T*)c->up, c->stride, (T*)c->out, c->rows, c->size);
    });
}

void vsl_argmax(Context* context, const ArgmaxCall* c) {
    with_dtype(c->dtype, [&](auto type) {
        argmax(*context, (const decltype(type)*)c->x, c->stride, c->out, c->rows, c->size);
    });
}

void vsl_linear(Context* context, const LinearCall* c) {
    if (c->rows == 0) return;  // of a rank without tokens in all-to-all
    with_dtype(c->dtype, [&](auto type) {
        using T = decltype(type);
        run_linear(*context, linear_of(c->matrix, (const T*)c->x, c->x_stride, c->rows, (T*)c->out));
    });
}

void vsl_pack(Context* context, const PackCall* c) {
    with_dtype(c->dtype, [&](auto type) {
        const auto* const source = (const decltype(type)*)c->source;
        const Matrix& into = c->into;
        if (into.format == kInt8)
            pack_int8(*context, source, into.outputs, into.inputs, (uint8_t*)into.weights, (float*)into.scales);
        else
            pack_int4(*context, source, into.outputs, into.inputs, (uint8_t*)into.weights);
    });
}

void vsl_run_program(Context* context, const RunProgramCall* c) {
    with_dtypes(c->dtype, c->pool, [&](auto type, auto stored) {
        Program<decltype(type), decltype(stored)>(*context, *c).run();
    });
}

void vsl_sum_ranks(Context* context, const SumRanksCall* c) {
    with_dtype(c->dtype, [&](auto type) { sum_ranks(*context, c->ranks, (decltype(type)*)c->x, c->count); });
}

void vsl_gather_ranks(Context*, const GatherRanksCall* c) { gather_ranks(c->ranks, c->x, c->bytes, (char*)c->out); }

void vsl_gather_rows(Context* context, const GatherRowsCall* c) {
    gather_rows(*context, (const uint32_t*)c->weights, c->scales, c->units, c->ids, c->count, c->out);
}

}  // extern "C"
