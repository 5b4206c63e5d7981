"""How fast this machine multiplies and adds in fp32 with the instructions of a kernels' target, from registers alone,
and how fast it reads memory in huge pages, as the kernels' weights are.

torch's products use the best instructions that the CPU has, so they say nothing of a target that was forced on it.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vibe_sgl_lite.model_worker.cpu.targets import Target, choose_target

CHAINS = 12  # of sums that wait for themselves: more than two units of four cycles need
ROUNDS = 20_000_000
READ_BYTES = 1 << 29  # by each thread
TRIES = 5
LANES = {"avx512f": 16, "avx2": 8}
SOURCE = """
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
typedef float lanes __attribute__((vector_size(LANES * 4)));
extern "C" float multiply(long rounds) {
    lanes sums[CHAINS], a = {}, b = {};
    for (int i = 0; i < LANES; i++) a[i] = 0.5f, b[i] = 1e-3f * i;
    for (int c = 0; c < CHAINS; c++) sums[c] = b + (float)c;
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * a + b;
        asm volatile("" : "+x"(a), "+x"(b));
    }
    float total = 0;
    for (int c = 0; c < CHAINS; c++) total += sums[c][0];
    return total;
}
extern "C" void* room(long bytes) {
    void* memory = aligned_alloc(2 << 20, bytes);
    if (memory == nullptr) return nullptr;
    madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 1, bytes);
    return memory;
}
extern "C" void give_back(void* memory) { free(memory); }
extern "C" float read_all(const void* memory, long bytes) {
    const lanes* at = (const lanes*)memory;
    lanes sums[8] = {};
    for (const char* end = (const char*)memory + bytes; (const char*)at < end; at += 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __builtin_prefetch((const char*)(at + i) + 4096);
            sums[i] += at[i];
        }
    }
    float total = 0;
    for (int i = 0; i < 8; i++) total += sums[i][0];
    return total;
}
"""


def fma_gflops(target: str | None, threads: int) -> float:
    """Of all threads together, the best of five. x86-64 alone. Raises OSError or CalledProcessError without a g++."""
    chosen = choose_target(target)
    library = _library(chosen)
    library.multiply.argtypes, library.multiply.restype = [ctypes.c_long], ctypes.c_float
    best = _best(lambda _: library.multiply(ROUNDS), threads)
    return 2 * _lanes(chosen) * CHAINS * ROUNDS * threads / best / 1e9


def read_gb_s(threads: int) -> float:
    """The same of reads, each thread through memory of its own."""
    library = _library(choose_target(None))
    library.room.argtypes, library.room.restype = [ctypes.c_long], ctypes.c_void_p
    library.give_back.argtypes = [ctypes.c_void_p]
    library.read_all.argtypes, library.read_all.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    rooms = [library.room(READ_BYTES) for _ in range(threads)]
    try:
        assert all(rooms), "no memory"
        best = _best(lambda thread: library.read_all(rooms[thread], READ_BYTES), threads)
    finally:
        for memory in rooms:
            library.give_back(memory)
    return READ_BYTES * threads / best / 1e9


def _best(work: Callable[[int], object], threads: int) -> float:
    """Seconds, at best, that `work` of each thread takes side by side."""
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIES):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            best = min(best, time.perf_counter() - start)
    return best


def _lanes(target: Target) -> int:
    return next((lanes for feature, lanes in LANES.items() if feature in target.features), 4)


def _library(target: Target) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rates.so"
        macros = [f"-DLANES={_lanes(target)}", f"-DCHAINS={CHAINS}"]
        command = ["g++", "-O2", "-shared", "-fPIC", "-ffp-contract=fast", *target.flags, *macros, "-x", "c++", "-"]
        subprocess.run([*command, "-o", str(path)], input=SOURCE, text=True, check=True)
        return ctypes.CDLL(str(path))
