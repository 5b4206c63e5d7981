"""How fast this machine multiplies and adds in fp32 with the instructions of a kernels' target, from registers alone.

torch's products use the best instructions that the CPU has, so they say nothing of a target that was forced on it.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vibe_sgl_lite.model_worker.cpu.targets import choose_target

CHAINS = 12  # of sums that wait for themselves: more than two units of four cycles need
ROUNDS = 20_000_000
LANES = {"avx512f": 16, "avx2": 8}
SOURCE = """
typedef float lanes __attribute__((vector_size(LANES * 4)));
extern "C" float run(long rounds) {
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
"""


def fma_gflops(target: str | None, threads: int) -> float:
    """Of all threads together, the best of five. x86-64 alone. Raises OSError or CalledProcessError without a g++."""
    chosen = choose_target(target)
    lanes = next((lanes for feature, lanes in LANES.items() if feature in chosen.features), 4)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        macros = [f"-DLANES={lanes}", f"-DCHAINS={CHAINS}"]
        command = ["g++", "-O2", "-shared", "-fPIC", "-ffp-contract=fast", *chosen.flags, *macros, "-x", "c++", "-"]
        subprocess.run([*command, "-o", str(library)], input=SOURCE, text=True, check=True)
        run = ctypes.CDLL(str(library)).run
        run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
        best = float("inf")
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(5):
                start = time.perf_counter()
                list(pool.map(run, [ROUNDS] * threads))
                best = min(best, time.perf_counter() - start)
    return 2 * lanes * CHAINS * ROUNDS * threads / best / 1e9
