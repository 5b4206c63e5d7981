"""Builds wheels: one that runs everywhere, and for each platform one with the CPU kernels inside, compiled.

python tools/build_wheels.py [--platform x86_64 aarch64 ...] [--targets avx2 ...] [--out dist]

A platform's wheel is the other one plus a shared object for each of its targets (model_worker/cpu/targets.py), so that
the first start there needs no C++ compiler. Objects for another machine than this one need its cross compiler:
on Debian, g++-aarch64-linux-gnu. Takes half a minute of CPU time for each target.
"""

import argparse
import base64
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vibe_sgl_lite.model_worker.cpu.build import COMPILERS, BuildError, compile_prebuilt  # noqa: E402
from vibe_sgl_lite.model_worker.cpu.targets import TARGETS  # noqa: E402

INSIDE = "vibe_sgl_lite/model_worker/cpu/prebuilt"
# What manylinux_2_27 to manylinux_2_31 may expect of the C++ runtime, which is there because torch needs it too. Were
# it linked in, it would ask for the C library of the machine that builds: 2.36 on Debian 12.
CPP_RUNTIME = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
OLDEST_GLIBC, NEWEST_GLIBC = 17, 31  # 2.x; manylinux begins with the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", nargs="*", choices=list(TARGETS), default=[platform.machine()])
    parser.add_argument("--targets", nargs="*", help="only these of the platform's")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--no-isolation", action="store_true", help="use the setuptools that is installed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pure = build_pure(Path(temporary), isolated=not args.no_isolation)
        for machine in args.platform:
            folder = Path(temporary) / machine
            folder.mkdir()
            objects = compile_all(machine, args.targets, folder)
            _say(add_objects(pure, objects, f"manylinux_2_{glibc_minor(objects)}_{machine}", args.out))
        _say(Path(shutil.copy(pure, args.out)))


def build_pure(folder: Path, *, isolated: bool) -> Path:
    """From a copy of the checkout: setuptools leaves files behind, and would put them into the next wheel."""
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, *([] if isolated else ["--no-build-isolation"]), str(source)], check=True)
    (wheel,) = folder.glob("*-none-any.whl")
    return wheel


def compile_all(machine: str, names: Sequence[str] | None, folder: Path) -> list[Path]:
    """The objects of a platform's targets, or of those named."""
    compiler = find_compiler(machine)
    targets = [target for target in TARGETS[machine] if not names or target.name in names]
    if not targets:
        raise SystemExit(f"{machine} has no such target: it has {', '.join(t.name for t in TARGETS[machine])}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda target: compile_prebuilt(compiler, target, folder), targets))


def find_compiler(machine: str) -> str:
    own = (os.environ.get("CXX", ""), *COMPILERS) if machine == platform.machine() else ()
    wanted: list[str] = [name for name in (*own, f"{machine}-linux-gnu-g++") if name]
    for name in wanted:
        found = shutil.which(name)
        if found is not None:
            return found
    raise SystemExit(f"no compiler for {machine}: looked for {', '.join(wanted)}")


def glibc_minor(objects: Sequence[Path]) -> int:
    """x of the oldest glibc 2.x that has all symbols which the objects use, as their tables of versions name them."""
    contents = b"".join(path.read_bytes() for path in objects)
    for library, most in CPP_RUNTIME.items():
        for version in re.findall(rb"\0" + library.encode() + rb"_([0-9.]+)(?=\0)", contents):
            if tuple(map(int, version.split(b"."))) > most:
                raise SystemExit(f"the objects need {library}_{version.decode()}: build with an older compiler")
    minor = max([OLDEST_GLIBC, *map(int, re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", contents))])
    if minor > NEWEST_GLIBC:
        raise SystemExit(f"the objects need glibc 2.{minor}: build on an older system")
    return minor


def add_objects(pure: Path, objects: Sequence[Path], tag: str, folder: Path) -> Path:
    """Writes a wheel for the platform `tag`: what is in `pure`, and the objects."""
    wheel = folder / pure.name.replace("-none-any.", f"-none-{tag}.")
    record = []
    with ZipFile(pure) as source, ZipFile(wheel, "w", ZIP_DEFLATED) as out:

        def write(info: ZipInfo, data: bytes) -> None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{info.filename},sha256={digest},{len(data)}\n")
            out.writestr(info, data, ZIP_DEFLATED)

        *entries, last = source.infolist()
        assert last.filename.endswith(".dist-info/RECORD"), "wheels end with their list of files"
        for path in objects:
            info = ZipInfo(f"{INSIDE}/{path.name}", entries[0].date_time)
            info.external_attr = 0o100755 << 16
            write(info, path.read_bytes())
        for entry in entries:
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/WHEEL"):
                data = data.replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
                data = data.replace(b"-none-any", f"-none-{tag}".encode())
            write(entry, data)
        out.writestr(last, "".join(record) + f"{last.filename},,\n", ZIP_DEFLATED)
    return wheel


def _say(wheel: Path) -> None:
    print(f"{wheel}  {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        raise SystemExit(str(error)) from error
