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
    if (linear.rows < kSignRows) return run_octets(context, linear, rows.codes, middle, store);
    std::memset(middle, 0, linear.rows * sizeof(int32_t));
    run_signs(context, linear, rows.codes, store);
#else
    if (ByteUnits::kMiddle == 0) std::memset(middle, 0, linear.rows * sizeof(int32_t));
    const PackedRows<Int8Panels> x(context, linear, context.packed, [&](int64_t row, int64_t i, int64_t end, int32_t* units) {
        pack_codes(rows.codes + row * linear.inputs + i, end - i, units);
    });
    run_panels(context, linear, x, store);
#endif
}

}  // namespace vsl
