// Linear layers on any CPU, in vectors of kLanes outputs: sums in fp32, and in whole numbers for int8 and int4. A few
// rows at a time, whose sums stay in registers while a block of inputs passes. Each output is summed in the order of the
// inputs, so a row's result does not depend on how many others there are.
#pragma once

#include "linear.h"

namespace vsl {

// Inputs of a slab that are multiplied before the next ones, whose sums then pass through memory. With 64, the weights
// prepared are 16 KiB, which stay in the first-level cache; on AVX2 twice as many are quicker all the same.
#if defined(VSL_AVX2)
constexpr int kBlockInputs = 128;
#else
constexpr int kBlockInputs = 64;
#endif
constexpr int kLine = 16;         // units that rows of x lie further apart: at 4 KiB they would share places of the cache
constexpr int kMostTogether = 6, kMostInt4Together = 4;  // rows
// From here on, weights are brought into the form that is multiplied once a block, and not by each few rows again.
constexpr int kPreparedRows = 12, kPreparedInt8Rows = 4;
constexpr int kManyRows = 64;
constexpr int kNearAhead = 2048;  // as kAhead, where one row is all that a slab is multiplied by

#if defined(VSL_NEON)
constexpr int kMoreRegisters = 2;  // 32, of which sums take 24 at most
#else
constexpr int kMoreRegisters = 1;
#endif

inline vu load_units(const void* weights) {
    vu units;
    std::memcpy(&units, weights, sizeof units);
    return units;
}

// How 32 bits of weights are multiplied by kParts units of x.
struct FloatUnits {
    using Sum = vf;
    using Unit = float;  // of x, and of sums in memory
    static constexpr int kParts = 1;
    static vf part(int, const uint32_t* weights) { return load((const float*)weights); }
    static vf multiply_add(vf sum, vf weights, float x) { return sum + weights * splat(x); }
};

struct Bf16Units : FloatUnits {
    static constexpr int kParts = 2;
    static vf part(int p, const uint32_t* weights) {
        const vu units = load_units(weights);
        return (vf)(p == 0 ? units << 16 : units & 0xffff0000u);
    }
};

// Pairs of 16-bit integers.
struct ShortUnits {
    using Sum = vi;
    using Unit = int32_t;
    static constexpr int kParts = 1;
    static vi part(int, const uint32_t* weights) { return (vi)load_units(weights); }
    static vi multiply_add(vi sum, vi weights, int32_t x) { return multiply_pairs(sum, weights, x); }
};

#if defined(VSL_NEON_BF16)
// Pairs of bfloat16, of x too.
struct PairsOfBf16 : FloatUnits {
    static vf multiply_add(vf sum, vf weights, float x) { return multiply_bf16(sum, weights, splat(x)); }
};
#endif

#if defined(VSL_QUADS)
// Four bytes, times four with a sign.
struct ByteUnits : ShortUnits {
    static constexpr int32_t kMiddle = kUnsignedQuads ? 1 : 0;
    static vi part(int, const uint32_t* weights) {
        const vu units = load_units(weights);
        return (vi)(kUnsignedQuads ? units : units ^ 0x80808080u);
    }
    static vi multiply_add(vi sum, vi weights, int32_t x) { return multiply_quads(sum, weights, x); }
};
#else
// The same as two pairs: of bytes 0 and 2, and of 1 and 3.
struct ByteUnits : ShortUnits {
    static constexpr int kParts = 2;
    static constexpr int32_t kMiddle = 1;
    static vi part(int p, const uint32_t* weights) { return (vi)(load_units(weights) >> 8 * p & 0x00ff00ffu); }
};
#endif

// The weights that follow those that are multiplied. They are asked for a few at a time, all along: a core can wait for some
// 16 lines at once, and in bursts it would wait for them in place of multiplying.
struct Following {
    const char *next, *end;
    int lines;  // before each pass over the inputs
    bool many_rows;

    void ask(int count) {
        for (; count > 0 && next < end; count--, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Adds the products of `steps` units of x to sums[kRows][kSlab], or begins them. With kKeep, weights are left at `kept` in the
// form in which they were multiplied (a function of its own: else registers of all others are spilled). kAsk: lines of the following weights, each step.
template <class Units, int kRows, int kVectors, int kAsk, bool kKeep>
inline void multiply_vectors(const uint32_t* weights, int64_t steps, const typename Units::Unit* x, int64_t x_stride,
                             typename Units::Unit* sums, bool begin, Following& following, typename Units::Unit* kept) {
    typename Units::Sum into[kRows][kVectors] = {};
    if (!begin)
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) std::memcpy(&into[r][v], sums + r * kSlab + v * kLanes, sizeof into[r][v]);
    for (int64_t k = 0; k < steps; k++, weights += kSlab) {
        if constexpr (kRows == 1)
            for (int line = 0; line < kAsk; line++) __builtin_prefetch((const char*)weights + kNearAhead + line * 64);
        else
            following.ask(kAsk);
        // What is fewer, vectors or rows, stays in registers beside the sums.
        for (int p = 0; p < Units::kParts; p++) {
            const typename Units::Unit* const units = x + k * Units::kParts + p;
            if constexpr (kRows >= kVectors) {
                typename Units::Sum parts[kVectors];
                for (int v = 0; v < kVectors; v++) parts[v] = Units::part(p, weights + v * kLanes);
                if constexpr (kKeep)
                    for (int v = 0; v < kVectors; v++)
                        std::memcpy(kept + (k * Units::kParts + p) * kSlab + v * kLanes, &parts[v], sizeof parts[v]);
                for (int r = 0; r < kRows; r++)
                    for (int v = 0; v < kVectors; v++)
                        into[r][v] = Units::multiply_add(into[r][v], parts[v], units[r * x_stride]);
            } else {
                for (int v = 0; v < kVectors; v++) {
                    const typename Units::Sum part = Units::part(p, weights + v * kLanes);
                    for (int r = 0; r < kRows; r++)
                        into[r][v] = Units::multiply_add(into[r][v], part, units[r * x_stride]);
                }
            }
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int v = 0; v < kVectors; v++) std::memcpy(sums + r * kSlab + v * kLanes, &into[r][v], sizeof into[r][v]);
}

// As multiply_vectors, for all outputs of a slab. alone: no other rows share these weights.
template <class Units, int kRows>
inline void multiply_together(const uint32_t* weights, int64_t steps, const typename Units::Unit* x, int64_t x_stride,
                              typename Units::Unit* sums, bool begin, bool alone, Following& following,
                              typename Units::Unit* kept = nullptr) {
    constexpr int kAll = kSlab / kLanes, kRegisters = kMoreRegisters * (kRows == 1 ? 8 : kRows == 2 ? 4 : 2);
    constexpr int kVectors = kAll < 8 || kAll < kRegisters ? kAll : kRegisters, kPasses = kAll / kVectors;
    for (int j = 0; j < kAll; j += kVectors) {
        const auto multiply = [&](auto ask, auto keep) {
            multiply_vectors<Units, kRows, kVectors, ask, keep>(weights + j * kLanes, steps, x, x_stride, sums + j * kLanes,
                                                                begin, following, kept == nullptr ? nullptr : kept + j * kLanes);
        };
        if (alone) {
            multiply(std::integral_constant<int, (4 + kPasses - 1) / kPasses>(), std::false_type());
            continue;
        }
        following.ask(following.lines);
        // Many rows lie in no near cache: each pass asks for its share of those that come next.
        const int64_t share = steps * Units::kParts / kPasses;
        for (int r = kRows; following.many_rows && r < 2 * kRows; r++)
            for (int64_t k = j / kVectors * share; k < (j / kVectors + 1) * share; k += 16) __builtin_prefetch(x + r * x_stride + k);
        if (kept == nullptr)
            multiply(std::integral_constant<int, 0>(), std::false_type());
        else
            multiply(std::integral_constant<int, 0>(), std::true_type());
    }
}

// Calls f(integral constant) with `count`, 1 to kMost.
template <int kMost, class F>
inline void with_count(int count, const F& f) {
    if constexpr (kMost > 1)
        if (count < kMost) return with_count<kMost - 1>(count, f);
    f(std::integral_constant<int, kMost>());
}

// Calls f(first row, integral constant of rows) for all rows, kMost at a time or, at the end, a few more evenly.
template <int kMost, class F>
inline void few_rows(int64_t rows, const F& f) {
    for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row;
        const int count = (int)(left <= kMost ? left : left < 2 * kMost ? (left + 1) / 2 : kMost);
        with_count<kMost>(count, [&](auto constant) { f(row, constant); });
        row += count;
    }
}

// Each format: the units that lie in a slab, and from how many rows on these are brought into another form once, by the first
// rows that are multiplied, for the others.
struct FloatPanels {
    using Direct = FloatUnits;
    using Prepared = FloatUnits;
    static constexpr int kFormat = kFloat, kDepth = 1;  // inputs of 32 bits of weights
    static constexpr int64_t kLeastRows = INT64_MAX;
};

struct Bf16Panels {
    using Direct = Bf16Units;
    using Prepared = FloatUnits;
    static constexpr int kFormat = kBf16, kDepth = 2;
    static constexpr int64_t kLeastRows = kPreparedRows;
};

#if defined(VSL_NEON_BF16)
struct Bf16PairPanels {
    using Direct = PairsOfBf16;
    using Prepared = PairsOfBf16;
    static constexpr int kFormat = kBf16, kDepth = 2;
    static constexpr int64_t kLeastRows = INT64_MAX;
};
#endif

struct Int8Panels {
    using Direct = ByteUnits;
    using Prepared = ShortUnits;
    static constexpr int kFormat = kInt8, kDepth = 4;
    static constexpr int64_t kLeastRows = ByteUnits::kParts == 1 ? INT64_MAX : kPreparedInt8Rows;
};

// In fp32: a block is unpacked before any row.
struct Int4Panels {
    using Direct = FloatUnits;
    using Prepared = FloatUnits;
    static constexpr int kFormat = kInt4, kDepth = 1;
    static constexpr int64_t kLeastRows = 0;
    static void prepare(const uint8_t* group, int64_t inputs, float* out) {
        for (int64_t i = 0; i < inputs; i += kGroup, group += kGroupBytes)
            for (int j = 0; j < kSlab; j += kLanes) {
                const bf16* const scales = (const bf16*)(group + kSlab * kGroup / 2) + j;
                const vf scale = load(scales), offset = load(scales + kSlab) - scale * splat(8.0f);
                for (int k = 0; k < kGroup; k++) {
                    const vu units = load_units(group + (k / 8 * kSlab + j) * 4);
                    const vi code = (vi)(units >> (k % 8 / 2 * 4 + k % 2 * 16) & 15);
                    store(out + (i + k) * kSlab + j, __builtin_convertvector(code, vf) * scale + offset);
                }
            }
    }
};

// Calls store(into, slab, row, 64 sums) for all outputs. x: rows of units, x_stride apart.
template <class Panels, class T, class Store>
inline void run_panels(Context& context, const Linear<T>& linear, const typename Panels::Direct::Unit* x,
                       int64_t x_stride, const Store& store) {
    using Unit = typename Panels::Direct::Unit;
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int worker) {
        const uint8_t* const weights = linear.weights + slab * slab_bytes(Panels::kFormat, linear.inputs);
        const int64_t rows = end - begin;
        Unit* const sums = (Unit*)context.scratch[worker].reserve((rows + kBlockInputs) * kSlab * sizeof(Unit));
        Unit* const prepared = sums + rows * kSlab;
        const bool prepares = !context.fixed_order && rows >= Panels::kLeastRows;
        for (int64_t i = 0; i < linear.inputs; i += kBlockInputs) {
            const int64_t inputs = std::min<int64_t>(kBlockInputs, linear.inputs - i);
            const uint32_t* const block = (const uint32_t*)(weights + slab_bytes(Panels::kFormat, i));
            constexpr int kDirect = Panels::kDepth / Panels::Direct::kParts;  // inputs of a unit of x
            const Unit* const from = x + begin * x_stride + i / kDirect;
            const char* const next = (const char*)block + slab_bytes(Panels::kFormat, inputs);
            const int64_t bytes = slab_bytes(Panels::kFormat, kBlockInputs);
            Following following{next, next + bytes, (int)(bytes / 64 * kMostTogether / (rows * 4) + 1), rows > kManyRows};
            constexpr bool kUnpacked = Panels::kFormat == kInt4;
            if constexpr (kUnpacked) Panels::prepare((const uint8_t*)block, inputs, prepared);
            few_rows<kMostTogether>(rows, [&](int64_t row, auto count) {
                const Unit* const units = from + row * x_stride;
                Unit* const into = sums + row * kSlab;
                const bool alone = count == rows;
                if (kUnpacked || (prepares && row > 0))
                    multiply_together<typename Panels::Prepared, count>((const uint32_t*)prepared, inputs / kDirect, units,
                                                                        x_stride, into, i == 0, alone, following);
                else
                    multiply_together<typename Panels::Direct, count>(block, inputs / Panels::kDepth, units, x_stride, into,
                                                                      i == 0, alone, following, prepares ? prepared : nullptr);
            });
        }
        for (int64_t row = begin; row < end; row++) store(into, slab, row, sums + (row - begin) * kSlab);
    });
}

// Rounds the sums of a row into place.
template <class T>
inline void store_sums(const Linear<T>& into, int64_t slab, int64_t row, const float* sums) {
    store_slab(sums, into.out + row * into.out_stride + slab * kSlab, into.outputs - slab * kSlab);
}

// In fp32, from x in fp32.
template <class T>
inline void run_float(Context& context, const Linear<T>& linear) {
    const int64_t inputs = linear.inputs, stride = inputs + kLine;
    float* const x = (float*)context.shared.reserve(linear.rows * stride * 4);
    run_ranges(context, linear.rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < inputs; i += kLanes)
                vsl::store(x + r * stride + i, load(linear.x + r * linear.x_stride + i));
    });
    const auto store = store_sums<T>;
    if (linear.format == kInt4) return run_panels<Int4Panels>(context, linear, x, stride, store);
    if (linear.format == kFloat) return run_panels<FloatPanels>(context, linear, x, stride, store);
    run_panels<Bf16Panels>(context, linear, x, stride, store);
}

// In int8, exactly: sums are whole numbers.
template <class T>
inline void run_bytes(Context& context, const Linear<T>& linear, const QuantizedRows& rows) {
    const int64_t inputs = linear.inputs;
    const int32_t* x = (const int32_t*)rows.codes;
    int64_t stride = inputs / 4;
    if constexpr (ByteUnits::kParts == 2) {
        stride = inputs / 2 + kLine;
        int32_t* const pairs = (int32_t*)context.pairs.reserve(linear.rows * stride * 4);
        run_ranges(context, linear.rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t i = 0; i < inputs; i += 4) {
                    const int8_t* const codes = rows.codes + r * inputs + i;
                    int32_t* const pair = pairs + r * stride + i / 2;
                    pair[0] = (uint16_t)codes[0] | (int32_t)((uint32_t)codes[2] << 16);
                    pair[1] = (uint16_t)codes[1] | (int32_t)((uint32_t)codes[3] << 16);
                }
        });
        x = pairs;
    }
    run_panels<Int8Panels>(context, linear, x, stride,
                           [&](const Linear<T>& into, int64_t slab, int64_t row, const int32_t* sums) {
                               float values[kSlab];
                               for (int j = 0; j < kSlab; j += kLanes) {
                                   vi whole;
                                   std::memcpy(&whole, sums + j, sizeof whole);
                                   const vf scale = load(linear.scales + slab * kSlab + j) * splat(rows.scales[row]);
                                   const int32_t shift = rows.sums[row] * ByteUnits::kMiddle;
                                   const vf value = __builtin_convertvector(whole - splat(shift), vf);
                                   vsl::store(values + j, value * scale);
                               }
                               store_slab(values, into.out + row * into.out_stride + slab * kSlab,
                                          into.outputs - slab * kSlab);
                           });
}

// ------------------------------------------------------------------------------------- int4 by rows in 8 bits

#if defined(VSL_AVX2) || defined(VSL_AVX512) || defined(VSL_NEON)

// Rows in 8 bits with a scale for each group of inputs, in the order of the bytes that an int4 unit is split into.
struct QuantizedGroups {
    int8_t* codes;        // [rows][inputs]
    float *scales, *sums;  // [rows][groups]; the sums are of what the codes stand for

    static size_t bytes(int64_t rows, int64_t inputs) { return rows * (inputs + inputs / kGroup * 8); }

    QuantizedGroups(void* memory, int64_t rows, int64_t inputs)
        : codes((int8_t*)memory), scales((float*)(codes + rows * inputs)), sums(scales + rows * (inputs / kGroup)) {}
};

template <class T>
inline void quantize_groups(const T* x, int64_t inputs, int8_t* codes, float* scales, float* sums) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int64_t i = 0; i < inputs; i += kGroup) {
        int8_t plain[kGroup];
        int32_t sum;
        quantize_row(x + i, kGroup, plain, scales, &sum);
        for (int k = 0; k < kGroup; k++) codes[i + k] = plain[k / 8 * 8 + kOrder[k % 8]];
        *sums++ = (float)(sum / 128) * *scales++;
    }
}

// Adds to totals[kRows][kSlab] the products of one group of inputs and, from output j on, kVectors vectors. A group's sums of
// products of 4-bit and 8-bit codes fit 16 bits: 16 x 15 x 127 = 30480.
template <int kRows, int kVectors>
inline void multiply_group(const uint8_t* group, int j, const int8_t* codes, int64_t stride, const float* scales,
                           const float* sums, int64_t groups, float* totals) {
#if defined(VSL_QUADS)
    vi into[kRows][kVectors] = {};
#else
    vs into[kRows][kVectors] = {};
#endif
#pragma GCC unroll 1  // else registers run out
    for (int u = 0; u < kGroup / 8; u++) {
        vu low[kVectors], high[kVectors];
        for (int v = 0; v < kVectors; v++) {
            const vu units = load_units(group + (u * kSlab + j + v * kLanes) * 4);
            low[v] = units & 0x0f0f0f0fu;
            high[v] = units >> 4 & 0x0f0f0f0fu;
        }
        for (int r = 0; r < kRows; r++) {
            int32_t x[2];
            std::memcpy(x, codes + r * stride + u * 8, sizeof x);
            for (int v = 0; v < kVectors; v++) {
#if defined(VSL_QUADS)
                into[r][v] = multiply_quads(into[r][v], (vi)low[v], x[0]);
                into[r][v] = multiply_quads(into[r][v], (vi)high[v], x[1]);
#else
                into[r][v] += multiply_bytes(low[v], x[0]) + multiply_bytes(high[v], x[1]);
#endif
            }
        }
    }
    const bf16* const ends = (const bf16*)(group + kSlab * kGroup / 2) + j;
    for (int v = 0; v < kVectors; v++) {
        const vf scale = load(ends + v * kLanes), offset = load(ends + kSlab + v * kLanes) - scale * splat(8.0f);
        for (int r = 0; r < kRows; r++) {
#if defined(VSL_QUADS)
            const vf product = __builtin_convertvector(into[r][v], vf);
#else
            const vf product = __builtin_convertvector(add_pairs(into[r][v]), vf);
#endif
            float* const total = totals + r * kSlab + j + v * kLanes;
            store(total, load(total) + product * (scale * splat(scales[r * groups])) + offset * splat(sums[r * groups]));
        }
    }
}

template <int kRows>
inline void multiply_groups(const uint8_t* slab, int64_t row, const QuantizedGroups& x, int64_t inputs, float* totals) {
    constexpr int kVectors = kLanes == 16 || kMoreRegisters == 2 || kRows == 1 ? 4 : 2;
    const int64_t groups = inputs / kGroup;
    std::memset(totals, 0, kRows * kSlab * sizeof(float));
    for (int64_t g = 0; g < groups; g++, slab += kGroupBytes) {
        for (int line = 0; line < kGroupBytes; line += 64) __builtin_prefetch(slab + kNearAhead + line);
        for (int j = 0; j < kSlab; j += kVectors * kLanes)
            multiply_group<kRows, kVectors>(slab, j, x.codes + row * inputs + g * kGroup, inputs, x.scales + row * groups + g,
                                            x.sums + row * groups + g, groups, totals);
    }
}

template <class T>
inline void run_int4_bytes(Context& context, const Linear<T>& linear) {
    const int64_t inputs = linear.inputs, groups = inputs / kGroup;
    const QuantizedGroups x(context.shared.reserve(QuantizedGroups::bytes(linear.rows, inputs)), linear.rows, inputs);
    run_ranges(context, linear.rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            quantize_groups(linear.x + r * linear.x_stride, inputs, x.codes + r * inputs, x.scales + r * groups,
                            x.sums + r * groups);
    });
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int) {
        few_rows<kMostInt4Together>(end - begin, [&](int64_t first, auto count) {
            float totals[count * kSlab];
            multiply_groups<count>(linear.weights + slab * slab_bytes(kInt4, inputs), begin + first, x, inputs, totals);
            for (int r = 0; r < count; r++)
                store_slab(totals + r * kSlab, into.out + (begin + first + r) * into.out_stride + slab * kSlab,
                           into.outputs - slab * kSlab);
        });
    });
}

#endif

}  // namespace vsl
