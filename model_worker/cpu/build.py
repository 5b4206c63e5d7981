"""Compiles the C++ kernels into a shared object, once per source, compiler and CPU, into a per-user cache.

Wheels for a platform bring objects of their own (tools/build_wheels.py), and `prebuilt` finds them. Knows nothing about
what the kernels do, nor how the cache's folder is kept (model_worker/kernel_cache.py).
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vibe_sgl_lite.model_worker.cpu.library import layout_source
from vibe_sgl_lite.model_worker.cpu.targets import Target, choose_target
from vibe_sgl_lite.model_worker.kernel_cache import (
    CacheError,
    default_cache_dir,
    is_ours,
    locked,
    make_private,
    whole_file,
)

SOURCE_DIR = Path(__file__).parent / "native"
MAIN_SOURCE = "kernels.cpp"
# gcc warns of vectors between functions, which are all inlined, and of what may be uninitialised in its own intrinsics.
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-ignored-attributes",
)
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", *WARNINGS)
PREBUILT_FLAGS = ("-s",)  # without symbols that only a debugger reads
PREBUILT_DIR = Path(__file__).parent / "prebuilt"
# Runs the compiler, which starts more processes, in a session of its own that ends with this process, however it ends:
# when it is killed, a pipe that it alone holds open ends.
GUARD = '( exec < /dev/fd/{life} || exit; read _; kill -9 0 ) & "$@"; code=$?; kill -9 $!; exit $code'
COMPILE_TIMEOUT_S = 900  # half a minute of CPU time, of which a busy machine may give little

log = logging.getLogger(__name__)


class BuildError(Exception):
    """The kernels could not be built; the message says why. Callers carry on without them."""


def build(
    cache_dir: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    target: Target | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """The compiled kernels' path, compiled now if the cache has none.

    cache_dir: made with mode 0700 when missing; None: `default_cache_dir()`. compilers: names or paths, the first one
    that exists is used; the environment's CXX goes first. target: for which CPU; None: the best that this one runs.
    flags: more of the compiler's. Safe to call from several processes at once: one compiles, the others wait for it.

    Raises BuildError when there is no compiler, it fails, or the folder is not private to this user.
    """
    compiler = _find_compiler(compilers)
    attempts = [(*flags, *attempt) for attempt in (target or choose_target()).attempts]
    name = f"cpu_kernels-{_fingerprint(compiler, attempts)}.so"
    try:
        folder = default_cache_dir() if cache_dir is None else cache_dir
        make_private(folder)
        built = folder / name
        if not is_ours(built):
            with locked(folder / "lock"):
                if not is_ours(built):
                    for unfinished in folder.glob("cpu_kernels-*.[0-9]*"):  # of one that was killed: we hold the lock
                        unfinished.unlink()
                    log.info("compiling the CPU kernels with %s into %s, once: up to a minute", compiler, folder)
                    _compile(compiler, attempts, built)
    except CacheError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"cannot use the cache folder {folder}: {error}") from error
    return built


def prebuilt(target: Target) -> Path | None:
    """The object that came with this installation; None if there is none of these very sources."""
    path = PREBUILT_DIR / prebuilt_name(target)
    return path if path.is_file() else None


def prebuilt_name(target: Target) -> str:
    """Changes with the sources and flags, so that an object of others is never taken for one of these."""
    digest = _digest_sources()
    digest.update(str((FLAGS, target.flags)).encode())
    return f"{target.name}-{digest.hexdigest()[:24]}.so"


def compile_prebuilt(compiler: str, target: Target, folder: Path) -> Path:
    """An object for any CPU of that target, and for other machines than this one; `compiler` may be a cross compiler.

    Raises BuildError when the compiler does not run, or fails.
    """
    built = folder / prebuilt_name(target)
    _compile(compiler, [(*PREBUILT_FLAGS, *target.flags)], built)
    return built


def _find_compiler(compilers: Sequence[str]) -> str:
    for name in (os.environ.get("CXX", ""), *compilers):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    raise BuildError(f"no C++ compiler found (looked for $CXX, {', '.join(compilers)})")


def _digest_sources() -> "hashlib._Hash":
    digest = hashlib.sha256()
    for source in sorted(SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest


def _fingerprint(compiler: str, attempts: Sequence[Sequence[str]]) -> str:
    """Changes with whatever changes the result: sources, flags, compiler, the CPU that `native` stands for."""
    digest = _digest_sources()
    version = _run([compiler, "--version"])
    for part in (*FLAGS, str(attempts), compiler, version, platform.platform(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() + platform.machine()
    # One core's worth; "flags" on x86, "Features" on Arm.
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: str, attempts: Sequence[Sequence[str]], built: Path) -> None:
    errors = []
    with whole_file(built, 0o700) as unfinished:
        for cpu_flags in attempts:
            command = [compiler, *FLAGS, *cpu_flags, f"-I{SOURCE_DIR}", "-x", "c++", "-", "-o", str(unfinished)]
            try:
                _run(command, f'#include "{MAIN_SOURCE}"\n{layout_source()}')
            except BuildError as error:
                errors.append(str(error))
            else:
                return
        raise BuildError(errors[0])


def _run(command: Sequence[str], source: str = "") -> str:
    life, held = os.pipe()
    guarded = ["sh", "-c", GUARD.format(life=life), "sh", *command]
    try:
        done = subprocess.run(
            guarded, input=source, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False,
            pass_fds=(life,), start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    finally:
        os.close(life)
        os.close(held)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
    return done.stdout
