// One layer's experts over the tokens that chose them, in one call: a SwiGLU feed-forward each, their outputs added with
// the router's weights. Rows are brought together by expert, so that each expert that has any is two products.
#pragma once

#include "abi.h"
#include "linear_run.h"

namespace vsl {

// out = the sum over a token's experts, in the router's order and in fp32, of weight x output; experts that are not
// here count as zero.
template <class T>
class ExpertLayer {
   public:
    ExpertLayer(Context& context, const ExpertsCall& call) : context_(context), c_(call) {
        sort_pairs();
        // Rows a multiple of 4 KiB apart would share a few places of the first-level cache.
        constexpr int64_t kGap = 64 / (int64_t)sizeof(T);
        x_stride_ = c_.hidden + kGap, inner_stride_ = c_.width + kGap, out_stride_ = c_.hidden + kGap;
        const int64_t rows = (int64_t)pairs_.size();
        x_ = (T*)context.activations.reserve(sizeof(T) * rows * (x_stride_ + inner_stride_ + out_stride_));
        inner_ = x_ + rows * x_stride_, out_ = inner_ + rows * inner_stride_;
    }

    void run() {
        run_together(context_, [&] {
            gather();
            for (int64_t expert = 0; expert < c_.experts; expert++)
                if (starts_[expert + 1] > starts_[expert]) run_expert(expert);
            combine();
        });
    }

   private:
    // pairs_: (token x top_k + choice) by expert, then by number. row_: where each pair is among them, or -1.
    void sort_pairs() {
        const int64_t count = c_.tokens * c_.top_k;
        starts_.assign(c_.experts + 1, 0), row_.assign(count, -1);
        for (int64_t pair = 0; pair < count; pair++)
            if (is_here(c_.ids[pair])) starts_[c_.ids[pair] - c_.first + 1]++;
        for (int64_t expert = 0; expert < c_.experts; expert++) starts_[expert + 1] += starts_[expert];
        pairs_.resize(starts_[c_.experts]);
        std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
        for (int64_t pair = 0; pair < count; pair++) {
            if (!is_here(c_.ids[pair])) continue;
            row_[pair] = next[c_.ids[pair] - c_.first]++;
            pairs_[row_[pair]] = pair;
        }
    }

    bool is_here(int64_t id) const { return id >= c_.first && id < c_.first + c_.experts; }

    void gather() {
        run_ranges(context_, (int64_t)pairs_.size(), kBytesPerItem / (c_.hidden * (int64_t)sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                       for (int64_t row = begin; row < end; row++)
                           std::memcpy(x_ + row * x_stride_, (const T*)c_.x + pairs_[row] / c_.top_k * c_.hidden,
                                       sizeof(T) * c_.hidden);
                   });
    }

    void run_expert(int64_t expert) {
        const int64_t start = starts_[expert], rows = starts_[expert + 1] - start;
        multiply(c_.gate_up[expert], x_ + start * x_stride_, x_stride_, inner_ + start * inner_stride_, inner_stride_,
                 rows, true);
        multiply(c_.down[expert], inner_ + start * inner_stride_, inner_stride_, out_ + start * out_stride_, out_stride_,
                 rows, false);
    }

    void multiply(const Matrix& matrix, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
                  bool gated) {
        run_linear(context_, Linear<T>{(int)matrix.format, (const uint8_t*)matrix.weights, (const float*)matrix.scales,
                                       matrix.inputs, matrix.outputs, x, x_stride, rows, out, out_stride, gated});
    }

    void combine() {
        run_ranges(context_, c_.tokens, kBytesPerItem / (c_.top_k * c_.hidden * (int64_t)sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                       for (int64_t token = begin; token < end; token++) combine(token);
                   });
    }

    void combine(int64_t token) {
        const int64_t* const rows = row_.data() + token * c_.top_k;
        const T* const weights = (const T*)c_.weights + token * c_.top_k;
        T* const out = (T*)c_.out + token * c_.hidden;
        for (int64_t i = 0; i < c_.hidden; i += kLanes) {
            const int part = (int)std::min<int64_t>(kLanes, c_.hidden - i);
            vf sum{};
            for (int64_t choice = 0; choice < c_.top_k; choice++) {
                if (rows[choice] < 0) continue;
                const T* const output = out_ + rows[choice] * out_stride_ + i;
                const vf value = part == kLanes ? load(output) : load_part(output, part);
                sum += splat(to_float(weights[choice])) * value;
            }
            if (part == kLanes)
                store(out + i, sum);
            else
                store_part(out + i, sum, part);
        }
    }

    static constexpr int64_t kBytesPerItem = 1 << 15;  // less is not worth waking another thread

    Context& context_;
    const ExpertsCall& c_;
    std::vector<int64_t> starts_, pairs_, row_;
    int64_t x_stride_, inner_stride_, out_stride_;
    T *x_, *inner_, *out_;
};

}  // namespace vsl
