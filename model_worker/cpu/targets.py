"""The instruction sets that the kernels are compiled for, one shared object each; the best that the CPU runs is used.

The environment's VIBE_SGL_LITE_CPU_TARGET names another one: `avx2` shows on a larger machine what a laptop does.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from vibe_sgl_lite.runtime.errors import ConfigError

VARIABLE = "VIBE_SGL_LITE_CPU_TARGET"

_AVX2 = "avx2 fma f16c bmi1 bmi2 movbe abm"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"
_AVX512_BF16 = f"{_AVX512} avx512_vnni avx512_bf16"


@dataclass(frozen=True)
class Target:
    """features: what the CPU must have, as Linux names it. flags: of the compiler, for any such CPU.

    tuning: more of them, each to be tried before, for the very CPU that compiles.
    """

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]
    tuning: tuple[str, ...] = ("-mtune=native",)

    @property
    def attempts(self) -> tuple[tuple[str, ...], ...]:
        """Compiler flags for this CPU, the first that work to be used: not every compiler knows every spelling."""
        return (*((*self.flags, flag) for flag in self.tuning), self.flags)


def _target(name: str, features: str, *flags: str) -> Target:
    return Target(name, frozenset(features.split()), flags)


_BF16_FLAGS = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16")
# By architecture, the best one first, the last one for every CPU of it.
TARGETS = {
    "x86_64": (
        _target(
            "amx", f"{_AVX512_BF16} amx_tile amx_bf16 amx_int8", *_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"
        ),
        _target("avx512_bf16", _AVX512_BF16, *_BF16_FLAGS),
        _target("avx512", _AVX512, "-march=x86-64-v4"),
        _target("avx_vnni", f"{_AVX2} avx_vnni", "-march=x86-64-v3", "-mavxvnni"),
        _target("avx2", _AVX2, "-march=x86-64-v3"),
        _target("baseline", ""),
    ),
    "aarch64": (
        _target("neon_bf16", "asimddp bf16 i8mm", "-march=armv8.2-a+dotprod+bf16+i8mm"),
        _target("neon_dotprod", "asimddp", "-march=armv8.2-a+dotprod"),
        _target("neon", ""),
    ),
}
# A kernel for the plain architecture is better than none.
_OTHER_MACHINES = Target("baseline", frozenset(), (), ("-mcpu=native", "-march=native"))


def runnable_targets() -> list[Target]:
    """Those whose instructions this CPU has, the best one first."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    features = _cpu_features()
    return [target for target in TARGETS.get(machine, (_OTHER_MACHINES,)) if target.features <= features]


def choose_target(name: str | None = None) -> Target:
    """The one named, by `name` or else the environment, or the best one.

    Raises ConfigError for a name that is unknown or that this CPU cannot run.
    """
    name = name or os.environ.get(VARIABLE)
    targets = {target.name: target for target in runnable_targets()}
    if not name:
        return next(iter(targets.values()))
    if name not in targets:
        raise ConfigError(
            f"{VARIABLE} is {name!r}, but this CPU runs {', '.join(targets)}: use one of them", field=VARIABLE
        )
    return targets[name]


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # a Mac; all of Apple's own CPUs have dot products
        return frozenset({"asimddp"})
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
