// All decoder layers of a dense model in one call, on threads that stay together: between two of the operations there is
// nothing but a word that the threads share. The operations are those of the other calls.
#pragma once

#include <chrono>

#include "attention.h"
#include "linear_run.h"

namespace vsl {

// model_worker/cpu/layers.py has the same structures.
struct MatrixPlace {
    const uint8_t* weights;
    const float* scales;
    int64_t inputs, outputs, format;
};

struct LayerPlace {
    MatrixPlace qkv, output, gate_up, down;
    const void *attention_norm, *query_norm, *key_norm, *feed_forward_norm;
    void *keys, *values;
};

struct DecoderLayers {
    const LayerPlace* layers;
    int64_t count, hidden, heads, kv_heads, head_dim;
    PoolLayout pool;
    int64_t split_tokens;  // as vsl_paged_attention's
    float scale, eps;
};

struct DecoderStep {
    int64_t tokens, rows;
    void *update, *residual;  // [tokens, hidden]: in, the embedding and zeros; out, what the last layer adds, and the sum
    const void *cos, *sin;    // [tokens, head_dim / 2], rows angle_stride apart
    int64_t angle_stride;
    const int64_t* slots;  // [tokens]
    const int32_t *query_start, *context_lengths, *page_table;
    int64_t page_table_stride;
    double* seconds;  // [layers][kLayerParts], of each part; null: not wanted
};

constexpr int kLayerParts = 8;  // norm, qkv, rope, attention, output, norm, gate and up, down

template <class T>
Linear<T> linear_of(const MatrixPlace& matrix, const T* x, int64_t x_stride, int64_t rows, T* out) {
    return {(int)matrix.format, matrix.weights, matrix.scales, matrix.inputs, matrix.outputs,
            x,                  x_stride,       rows,          out,           matrix.outputs};
}

// Notes how long each of the parts takes that follow each other.
class PartClock {
   public:
    explicit PartClock(double* seconds) : seconds_(seconds) {
        if (seconds_ != nullptr) last_ = now();
    }
    void done() {
        if (seconds_ == nullptr) return;
        const double time = now();
        *seconds_++ = time - last_;
        last_ = time;
    }

   private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
    double* seconds_;
    double last_ = 0;
};

template <class T, class Stored>
void run_decoder_layers(Context& context, const DecoderLayers& model, const DecoderStep& step) {
    const int64_t tokens = step.tokens, inner = model.heads * model.head_dim;
    const int64_t qkv_size = inner + 2 * model.kv_heads * model.head_dim;
    const int64_t gate_size = model.layers[0].gate_up.outputs / 2;
    T* const update = (T*)step.update;
    T* const residual = (T*)step.residual;
    // Rows that lie a multiple of 4 KiB apart would share a few places of the first-level cache.
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t attended_stride = inner + kLine, gated_stride = gate_size + kLine;
    // What one operation leaves for the next has a place of its own each: writing over what another core has just read
    // takes longer than writing elsewhere.
    const auto room = [&](int64_t size) { return (tokens * size * (int64_t)sizeof(T) + 63) / 64 * 64 / (int64_t)sizeof(T); };
    T* const qkv = (T*)context.activations.reserve(
        sizeof(T) * (room(qkv_size) + room(inner) + room(attended_stride) + room(gated_stride)));
    T* const query = qkv + room(qkv_size);
    T* const attended = query + room(inner);
    T* const gated = attended + room(attended_stride);
    PartClock clock(step.seconds);
    run_together(context, [&] {
        for (int64_t i = 0; i < model.count; i++) {
            const LayerPlace& layer = model.layers[i];
            rms_norm(context, update, model.hidden, residual, (const T*)layer.attention_norm, update, tokens,
                     model.hidden, model.eps);
            clock.done();
            run_linear(context, linear_of(layer.qkv, update, model.hidden, tokens, qkv));
            clock.done();
            qkv_rope_store(context,
                           QkvRope<T, Stored>{qkv, qkv_size, (const T*)layer.query_norm, (const T*)layer.key_norm,
                                              model.eps, (const T*)step.cos, (const T*)step.sin, step.angle_stride,
                                              query, (Stored*)layer.keys, (Stored*)layer.values, model.pool,
                                              step.slots, tokens, (int)model.heads, (int)model.kv_heads,
                                              (int)model.head_dim});
            clock.done();
            const AttentionArgs<T, Stored> attention{
                query, inner, (const Stored*)layer.keys, (const Stored*)layer.values, model.pool, step.query_start,
                step.context_lengths, step.page_table, step.page_table_stride, (int)step.rows, (int)model.heads,
                (int)model.kv_heads, (int)model.head_dim, model.scale, model.split_tokens, attended,
                attended_stride};
            PagedAttention<T, Stored>(context, attention).run();
            clock.done();
            run_linear(context, linear_of(layer.output, attended, attended_stride, tokens, update));
            clock.done();
            rms_norm(context, update, model.hidden, residual, (const T*)layer.feed_forward_norm, update, tokens,
                     model.hidden, model.eps);
            clock.done();
            Linear<T> gate_up = linear_of(layer.gate_up, update, model.hidden, tokens, gated);
            gate_up.gated = true, gate_up.out_stride = gated_stride;
            run_linear(context, gate_up);
            clock.done();
            run_linear(context, linear_of(layer.down, gated, gated_stride, tokens, update));
            clock.done();
        }
    });
}

}  // namespace vsl
