// One layer's experts over the tokens that chose them: a SwiGLU feed-forward each, their outputs added with the router's
// weights. Rows are brought together by expert, and all experts' slabs are one list for the threads: they wait for each other
// between the two products of a layer, not between experts.
#pragma once

#include "abi.h"
#include "linear_run.h"

namespace vsl {

// The most likely of `count` experts, the largest score first and the lower number of two alike, and their weights: softmax
// over all experts or, with `normalize`, over these. A score that is not a number counts as the largest.
template <class T>
inline void choose_experts(const T* scores, int64_t count, int64_t top_k, bool normalize, int64_t* ids, T* weights) {
    const auto score = [&](int64_t id) {
        const float value = to_float(scores[id]);
        return value == value ? value : INFINITY;
    };
    for (int64_t id = 0, known = 0; id < count; id++) {
        int64_t place = known;
        while (place > 0 && score(ids[place - 1]) < score(id)) place--;
        if (place == top_k) continue;
        known = std::min(known + 1, top_k);
        for (int64_t i = known - 1; i > place; i--) ids[i] = ids[i - 1];
        ids[place] = id;
    }
    const float most = to_float(scores[ids[0]]);
    const auto exponential = [&](int64_t id) { return std::exp(to_float(scores[id]) - most); };
    float sum = 0;
    for (int64_t i = 0; i < (normalize ? top_k : count); i++) sum += exponential(normalize ? ids[i] : i);
    for (int64_t i = 0; i < top_k; i++) store_part(weights + i, splat(exponential(ids[i]) / sum), 1);
}

// ids, weights: [tokens, top_k]; x, out: [tokens, hidden]. out = the sum over a token's experts, in the router's order and in
// fp32, of weight x output; experts that are not here count as zero.
template <class T>
struct ExpertRows {
    const int64_t* ids;
    const T *weights, *x;
    int64_t x_stride, tokens, hidden;
    T* out;
};

template <class T>
class ExpertLayer {
   public:
    ExpertLayer(Context& context, const Experts& experts, const ExpertRows<T>& rows)
        : context_(context), e_(experts), r_(rows), alone_(rows.tokens == 1) {
        sort_pairs();
        // Rows a multiple of 4 KiB apart would share a few places of the first-level cache.
        constexpr int64_t kGap = 64 / (int64_t)sizeof(T);
        stride_ = r_.hidden + kGap, inner_stride_ = e_.width + kGap;
        const int64_t pairs = (int64_t)pairs_.size();
        rows_ = (T*)context.pairs.reserve(sizeof(T) * pairs * (stride_ + inner_stride_));
        inner_ = rows_ + pairs * stride_;
    }

    void run() {
        // Of one token, all experts read the same row.
        if (!alone_) gather();
        multiply(e_.gate_up, alone_ ? r_.x : rows_, alone_ ? r_.x_stride : stride_, inner_, inner_stride_, alone_, true);
        multiply(e_.down, inner_, inner_stride_, rows_, stride_, false, false);
        combine();
    }

   private:
    // pairs_: (token x top_k + choice) by expert, then by number. row_: where each pair is among them, or -1.
    void sort_pairs() {
        const int64_t count = r_.tokens * e_.top_k;
        starts_.assign(e_.count + 1, 0), row_.assign(count, -1);
        for (int64_t pair = 0; pair < count; pair++)
            if (is_here(r_.ids[pair])) starts_[r_.ids[pair] - e_.first + 1]++;
        for (int64_t expert = 0; expert < e_.count; expert++) starts_[expert + 1] += starts_[expert];
        pairs_.resize(starts_[e_.count]);
        std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
        for (int64_t pair = 0; pair < count; pair++) {
            if (!is_here(r_.ids[pair])) continue;
            row_[pair] = next[r_.ids[pair] - e_.first]++;
            pairs_[row_[pair]] = pair;
        }
    }

    bool is_here(int64_t id) const { return id >= e_.first && id < e_.first + e_.count; }

    void gather() {
        run_ranges(context_, (int64_t)pairs_.size(), kBytesPerItem / (r_.hidden * (int64_t)sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                       for (int64_t row = begin; row < end; row++)
                           std::memcpy(rows_ + row * stride_, r_.x + pairs_[row] / e_.top_k * r_.x_stride, sizeof(T) * r_.hidden);
                   });
    }

    // The rows of each expert that has any by its matrix; same: there is one row, which is every expert's.
    void multiply(const Matrix* matrices, const T* x, int64_t x_stride, T* out, int64_t out_stride, bool same, bool gated) {
        constexpr int64_t kMost = 640;  // as RowBlocks has it
        parts_.clear();
        for (int64_t expert = 0; expert < e_.count; expert++)
            for (int64_t row = starts_[expert], end = starts_[expert + 1]; row < end; row += kMost) {
                const Matrix& matrix = matrices[expert];
                const int64_t begin = same ? 0 : row, rows = std::min(kMost, end - row);
                parts_.push_back({(const uint8_t*)matrix.weights, (const float*)matrix.scales, begin, begin + rows, row - begin});
            }
        if (parts_.empty()) return;
        const int64_t rows = same ? 1 : (int64_t)pairs_.size();
        Linear<T> linear{(int)matrices->format, nullptr, nullptr, matrices->inputs, matrices->outputs, x, x_stride, rows, out,
                         out_stride, gated};
        linear.parts = parts_.data(), linear.part_count = (int64_t)parts_.size();
        run_linear(context_, linear);
    }

    void combine() {
        run_ranges(context_, r_.tokens, kBytesPerItem / (e_.top_k * r_.hidden * (int64_t)sizeof(T)),
                   [&](int64_t begin, int64_t end) {
                       for (int64_t token = begin; token < end; token++) combine(token);
                   });
    }

    void combine(int64_t token) {
        const int64_t* const rows = row_.data() + token * e_.top_k;
        const T* const weights = r_.weights + token * e_.top_k;
        T* const out = r_.out + token * r_.hidden;
        for (int64_t i = 0; i < r_.hidden; i += kLanes) {
            const int part = (int)std::min<int64_t>(kLanes, r_.hidden - i);
            vf sum{};
            for (int64_t choice = 0; choice < e_.top_k; choice++) {
                if (rows[choice] < 0) continue;
                const T* const output = rows_ + rows[choice] * stride_ + i;
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
    const Experts& e_;
    const ExpertRows<T> r_;
    const bool alone_;
    std::vector<int64_t> starts_, pairs_, row_;
    std::vector<RowPart> parts_;
    int64_t stride_, inner_stride_;
    T *rows_, *inner_;  // rows_: what each expert reads, and later what it gives
};

}  // namespace vsl
