// int8 without VNNI or AMX, exactly: sums are whole numbers.
#pragma once

#include "linear_octets.h"

namespace vsl {

#if !defined(VSL_BYTES)
// Codes as ByteUnits multiplies them.
inline void pack_codes(const int8_t* codes, int64_t count, int32_t* units) {
#if defined(VSL_QUADS)
    std::memcpy(units, codes, count);
#else
    for (int64_t i = 0; i < count; i += 4)
        for (int j = 0; j < 2; j++)
            *units++ = (int32_t)(uint16_t)codes[i + j] | (int32_t)((uint32_t)codes[i + j + 2] << 16);
#endif
}
#endif

#if defined(VSL_BYTES)
// Calls work(first row, end) for each block or part of rows that run_slabs has; where parts share their rows, once.
template <class T, class Work>
inline void each_piece(const Linear<T>& linear, const Work& work) {
    if (linear.parts == nullptr) {
        const RowBlocks blocks(linear.rows, 1);
        for (int item = 0; item < blocks.items(); item++) work(blocks.begin(item), blocks.end(item));
    }
    for (int64_t i = 0, end = 0; i < linear.part_count; i++) {
        if (linear.parts[i].begin < end) continue;
        end = linear.parts[i].end;
        work(linear.parts[i].begin, end);
    }
}

// Calls store(into, slab, row, 64 sums) for all outputs: of pieces of few rows as octets, of those of many with signed weights.
template <class T, class Store>
inline void run_pieces(Context& context, const Linear<T>& linear, const int8_t* codes, int32_t* middle, const Store& store) {
    const int64_t rows = linear.rows, inputs = linear.inputs;
    SignedRows many{nullptr, rows, inputs};
    OctetRows few(rows, inputs);
    std::vector<RowPart> pieces;  // of many rows
    each_piece(linear, [&](int64_t begin, int64_t end) {
        if (end - begin < kSignRows) return few.add(begin, end);
        pieces.push_back({nullptr, nullptr, begin, end, 0});
        std::memset(middle + begin, 0, (end - begin) * sizeof(int32_t));
    });
    few.x = (uint8_t*)context.packed.reserve(few.bytes + (pieces.empty() ? 0 : many.bytes()));
    many.x = (SignedCodes*)(few.x + few.bytes);
    run_ranges(context, (int64_t)few.groups.size(), 16384 / inputs, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; group++) few.pack(few.groups[group], codes, middle);
    });
    if (!pieces.empty())
        run_ranges(context, inputs / kGroup, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * kGroup; i < end * kGroup; i += kGroup)
                for (const RowPart& piece : pieces) many.pack(codes, i, piece.begin, piece.end);
        });
    run_slabs(context, linear, [&](const Linear<T>& into, int64_t slab, int64_t begin, int64_t end, int worker) {
        const uint8_t* const weights = into.weights + slab * slab_bytes(kInt8, inputs);
        if (end - begin < kSignRows)
            return few.multiply(weights, begin, end, context.scratch[worker],
                                [&](int64_t row, const int32_t* sums) { store(into, slab, row, sums); });
        many.multiply((const uint32_t*)weights, begin, end, context.scratch[worker], [&](int64_t row, const int32_t* sums) {
            prefetch_outputs(into, slab, row);
            store(into, slab, row, sums);
        });
    });
}
#endif

template <class T>
inline void run_bytes(Context& context, const Linear<T>& linear, const QuantizedRows& rows) {
    int32_t* const middle = rows.sums;  // what the sums of a row's products are too large by
    const auto store = [&](const Linear<T>& into, int64_t slab, int64_t row, const int32_t* sums) {
        float values[kSlab];
        for (int j = 0; j < kSlab; j += kLanes) {
            vi whole;
            std::memcpy(&whole, sums + j, sizeof whole);
            const vf scale = load(into.scales + slab * kSlab + j) * splat(rows.scales[row]);
            vsl::store(values + j, __builtin_convertvector(whole - splat(middle[row]), vf) * scale);
        }
        store_slab(values, into.out + row * into.out_stride + slab * kSlab, into.outputs - slab * kSlab);
    };
#if defined(VSL_BYTES)
    run_pieces(context, linear, rows.codes, middle, store);
#else
    if (ByteUnits::kMiddle == 0) std::memset(middle, 0, linear.rows * sizeof(int32_t));
    const PackedRows<Int8Panels> x(context, linear, context.packed, [&](int64_t row, int64_t i, int64_t end, int32_t* units) {
        pack_codes(rows.codes + row * linear.inputs + i, end - i, units);
    });
    run_panels(context, linear, x, store);
#endif
}

}  // namespace vsl
