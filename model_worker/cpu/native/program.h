// Runs the operations of one or many blocks of layers in one call, on threads that stay together: between two of them
// there is nothing but a word that the threads share. What the operations are, and in which order, comes from outside
// (model_worker/cpu/program.py makes it of the model's own description); they are those of the other calls.
#pragma once

#include <chrono>

#include "abi.h"
#include "attention.h"
#include "experts.h"
#include "linear_run.h"
#include "ranks.h"

namespace vsl {

// program.py numbers them alike.
enum OperationKind {
    kAddNorm = 0, kProduct = 1, kGatedProduct = 2, kRopeStore = 3, kAttend = 4, kSumRanks = 5, kRoute = 6, kExperts = 7
};
enum Target { kUpdate = 0, kQkv = 1 };  // of a product

template <class T>
Linear<T> linear_of(const Matrix& matrix, const T* x, int64_t x_stride, int64_t rows, T* out) {
    return {(int)matrix.format, (const uint8_t*)matrix.weights, (const float*)matrix.scales, matrix.inputs,
            matrix.outputs, x, x_stride, rows, out, matrix.outputs};
}

template <class T, class Stored>
class Program {
   public:
    Program(Context& context, const RunProgramCall& call)
        : context_(context), c_(call), inner_(call.heads * call.head_dim), qkv_size_(inner_ + 2 * call.kv_heads * call.head_dim) {
        int64_t gate_size = 0, scores = 0, choices = 0;
        for (int64_t i = 0; i < c_.count; i++) {
            const Operation& operation = c_.operations[i];
            if (operation.kind == kGatedProduct) gate_size = std::max(gate_size, operation.matrix.outputs / 2);
            if (operation.kind == kRoute)
                scores = std::max(scores, operation.matrix.outputs), choices = std::max(choices, operation.experts->top_k);
        }
        // Rows that lie a multiple of 4 KiB apart would share a few places of the first-level cache.
        attended_stride_ = inner_ + 64 / (int64_t)sizeof(T), gated_stride_ = gate_size + 64 / (int64_t)sizeof(T);
        // What one operation leaves for the next has a place of its own each: writing over what another core has just
        // read takes longer than writing elsewhere.
        const auto room = [&](int64_t size) { return (c_.tokens * size * (int64_t)sizeof(T) + 63) / 64 * 64 / (int64_t)sizeof(T); };
        qkv_ = (T*)context.activations.reserve(
            sizeof(T) * (room(qkv_size_) + room(inner_) + room(attended_stride_) + room(gated_stride_) + room(scores) + room(choices)) +
            sizeof(int64_t) * c_.tokens * choices);
        query_ = qkv_ + room(qkv_size_);
        attended_ = query_ + room(inner_);
        gated_ = attended_ + room(attended_stride_);
        scores_ = gated_ + room(gated_stride_);
        weights_ = scores_ + room(scores);
        ids_ = (int64_t*)(weights_ + room(choices));
    }

    void run() {
        run_together(context_, [&] {
            double last = c_.seconds == nullptr ? 0 : now();
            for (int64_t i = 0; i < c_.count; i++) {
                run(c_.operations[i]);
                if (c_.seconds == nullptr) continue;
                const double time = now();
                c_.seconds[i] = time - last, last = time;
            }
        });
    }

   private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    void run(const Operation& operation) {
        T* const update = (T*)c_.update;
        PoolLayout layout(c_.pool);
        switch (operation.kind) {
            case kAddNorm:
                add_rms_norm(context_, update, c_.hidden, (T*)c_.residual, (const T*)operation.weight, update, c_.tokens,
                             c_.hidden, c_.eps);
                return hand_on(update, c_.hidden);
            case kProduct: {
                T* const out = operation.target == kQkv ? qkv_ : update;
                run_linear(context_, linear_of(operation.matrix, x_, stride_, c_.tokens, out));
                return hand_on(out, operation.matrix.outputs);
            }
            case kGatedProduct: {
                Linear<T> linear = linear_of(operation.matrix, x_, stride_, c_.tokens, gated_);
                linear.gated = true, linear.out_stride = gated_stride_;
                run_linear(context_, linear);
                return hand_on(gated_, gated_stride_);
            }
            case kRopeStore:
                qkv_rope_store(context_, QkvRope<T, Stored>{x_, stride_, (const T*)operation.weight,
                                                            (const T*)operation.second_weight, c_.eps, (const T*)c_.cos,
                                                            (const T*)c_.sin, c_.angle_stride, query_,
                                                            (Stored*)operation.keys, (Stored*)operation.values, layout,
                                                            c_.slots, c_.tokens, (int)c_.heads, (int)c_.kv_heads,
                                                            (int)c_.head_dim});
                return hand_on(query_, inner_);
            case kAttend: {
                const AttentionArgs<T, Stored> args{
                    x_, stride_, (const Stored*)operation.keys, (const Stored*)operation.values, layout, c_.query_start,
                    c_.context_lengths, c_.page_table, c_.page_table_stride, (int)c_.rows, (int)c_.heads,
                    (int)c_.kv_heads, (int)c_.head_dim, c_.scale, attended_, attended_stride_};
                PagedAttention<T, Stored>(context_, args).run();
                return hand_on(attended_, attended_stride_);
            }
            case kSumRanks:
                return sum_ranks(context_, c_.ranks, update, c_.tokens * c_.hidden);
            case kRoute: {
                const int64_t scores = operation.matrix.outputs, top_k = operation.experts->top_k;
                run_linear(context_, linear_of(operation.matrix, x_, stride_, c_.tokens, scores_));
                return run_ranges(context_, c_.tokens, kElementsPerItem / scores, [&](int64_t begin, int64_t end) {
                    for (int64_t token = begin; token < end; token++)
                        choose_experts(scores_ + token * scores, scores, top_k, operation.experts->normalize != 0,
                                       ids_ + token * top_k, weights_ + token * top_k);
                });
            }
            case kExperts:
                ExpertLayer<T>(context_, *operation.experts, {ids_, weights_, x_, stride_, c_.tokens, c_.hidden, update}).run();
                return hand_on(update, c_.hidden);
        }
    }

    // What the next operation reads.
    void hand_on(const T* x, int64_t stride) { x_ = x, stride_ = stride; }

    Context& context_;
    const RunProgramCall& c_;
    const int64_t inner_, qkv_size_;
    int64_t attended_stride_, gated_stride_;
    T *qkv_, *query_, *attended_, *gated_, *scores_, *weights_;
    int64_t* ids_;
    const T* x_ = nullptr;
    int64_t stride_ = 0;
};

}  // namespace vsl
