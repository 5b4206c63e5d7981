// Sums over the ranks of one machine, through memory that all of them have mapped (model_worker/cpu/shared_memory.py).
//
// The memory begins with a line for each rank, in which it counts what it has written; two places of `capacity` bytes
// for each rank follow. Exchange n: every rank writes its part into its place n % 2 and counts, waits until all have
// counted to n, and reads all places. Whoever writes exchange n + 2 into the same place has seen all ranks count to
// n + 1, and by then they had read exchange n: one wait each is enough.
//
// Every rank adds in the order of the ranks, in fp32, rounded once: all of them get the same bits.
#pragma once

#include <time.h>

#include <cstring>

#include "abi.h"
#include "parallel.h"
#include "simd_memory.h"

namespace vsl {

constexpr int64_t kCountStride = 64;  // a line of the cache each

inline std::atomic<uint64_t>& count_of(const Ranks& ranks, int64_t rank) {
    return *(std::atomic<uint64_t>*)((char*)ranks.memory + rank * kCountStride);
}

inline char* place_of(const Ranks& ranks, int64_t rank, uint64_t exchange) {
    const int64_t counts = (ranks.size * kCountStride + 4095) / 4096 * 4096;
    return (char*)ranks.memory + counts + (2 * rank + (int64_t)(exchange % 2)) * ranks.capacity;
}

// Until `rank` has counted so far: a spin, as the others are about to, and soon the core is left to them, which may need
// it. A rank that died is noticed by the launcher, which ends them all.
inline void wait_for(const Ranks& ranks, int64_t rank, uint64_t exchange) {
    const auto& count = count_of(ranks, rank);
    Wait wait;
    for (int moments = 0; count.load(std::memory_order_acquire) < exchange; moments++) {
        wait.moment();
        if (moments > 5000) {
            const timespec pause{0, 50'000};
            nanosleep(&pause, nullptr);
        }
    }
}

// Hands `bytes` <= capacity of x to all ranks; returns the exchange's number when every rank's are in its place.
inline uint64_t exchange(const Ranks& ranks, const void* x, int64_t bytes) {
    auto& own = count_of(ranks, ranks.rank);
    const uint64_t number = own.load(std::memory_order_relaxed) + 1;
    std::memcpy(place_of(ranks, ranks.rank, number), x, bytes);
    own.store(number, std::memory_order_release);
    for (int64_t rank = 0; rank < ranks.size; rank++) wait_for(ranks, rank, number);
    return number;
}

// x[i] = the sum of all ranks' x[i].
template <class T>
void sum_ranks(Context& context, const Ranks& ranks, T* x, int64_t count) {
    const int64_t most = ranks.capacity / (int64_t)sizeof(T);
    for (int64_t start = 0; start < count; start += most) {
        const int64_t size = std::min(most, count - start);
        const uint64_t number = exchange(ranks, x + start, size * (int64_t)sizeof(T));
        run_ranges(context, (size + kLanes - 1) / kLanes, 1024, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * kLanes; i < std::min(end * kLanes, size); i += kLanes) {
                const int part = (int)std::min<int64_t>(kLanes, size - i);
                vf sum{};
                for (int64_t rank = 0; rank < ranks.size; rank++) {
                    const T* const theirs = (const T*)place_of(ranks, rank, number) + i;
                    sum += part == kLanes ? load(theirs) : load_part(theirs, part);
                }
                if (part == kLanes)
                    store(x + start + i, sum);
                else
                    store_part(x + start + i, sum, part);
            }
        });
    }
}

// out: what each rank has at x, bytes <= capacity each, in the order of the ranks.
inline void gather_ranks(const Ranks& ranks, const void* x, int64_t bytes, char* out) {
    const uint64_t number = exchange(ranks, x, bytes);
    for (int64_t rank = 0; rank < ranks.size; rank++) std::memcpy(out + rank * bytes, place_of(ranks, rank, number), bytes);
}

}  // namespace vsl
