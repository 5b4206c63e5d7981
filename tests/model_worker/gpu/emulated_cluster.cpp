// What cluster_product.cu asks of a card, by threads of the CPU: blocks with memory and barriers, boxes that are swizzled,
// wgmma. cluster_emulator.py puts that source, without its own forms of these, in the place of SOURCE.
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __shfl_xor_sync(mask, value, other) exchange(value, other)

struct uint2 { unsigned x, y; };
struct float4 { float x, y, z, w; };
struct Place { unsigned x, y, z; };
struct Matrix { const uint16_t* data; int lines, columns, box; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

class Meeting {
    std::mutex lock;
    std::condition_variable changed;
    unsigned count, left, phase = 0;

public:
    explicit Meeting(unsigned threads) : count(threads), left(threads) {}
    void meet() {
        std::unique_lock<std::mutex> held(lock);
        unsigned before = phase;
        if (--left == 0) {
            left = count;
            phase++;
            changed.notify_all();
        } else {
            changed.wait(held, [&] { return phase != before; });
        }
    }
};

struct Signal {  // an mbarrier
    std::mutex lock;
    std::condition_variable changed;
    int count = 0, left = 0, bytes = 0;
    unsigned phase = 0;

    void change(int arrived, int more) {
        std::lock_guard<std::mutex> held(lock);
        left -= arrived;
        bytes += more;
        if (left == 0 && bytes == 0) {
            left = count;
            phase ^= 1;
            changed.notify_all();
        }
    }
};

constexpr int WINDOW = 1 << 20;  // addresses of one block
struct Block {
    std::vector<char> room = std::vector<char>(WINDOW + 1024);
    char* memory = (char*)(((uintptr_t)room.data() + 1023) / 1024 * 1024);
    std::vector<Signal> signals = std::vector<Signal>(256);
    std::unique_ptr<Meeting> all, multiplying;
    std::vector<std::unique_ptr<Meeting>> warps;
    std::vector<float> values = std::vector<float>(1024);
};

std::vector<Block> blocks;
std::unique_ptr<Meeting> cluster;
thread_local Place threadIdx, blockIdx;
thread_local Block* mine;

inline float exchange(float value, int other) {
    unsigned thread = threadIdx.x;
    mine->values[thread] = value;
    mine->warps[thread / 32]->meet();
    float got = mine->values[thread ^ other];
    mine->warps[thread / 32]->meet();
    return got;
}
inline void __syncthreads() { mine->all->meet(); }
inline void __syncwarp() {}
inline void warp_meets() { mine->warps[threadIdx.x / 32]->meet(); }  // its threads are one, as for wgmma
inline unsigned address_of(const char* at) { return (unsigned)(mine - blocks.data()) * WINDOW + (unsigned)(at - mine->memory); }
inline char* memory_at(unsigned at) { return blocks[at / WINDOW].memory + at % WINDOW; }
inline unsigned swizzled(unsigned at) { return at ^ (at >> 7 & 7) << 4; }

extern int signals_begin;
inline Signal& signal_at(unsigned at) { return blocks[at / WINDOW].signals[(at % WINDOW - signals_begin) / 8]; }
inline void init(unsigned at, unsigned count) { signal_at(at).count = signal_at(at).left = count; }
inline void expect(unsigned at, unsigned bytes) { signal_at(at).change(1, bytes); }
inline void arrive(unsigned at) { signal_at(at).change(1, 0); }
inline void wait(unsigned at, unsigned parity) {
    Signal& signal = signal_at(at);
    std::unique_lock<std::mutex> held(signal.lock);
    signal.changed.wait(held, [&] { return signal.phase != parity; });
}
inline void multiplying_meet() { mine->multiplying->meet(); }

template <class Map> void bring(unsigned to, const Map& map, int column, int line, unsigned barrier) {
    Matrix matrix;
    std::memcpy(&matrix, &map, sizeof matrix);
    for (int i = 0; i < matrix.box; i++)
        for (int j = 0; j < 64; j++) {
            bool inside = line + i < matrix.lines && column + j < matrix.columns;
            uint16_t value = inside ? matrix.data[(line + i) * matrix.columns + column + j] : 0;
            std::memcpy(memory_at(to / WINDOW * WINDOW + swizzled(to % WINDOW + i * 128 + j * 2)), &value, 2);
        }
    signal_at(barrier).change(0, -matrix.box * 128);
}

inline float number(unsigned bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned half_of(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline unsigned pair(float low, float high) { return half_of(low) | half_of(high) << 16; }

inline float element(uint64_t box, int line, int k) {
    unsigned at = (unsigned)(box & 0x3FFF) * 16 + line / 8 * 1024 + line % 8 * 128 + k * 2;
    uint16_t bits;
    std::memcpy(&bits, mine->memory + swizzled(at), 2);
    return number(bits);
}
template <int COUNT> void multiply(float (&sums)[COUNT], unsigned long long matrix_box, unsigned long long x_box) {
    int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < COUNT; i++) {
        int line = warp * 16 + lane / 4 + i / 2 % 2 * 8, row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) sums[i] += element(matrix_box, line, k) * element(x_box, row, k);
    }
}

#define __cvta_generic_to_shared(at) address_of(at)
SOURCE

int signals_begin = DATA;

inline void meet_cluster() { cluster->meet(); }
inline float4 add_up(u32 at) {
    float4 total = {0, 0, 0, 0};
    for (int split = 0; split < SPLITS; split++) {
        float4 v;
        std::memcpy(&v, memory_at(split * WINDOW + at % WINDOW), 16);
        total = split ? make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w) : v;
    }
    return total;
}

extern "C" void run(
    Matrix x, Matrix matrix, const float* squares, const uint2* addend, const uint2* gain, uint2* output, uint2* gained,
    float* new_squares, int rows, float eps
) {
    TensorMap x_map, matrix_map;
    std::memcpy(&x_map, &x, sizeof x);
    std::memcpy(&matrix_map, &matrix, sizeof matrix);
    for (unsigned tile = 0; tile < N / SPAN; tile++)
        for (unsigned row = 0; row * ROWS < (unsigned)rows; row++) {
            blocks = std::vector<Block>(SPLITS);
            cluster = std::make_unique<Meeting>(SPLITS * (THREADS + 32));
            for (Block& block : blocks) {
                block.all = std::make_unique<Meeting>(THREADS + 32);
                block.multiplying = std::make_unique<Meeting>(THREADS);
                for (int warp = 0; warp < THREADS / 32; warp++)
                    block.warps.push_back(std::make_unique<Meeting>(32));
            }
            std::vector<std::thread> threads;
            for (unsigned split = 0; split < SPLITS; split++)
                for (unsigned thread = 0; thread < THREADS + 32; thread++)
                    threads.emplace_back([=] {
                        threadIdx = {thread, 0, 0};
                        blockIdx = {tile, row, split};
                        mine = &blocks[split];
                        product(x_map, matrix_map, squares, addend, gain, output, gained, new_squares, rows, eps, nullptr,
                                nullptr, 0, 0, 0);
                    });
            for (std::thread& thread : threads) thread.join();
        }
}
