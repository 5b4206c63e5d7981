// A product of rows with a matrix, as cluster_product.py launches it: grid (blocks of outputs, blocks of rows, splits),
// the splits of a tile being one cluster.
//
// One warp has the card's copy engine bring boxes of the matrix and of x into a ring in shared memory; the others
// multiply them (wgmma), the matrix's rows as rows of the instruction. The matrix's first boxes are asked for before the
// kernel before this one has ended. The parts of sums that a block has then lie in its shared memory, and each block of
// the cluster adds up some rows of all of them, in order, so that the same input gives the same bits.
//
// Constants come before this file: ROWS, TILE (of the matrix's rows), SPAN (outputs that a tile really has; what lies
// behind these is multiplied too, whatever it is, and left), K, N, SPLITS, RING (stages), PARTS (of each row's sum of
// squares; 0: no norm), ADD (into the stream), SILU (the matrix's rows are N for gate, N for up), HALF (fp16, else bf16),
// RANKS (that the result is sent to, for the sum of all_reduce.py; 0: it is stored); and `multiply`, which adds a wgmma
// of 16 inputs to the sums.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    char bytes[128];
};

constexpr int DEPTH = 64;  // inputs a step: lines of 128 bytes, which the copy engine swizzles
constexpr int THREADS = TILE * 2, OUTPUTS = SILU ? TILE / 2 : TILE, STEPS = K / SPLITS / DEPTH;
constexpr int LINE = DEPTH * 2, UP = (SPAN + 7) / 8 * 8 * LINE;  // from gate to up, in whole patterns of the swizzle
constexpr int MATRIX_BYTES = SILU ? 2 * UP : UP, STAGE = MATRIX_BYTES + ROWS * LINE;
constexpr int BROUGHT = ((SILU ? 2 : 1) * SPAN + ROWS) * LINE;
constexpr int PEERS = RANKS > 0 ? RANKS : 1;
constexpr long long CALL = 1 << 20;  // as in all_reduce.py
constexpr int STRIDE = TILE + 4;  // of a row's sums, so that no two threads of a warp store to one bank
constexpr int SUMS_BYTES = ROWS * STRIDE * 4, RING_BYTES = RING * STAGE;
constexpr int DATA = SUMS_BYTES > RING_BYTES ? SUMS_BYTES : RING_BYTES;  // the sums lie where the ring was
constexpr int OWN = ROWS / SPLITS;  // rows that a block adds up; a thread of it four outputs of one at a time
constexpr int LANES = SPAN / 4, ITEMS = OWN * LANES, TURNS = (ITEMS + THREADS - 1) / THREADS;

__device__ __forceinline__ void init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra THERE;\n"
        "bra AGAIN;\nTHERE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void bring(u32 to, const TensorMap& map, int column, int line, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(&map), "r"(column), "r"(line), "r"(barrier) : "memory");
}

__device__ __forceinline__ void meet_cluster() {
    if (SPLITS == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}

// What wgmma takes for a box: swizzled lines of 128 bytes, eight of which are 1,024 bytes.
__device__ __forceinline__ u64 box(u32 at) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ float number(u32 bits) {
#if HALF
    float value;
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(bits & 0xFFFF));
    return value;
#else
    return __uint_as_float(bits << 16);
#endif
}

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 bits;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}

// Four sums that lie at the same place in all blocks of the cluster.
__device__ __forceinline__ float4 add_up(u32 at) {
    float4 parts[SPLITS];
#pragma unroll
    for (int split = 0; split < SPLITS; split++) {
        float4& v = parts[split];
        u32 there = at;
        if (SPLITS > 1) asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(split));
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    }
    float4 total = parts[0];
#pragma unroll
    for (int split = 1; split < SPLITS; split++) {
        total.x += parts[split].x;
        total.y += parts[split].y;
        total.z += parts[split].z;
        total.w += parts[split].w;
    }
    return total;
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// As it is sent to a sum: not zero (all_reduce.py).
__device__ __forceinline__ u32 sent(u32 word) { return ~word == 0 ? 0x80000000u : ~word; }

// addend, gain, output and gained in fours of 16 bits. rows: of x, which its boxes may reach beyond. regions, calls, rank,
// inbox, size: of `send_block` (all_reduce.py).
extern "C" __global__ void __launch_bounds__(THREADS + 32) product(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap matrix_map, const float* squares,
    const uint2* addend, const uint2* gain, uint2* output, uint2* gained, float* new_squares, int rows, float eps,
    const long long* regions, const long long* calls, int rank, int inbox, int size
) {
    extern __shared__ __align__(1024) char shared[];
    u32 data = (u32)__cvta_generic_to_shared(shared), full = data + DATA, empty = full + 8 * RING;
    float* factors = (float*)(shared + DATA + 16 * RING);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int tile = blockIdx.x, first_row = blockIdx.y * ROWS, split = blockIdx.z, first = split * (K / SPLITS);
    bool multiplies = thread < THREADS, brings = thread == THREADS;
    if (RANKS == 0) asm volatile("griddepcontrol.launch_dependents;");

    auto bring_matrix = [&](int step) {
        u32 to = data + step % RING * STAGE, barrier = full + 8 * (step % RING);
        expect(barrier, BROUGHT);
        bring(to, matrix_map, first + step * DEPTH, tile * SPAN, barrier);
        if (SILU) bring(to + UP, matrix_map, first + step * DEPTH, N + tile * SPAN, barrier);
    };
    auto bring_x = [&](int step) {
        u32 to = data + step % RING * STAGE + MATRIX_BYTES;
        bring(to, x_map, first + step * DEPTH, first_row, full + 8 * (step % RING));
    };
    if (brings) {
        for (int stage = 0; stage < RING; stage++) {
            init(full + 8 * stage, 1);
            init(empty + 8 * stage, THREADS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int step = 0; step < RING; step++) bring_matrix(step);
    }
    __syncthreads();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    // A sum begins beside this, and reads what the kernels before have left.
    if (RANKS > 0) asm volatile("griddepcontrol.launch_dependents;");
    if (brings) {
        for (int step = 0; step < RING; step++) bring_x(step);
        for (int step = RING; step < STEPS; step++) {
            wait(empty + 8 * (step % RING), (step / RING - 1) & 1);
            bring_matrix(step);
            bring_x(step);
        }
    }
    __syncwarp();

    uint2 addends[TURNS], gains[TURNS];
    if (ADD && multiplies) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int item = turn * THREADS + thread, row = first_row + split * OWN + item / LANES;
            int place = tile * LANES + item % LANES;
            addends[turn] = item < ITEMS && row < rows ? addend[row * (N / 4) + place] : make_uint2(0, 0);
            gains[turn] = gain[place];
        }
    }
    if (multiplies) {
        for (int own = thread; PARTS > 0 && own < OWN; own += THREADS) {
            int row = first_row + split * OWN + own;
            float sum = 0;
#pragma unroll
            for (int part = 0; part < PARTS / 4; part++) {
                float4 four = row < rows ? ((const float4*)squares)[row * (PARTS / 4) + part] : make_float4(0, 0, 0, 0);
                sum += (four.x + four.y) + (four.z + four.w);
            }
            for (int part = PARTS / 4 * 4; part < PARTS; part++) sum += row < rows ? squares[row * PARTS + part] : 0;
            factors[own] = rsqrtf(sum / K + eps);
        }
        float sums[ROWS / 2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) sums[i] = 0;
        constexpr int GROUPS = OUTPUTS < 64 ? 1 : OUTPUTS / 64;  // of four warps, for gate and as many for up
        int group = warp / 4, lines = group * 64 * LINE;
        if (SILU && SPAN < OUTPUTS) lines = group / GROUPS * UP + group % GROUPS * 64 * LINE;
        for (int step = 0; step < STEPS; step++) {
            u32 stage = data + step % RING * STAGE;
            wait(full + 8 * (step % RING), step / RING & 1);
            u64 matrix_box = box(stage + lines), x_box = box(stage + MATRIX_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++) multiply(sums, matrix_box + 2 * k, x_box + 2 * k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (STEPS > RING) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (step > 0 && lane == 0) arrive(empty + 8 * ((step - 1) % RING));
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sums[i])::"memory");
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");  // nobody multiplies any more
        float* column = (float*)shared + warp * 16 + lane / 4;  // as wgmma spreads a tile over its threads
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
            float* at = column + (i * 8 + lane % 4 * 2) * STRIDE;
            at[0] = sums[4 * i];
            at[STRIDE] = sums[4 * i + 1];
            at[8] = sums[4 * i + 2];
            at[STRIDE + 8] = sums[4 * i + 3];
        }
    }
    meet_cluster();
    if (multiplies) {
        uint2* inboxes[PEERS];
        if (RANKS > 0) {
            long long call = *(volatile const long long*)calls / CALL + 1;
            long long start = inbox + ((call & 1) * RANKS + rank) * size;
#pragma unroll
            for (int turn = 0; turn < RANKS; turn++)  // this rank's last
                inboxes[turn] = (uint2*)(regions[(rank + 1 + turn) % PEERS] + start);
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int item = turn * THREADS + thread, own = item / LANES, row = first_row + split * OWN + own;
            int place = row * (N / 4) + tile * LANES + item % LANES;
            bool here = item < ITEMS && row < rows;
            u32 at = data + ((split * OWN + own) * STRIDE + item % LANES * 4) * 4;
            float4 v = here ? add_up(at) : make_float4(0, 0, 0, 0);
            float factor = PARTS > 0 && here ? factors[own] : 1.0f;
            v = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
            if (SILU) {
                float4 up = here ? add_up(at + OUTPUTS * 4) : v;
                v = make_float4(
                    gated(v.x, up.x * factor), gated(v.y, up.y * factor), gated(v.z, up.z * factor),
                    gated(v.w, up.w * factor));
            }
            if (ADD) {
                v.x += number(addends[turn].x);
                v.y += number(addends[turn].x >> 16);
                v.z += number(addends[turn].y);
                v.w += number(addends[turn].y >> 16);
            }
            uint2 result = make_uint2(pair(v.x, v.y), pair(v.z, v.w));
            if (RANKS > 0) {
                result = make_uint2(sent(result.x), sent(result.y));
#pragma unroll
                for (int turn = 0; turn < RANKS; turn++)
                    if (here) inboxes[turn][place] = result;
            } else if (here) {
                output[place] = result;
            }
            if (ADD) {
                v = make_float4(number(result.x), number(result.x >> 16), number(result.y), number(result.y >> 16));
                uint2 g = gains[turn];
                g.x = pair(v.x * number(g.x), v.y * number(g.x >> 16));
                g.y = pair(v.z * number(g.y), v.w * number(g.y >> 16));
                if (here) gained[place] = g;
                float square = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
#pragma unroll
                for (int other = 1; other < LANES; other *= 2) square += __shfl_xor_sync(0xFFFFFFFF, square, other);
                if (here && item % LANES == 0) new_squares[row * (N / OUTPUTS) + tile] = square;
            }
        }
    }
    if (SPLITS > 1) meet_cluster();  // nobody reads what lies here any more
}
