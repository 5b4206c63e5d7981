// Linear layers on any CPU, in vectors of kLanes outputs: sums in fp32, and in whole numbers for int8 and int4. A few
// rows at a time, whose sums stay in registers while a block of inputs passes. Each output is summed in the order of the
// inputs, so a row's result does not depend on how many others there are.
#pragma once

#include "linear.h"
#include "simd_products.h"

namespace vsl {

// Inputs of a slab that are multiplied before the next ones, whose sums then pass through memory. 16 outputs' weights of a
// block, prepared, are 16 KiB with AVX2 (32 outputs' with AVX-512), which stay in the first-level cache while all rows pass.
#if defined(VSL_AVX2)
constexpr int kBlockInputs = 256;
#else
constexpr int kBlockInputs = 128;
#endif
// From here on, weights are brought into the form that is multiplied once a block, and not by each few rows again. With AVX-512
// storing that form costs as much as making it eight times.
#if defined(VSL_AVX512)
constexpr int kPreparedRows = 96;
#elif defined(VSL_AVX2)
constexpr int kPreparedRows = 14;
constexpr int kLongBlockRows = 24;  // fewer, if prepared, leave so much of the cache that half a block and the next pass's fit
#else
constexpr int kPreparedRows = 12;
#endif
constexpr int kPreparedInt8Rows = 4;
constexpr int kManyRows = 64;     // more than these lie in no near cache
constexpr int kNearAhead = 2048;  // as kAhead, where one row is all that a slab is multiplied by
constexpr int64_t kAloneSteps = 64;  // of fewer rows, after which come the next weights: 16 KiB

#if defined(VSL_NEON)
constexpr int kMoreRegisters = 2;  // 32, of which sums take 24 at most
#else
constexpr int kMoreRegisters = 1;
#endif
constexpr int kPassVectors = kSlab / kLanes < 8 ? kSlab / kLanes : 2 * kMoreRegisters;  // of outputs, while all rows pass

inline vu load_units(const void* weights) { return load_as<vu>(weights); }

// How 32 bits of weights are multiplied by kParts units of x, for kTogether rows at most at a time.
struct FloatUnits {
    using Sum = vf;
    using Unit = float;  // of x, and of sums in memory
    static constexpr int kParts = 1, kTogether = 6;
    static vf part(int, const uint32_t* weights) { return load((const float*)weights); }
    static vf multiply_add(vf sum, vf weights, const float* x) { return sum + weights * splat(*x); }
};

struct Bf16Units : FloatUnits {
    static constexpr int kParts = 2;
    static vf part(int p, const uint32_t* weights) {
        const vu units = load_units(weights);
        return (vf)(p == 0 ? units << 16 : units & 0xffff0000u);
    }
};

#if defined(VSL_AVX2)
// Bf16Units without a mask, which takes a register: where sums leave one too few.
struct UnmaskedUnits : Bf16Units {
    static vf part(int p, const uint32_t* weights) {
        const vu units = load_units(weights);
        return (vf)((p == 0 ? units : in_register(units >> 16)) << 16);
    }
};

// Bf16Units' parts as they were prepared. Two at a step: half of the other work of a step.
struct PreparedUnits : FloatUnits {
    static constexpr int kParts = 2;
    static vf part(int p, const uint32_t* weights) { return load((const float*)weights + p * kPassVectors * kLanes); }
};
#else
using UnmaskedUnits = Bf16Units;
using PreparedUnits = FloatUnits;
#endif

// Pairs of 16-bit integers.
struct ShortUnits {
    using Sum = vi;
    using Unit = int32_t;
    static constexpr int kParts = 1, kTogether = 6;
    static vi part(int, const uint32_t* weights) { return (vi)load_units(weights); }
    static vi multiply_add(vi sum, vi weights, const int32_t* x) { return multiply_pairs(sum, weights, *x); }
};

#if defined(VSL_NEON_BF16)
// Pairs of bfloat16, of x too.
struct PairsOfBf16 : FloatUnits {
    static vf multiply_add(vf sum, vf weights, const float* x) { return multiply_bf16(sum, weights, splat(*x)); }
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
    static vi multiply_add(vi sum, vi weights, const int32_t* x) { return multiply_quads(sum, weights, *x); }
};
#else
// The same as two pairs: of bytes 0 and 2, and of 1 and 3.
struct ByteUnits : ShortUnits {
    static constexpr int kParts = 2;
    static constexpr int32_t kMiddle = 1;
    static vi part(int p, const uint32_t* weights) { return (vi)(load_units(weights) >> 8 * p & 0x00ff00ffu); }
};
#endif

// What is asked for before it is multiplied. The weights that follow, as evenly as time passes: a core can wait for some 16 lines
// at once, and in bursts it would wait for them in place of multiplying. And the rows of x that come next.
struct Following {
    const char* next;
    int64_t apart;  // units of x of a row from one ask to the next, a multiple of what a step takes
    bool rows;
    int64_t due;  // units until the next

    Following(const char* next, int64_t apart, bool rows) : next(next), apart(apart), rows(rows), due(apart) {}
};

// Adds the products of `steps` units of weights and of x, rows of kApart units, to sums[kRows][kSlab], or begins them. With kKeep,
// weights are left at `kept`, [unit][kVectors], in the form in which they were multiplied (a function of its own: else registers
// of all others are spilled). kAsk: lines of the following weights that are asked for at once. kPass: at `kept` are the weights of
// the next pass, which are brought nearer. One loop, and rows that are a constant apart: else gcc keeps sums in memory.
template <class Units, int kApart, int kRows, int kVectors, int kAsk, bool kKeep, int kStride = kSlab, bool kPass = false>
inline void multiply_vectors(const uint32_t* weights, int64_t steps, const typename Units::Unit* x,
                             typename Units::Unit* sums, bool begin, Following& following, typename Units::Unit* kept) {
    using Sum = typename Units::Sum;
    Sum into[kRows][kVectors] = {};
    if (!begin)
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) into[r][v] = load_as<Sum>(sums + r * kSlab + v * kLanes);
    const char* next = following.next;
    const int64_t apart = following.apart;
    int64_t due = following.due;
    const bool rows = following.rows;
    for (int64_t k = 0; k < steps; k++, weights += kStride) {
        if ((due -= Units::kParts) == 0) {
            due = apart;
            for (int line = 0; line < kAsk; line++, next += 64) __builtin_prefetch(next, 0, kRows == 1 ? 3 : 2);
        }
        if (rows && k * Units::kParts % 16 == 0)
            for (int r = 0; r < kRows; r++) __builtin_prefetch(x + (kRows + r) * kApart);
        if constexpr (kPass) __builtin_prefetch(kept + k * kSlab);
        // What is fewer, vectors or rows, stays in registers beside the sums.
        for (int p = 0; p < Units::kParts; p++, x++) {
            if constexpr (kRows >= kVectors) {
                Sum parts[kVectors];
                for (int v = 0; v < kVectors; v++) parts[v] = in_register(Units::part(p, weights + v * kLanes));
                if constexpr (kKeep)
                    for (int v = 0; v < kVectors; v++, kept += kLanes) store_as(kept, parts[v]);
                for (int r = 0; r < kRows; r++)
                    for (int v = 0; v < kVectors; v++)
                        into[r][v] = Units::multiply_add(into[r][v], parts[v], x + r * kApart);
            } else {
                for (int v = 0; v < kVectors; v++) {
                    const Sum part = Units::part(p, weights + v * kLanes);
                    for (int r = 0; r < kRows; r++) into[r][v] = Units::multiply_add(into[r][v], part, x + r * kApart);
                }
            }
        }
    }
    following.next = next;
    following.due = due;
    for (int r = 0; r < kRows; r++)
        for (int v = 0; v < kVectors; v++) store_as(sums + r * kSlab + v * kLanes, into[r][v]);
}

// Calls f(integral constant) with `count`, 1 to kMost.
template <int kMost, class F>
inline void with_count(int count, const F& f) {
    if constexpr (kMost > 1)
        if (count < kMost) return with_count<kMost - 1>(count, f);
    f(std::integral_constant<int, kMost>());
}

// Rows in groups of kMost at most, as even as they can be; `least` groups at least.
template <int kMost>
struct RowGroups {
    int64_t rows, count;

    explicit RowGroups(int64_t rows, int64_t least = 1) : rows(rows), count(std::max((rows + kMost - 1) / kMost, least)) {}

    int64_t begin(int64_t group) const { return group * rows / count; }

    // Calls f(first row, integral constant of rows) for each.
    template <class F>
    void each(const F& f) const {
        for (int64_t group = 0, row = 0, end; group < count; group++, row = end) {
            end = begin(group + 1);
            with_count<kMost>((int)(end - row), [&](auto constant) { f(row, constant); });
        }
    }
};

// Each format: the units that lie in a slab, and from how many rows on these are brought into another form once, by the first
// rows that are multiplied, for the others.
struct FloatPanels {
    static constexpr bool kShort = false;  // whether blocks have half the inputs, and the next pass's weights are brought near
    using Direct = FloatUnits;
    using Prepared = FloatUnits;
    static constexpr int kFormat = kFloat, kDepth = 1;  // inputs of 32 bits of weights
    static constexpr int64_t kLeastRows = INT64_MAX;
};

struct Bf16Panels {
    static constexpr bool kShort = false;
    using Direct = Bf16Units;
    using Prepared = PreparedUnits;
    static constexpr int kFormat = kBf16, kDepth = 2;
    static constexpr int64_t kLeastRows = kPreparedRows;
};

struct ShortBf16Panels : Bf16Panels {
    static constexpr bool kShort = true;
};

#if defined(VSL_NEON_BF16)
struct Bf16PairPanels {
    static constexpr bool kShort = false;
    using Direct = PairsOfBf16;
    using Prepared = PairsOfBf16;
    static constexpr int kFormat = kBf16, kDepth = 2;
    static constexpr int64_t kLeastRows = INT64_MAX;
};
#endif

struct Int8Panels {
    static constexpr bool kShort = false;
    using Direct = ByteUnits;
    using Prepared = std::conditional_t<ByteUnits::kParts == 1, ByteUnits, ShortUnits>;
    static constexpr int kFormat = kInt8, kDepth = 4;
    static constexpr int64_t kLeastRows = ByteUnits::kParts == 1 ? INT64_MAX : kPreparedInt8Rows;
};

// In fp32: a block is unpacked before any row.
struct Int4Panels {
    static constexpr bool kShort = false;
    using Direct = FloatUnits;
    using Prepared = FloatUnits;
    static constexpr int kFormat = kInt4, kDepth = 1;
    static constexpr int64_t kLeastRows = 0;

    // Makes `vectors` vectors of outputs, from output j on.
    static void prepare(const uint8_t* group, int64_t inputs, int j, int vectors, float* out) {
        for (int64_t i = 0; i < inputs; i += kGroup, group += kGroupBytes, out += kGroup * vectors * kLanes)
            for (int v = 0; v < vectors * kLanes; v += kLanes) {
                const bf16* const scales = (const bf16*)(group + kSlab * kGroup / 2) + j + v;
                const vf scale = load(scales), offset = load(scales + kSlab) - scale * splat(8.0f);
                for (int k = 0; k < kGroup; k++) {
                    const vu units = load_units(group + (k / 8 * kSlab + j + v) * 4);
                    const vi code = (vi)(units >> (k % 8 / 2 * 4 + k % 2 * 16) & 15);
                    store(out + k * vectors * kLanes + v, __builtin_convertvector(code, vf) * scale + offset);
                }
            }
    }
};

// Rows of x in the form in which they are multiplied, [block of inputs][row][units of the block]: those of a few rows lie
// together, and a constant apart.
template <class Panels>
struct PackedRows {
    using Unit = typename Panels::Direct::Unit;
    static constexpr int kInputs = Panels::kDepth / Panels::Direct::kParts;  // of a unit
    static constexpr int kBlock = Panels::kShort ? kBlockInputs / 2 : kBlockInputs, kUnits = kBlock / kInputs;

    Unit* units;
    int64_t rows;

    // convert(row, first input, end, units) makes a row of a block.
    template <class T, class Convert>
    PackedRows(Context& context, const Linear<T>& linear, Scratch& memory, const Convert& convert) : rows(linear.rows) {
        const int64_t inputs = linear.inputs, blocks = (inputs + kBlock - 1) / kBlock;
        units = (Unit*)memory.reserve(rows * blocks * kUnits * sizeof(Unit));
        run_ranges(context, rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
            for (int64_t i = 0; i < inputs; i += kBlock)
                for (int64_t row = begin; row < end; row++)
                    convert(row, i, std::min<int64_t>(inputs, i + kBlock), (Unit*)at(row, i));
        });
    }

    const Unit* at(int64_t row, int64_t input) const { return units + (input / kBlock * rows + row) * kUnits; }
};

// Multiplies a block of inputs of a slab by rows from `begin` on, which are those of `sums`.
template <class Panels, class Unit = typename Panels::Direct::Unit>
inline void multiply_block(const uint8_t* block, int64_t i, int64_t inputs, const PackedRows<Panels>& x, int64_t begin,
                           int64_t rows, bool prepares, Unit* sums, Unit* prepared) {
    using Direct = typename Panels::Direct;
    using Prepared = typename Panels::Prepared;
    constexpr bool kUnpacked = Panels::kFormat == kInt4;
    constexpr int kAll = kSlab / kLanes, kApart = PackedRows<Panels>::kUnits;
    const uint32_t* const weights = (const uint32_t*)block;
    const char* const next = (const char*)block + slab_bytes(Panels::kFormat, inputs);
    const int64_t steps = inputs / Panels::kDepth;
    const RowGroups<Direct::kTogether> groups(rows);
    if (groups.count == 1 && !kUnpacked)
        return with_count<Direct::kTogether>((int)rows, [&](auto count) {
            constexpr int kRegisters = kMoreRegisters * (count == 1 ? 8 : count == 2 ? 4 : 2);
            constexpr int kVectors = kAll < 8 || kAll < kRegisters ? kAll : kRegisters, kPasses = kAll / kVectors;
            for (int64_t step = 0; step < steps; step += kAloneSteps) {
                const uint32_t* const from = weights + step * kSlab;
                Following following{(const char*)(from + (count == 1 ? kNearAhead / 4 : kAloneSteps * kSlab)), Direct::kParts, false};
                for (int j = 0; j < kAll; j += kVectors)
                    multiply_vectors<Direct, kApart, count, kVectors, (4 + kPasses - 1) / kPasses, false>(
                        from + j * kLanes, std::min(kAloneSteps, steps - step), x.at(begin, i) + step * Direct::kParts,
                        sums + j * kLanes, i + step == 0, following, nullptr);
            }
        });
    // A few outputs' weights stay in the first-level cache while all rows pass.
    constexpr int kVectors = kPassVectors, kPasses = kAll / kVectors, kAsk = kPasses == 1 ? 4 : 1;
    const int64_t asks = slab_bytes(Panels::kFormat, inputs) / (64 * kAsk), turns = groups.count * steps * kPasses;
    Following following{next, std::max<int64_t>(1, turns / asks) * Direct::kParts, rows > kManyRows};
    for (int j = 0; j < kAll; j += kVectors) {
        if constexpr (kUnpacked) Panels::prepare(block, inputs, j * kLanes, kVectors, prepared);
        groups.each([&](int64_t row, auto count) {
            const Unit* const units = x.at(begin + row, i);
            Unit* const into = sums + row * kSlab + j * kLanes;
            constexpr int kPrepared = kVectors * kLanes * Prepared::kParts;  // from one step to the next
            constexpr bool kUnmasked = std::is_same_v<Direct, Bf16Units> && count == Direct::kTogether;
            using Keeping = std::conditional_t<kUnmasked, UnmaskedUnits, Direct>;
            const uint32_t* const from = (const uint32_t*)prepared;
            const int64_t prepared_steps = steps * Direct::kParts / Prepared::kParts;
            if constexpr (Panels::kShort)
                if (prepares && row + count == rows) {
                    const void* const pass = j + kVectors < kAll ? (const void*)(weights + (j + kVectors) * kLanes) : next;
                    return multiply_vectors<Prepared, kApart, count, kVectors, kAsk, false, kPrepared, true>(
                        from, prepared_steps, units, into, i == 0, following, (Unit*)pass);
                }
            if (kUnpacked || (prepares && row > 0))
                multiply_vectors<Prepared, kApart, count, kVectors, kAsk, false, kPrepared>(from, prepared_steps, units, into,
                                                                                           i == 0, following, nullptr);
            else if (prepares)
                multiply_vectors<Keeping, kApart, count, kVectors, kAsk, true>(weights + j * kLanes, steps, units, into, i == 0,
                                                                               following, prepared);
            else
                multiply_vectors<Direct, kApart, count, kVectors, kAsk, false>(weights + j * kLanes, steps, units, into, i == 0,
                                                                               following, nullptr);
        });
    }
}

// Calls store(into, slab, row, 64 sums) for all outputs.
template <class Panels, class T, class Store>
inline void run_panels(Context& context, const Linear<T>& linear, const PackedRows<Panels>& x, const Store& store) {
    using Unit = typename Panels::Direct::Unit;
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int worker) {
        const uint8_t* const weights = into.weights + slab * slab_bytes(Panels::kFormat, linear.inputs);
        const int64_t rows = end - begin;
        Unit* const sums = (Unit*)context.scratch[worker].reserve((rows + kBlockInputs) * kSlab * sizeof(Unit));
        const bool prepares = !context.fixed_order && rows >= Panels::kLeastRows;
        for (int64_t i = 0; i < linear.inputs; i += x.kBlock)
            multiply_block<Panels>(weights + slab_bytes(Panels::kFormat, i), i, std::min<int64_t>(x.kBlock, linear.inputs - i), x,
                                   begin, rows, prepares, sums, sums + rows * kSlab);
        for (int64_t row = begin; row < end; row++) {
            prefetch_outputs(into, slab, row);
            store(into, slab, row, sums + (row - begin) * kSlab);
        }
    });
}

// Rounds the sums of a row into place.
template <class T>
inline void store_sums(const Linear<T>& into, int64_t slab, int64_t row, const float* sums) {
    store_slab(sums, into.out + row * into.out_stride + slab * kSlab, into.outputs - slab * kSlab);
}

// In fp32.
template <class Panels, class T>
inline void run_floats(Context& context, const Linear<T>& linear) {
    const PackedRows<Panels> x(context, linear, context.shared, [&](int64_t row, int64_t i, int64_t end, float* units) {
        for (; i < end; i += kLanes, units += kLanes) store(units, load(linear.x + row * linear.x_stride + i));
    });
    run_panels(context, linear, x, store_sums<T>);
}

template <class T>
inline void run_float(Context& context, const Linear<T>& linear) {
    if (linear.format == kInt4) return run_floats<Int4Panels>(context, linear);
    if (linear.format == kFloat) return run_floats<FloatPanels>(context, linear);
#if defined(VSL_AVX2)
    if (linear.rows >= kPreparedRows && linear.rows < kLongBlockRows) return run_floats<ShortBf16Panels>(context, linear);
#endif
    run_floats<Bf16Panels>(context, linear);
}

#if defined(VSL_NEON_BF16)
inline void run_bf16_pairs(Context& context, const Linear<bf16>& linear) {
    const PackedRows<Bf16PairPanels> x(context, linear, context.shared, [&](int64_t row, int64_t i, int64_t end, float* units) {
        std::memcpy(units, linear.x + row * linear.x_stride + i, (end - i) * sizeof(bf16));
    });
    run_panels(context, linear, x, store_sums<bf16>);
}
#endif

}  // namespace vsl
