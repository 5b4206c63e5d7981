"""Kernels that an installation brings: used where they are of these very sources, or else compiled."""

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
import torch

from tests.model_worker.cpu.test_build import compilations, compiler
from tools import build_wheels
from vibe_sgl_lite.model_worker.cpu import CpuKernels, build, load
from vibe_sgl_lite.model_worker.cpu.build import PREBUILT_DIR, prebuilt, prebuilt_name
from vibe_sgl_lite.model_worker.cpu.targets import TARGETS, choose_target, runnable_targets

ROOT = Path(__file__).parents[3]
NO_COMPILER = ["no-such-compiler"]

__all__ = ["compiler"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this installation has its objects: a folder with none."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "PREBUILT_DIR", tmp_path / "prebuilt")
    (tmp_path / "prebuilt").mkdir()
    return tmp_path / "prebuilt"


def bring(folder: Path, source: Path | None = None) -> Path:
    """An object for the best target of this CPU."""
    target = choose_target()
    return Path(shutil.copy(source or build.build(target=target), folder / prebuilt_name(target)))


def works(kernels: CpuKernels | None) -> bool:
    return kernels is not None and kernels.argmax(torch.tensor([[1.0, 3, 2]])).tolist() == [1]


def test_objects_of_the_installation_need_no_compiler(tmp_path: Path, installed: Path) -> None:
    assert load(tmp_path / "cache", NO_COMPILER) is None
    bring(installed)
    assert works(load(tmp_path / "cache", NO_COMPILER))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_each_target_has_an_object_of_its_own(installed: Path) -> None:
    names = {prebuilt_name(target) for targets in TARGETS.values() for target in targets}
    assert len(names) == sum(map(len, TARGETS.values()))
    best, *others = runnable_targets()
    brought = bring(installed)
    assert prebuilt(best) == brought
    assert [prebuilt(other) for other in others] == [None] * len(others)


def test_changed_sources_are_compiled(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    bring(installed)
    sources = Path(shutil.copytree(build.SOURCE_DIR, tmp_path / "native"))
    monkeypatch.setattr(build, "SOURCE_DIR", sources)
    assert works(load(tmp_path / "cache", NO_COMPILER))
    with (sources / "simd.h").open("a") as file:
        file.write("// changed\n")
    assert prebuilt(choose_target()) is None
    assert load(tmp_path / "cache", [compiler]) is None  # what this one compiles is no object, but it was asked
    assert compilations(tmp_path) == 1


def test_more_flags_are_compiled(tmp_path: Path, installed: Path) -> None:
    bring(installed)
    assert load(tmp_path / "cache", NO_COMPILER, flags=["-O1"]) is None


@pytest.mark.parametrize("content", [b"", b"no object"])
def test_an_object_that_cannot_be_loaded_is_compiled(
    tmp_path: Path, installed: Path, compiler: str, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "broken").write_bytes(content)
    bring(installed, tmp_path / "broken")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "cache", [compiler]) is None
    assert "of this installation cannot be used, so they are compiled" in caplog.text
    assert compilations(tmp_path) == 1


def test_a_checkout_brings_none() -> None:
    assert not PREBUILT_DIR.exists()


def pure_wheel(folder: Path) -> Path:
    wheel = folder / "vibe_sgl_lite-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("vibe_sgl_lite/__init__.py", "NAME = 'vibe'\n")
        out.writestr(
            "vibe_sgl_lite-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vibe-sgl-lite\nVersion: 1.0\n"
        )
        out.writestr(
            "vibe_sgl_lite-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        out.writestr("vibe_sgl_lite-1.0.dist-info/RECORD", "of the other wheel\n")
    return wheel


def test_a_wheel_of_a_platform_lists_what_it_has(tmp_path: Path) -> None:
    obj = tmp_path / "amx-0123.so"
    obj.write_bytes(b"object")
    wheel = build_wheels.add_objects(pure_wheel(tmp_path), [obj], "manylinux_2_27_x86_64", tmp_path)
    assert wheel.name == "vibe_sgl_lite-1.0-py3-none-manylinux_2_27_x86_64.whl"
    with zipfile.ZipFile(wheel) as written:
        contents = {name: written.read(name) for name in written.namelist()}
    assert contents["vibe_sgl_lite/model_worker/cpu/prebuilt/amx-0123.so"] == b"object"
    assert contents["vibe_sgl_lite/__init__.py"] == b"NAME = 'vibe'\n"
    about = contents["vibe_sgl_lite-1.0.dist-info/WHEEL"].decode().splitlines()
    assert about[2:] == ["Root-Is-Purelib: false", "Tag: py3-none-manylinux_2_27_x86_64"]
    record = [line.split(",") for line in contents["vibe_sgl_lite-1.0.dist-info/RECORD"].decode().splitlines()]
    assert {name for name, _, _ in record} == set(contents)
    for name, digest, size in record[:-1]:
        found = urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={found}", str(len(contents[name])))


def test_the_wheels_tag_is_what_its_objects_need(tmp_path: Path) -> None:
    def needs(*versions: str) -> int:
        (tmp_path / "object").write_bytes(b"".join(b"\0" + version.encode() for version in ("", *versions, "")))
        return build_wheels.glibc_minor([tmp_path / "object"])

    assert needs() == 17
    assert needs("GLIBC_2.2.5", "GLIBC_2.27", "GLIBCXX_3.4.19", "CXXABI_1.3.11") == 27
    with pytest.raises(SystemExit, match=r"glibc 2\.36"):
        needs("GLIBC_2.36")
    with pytest.raises(SystemExit, match=r"GLIBCXX_3\.4\.30"):
        needs("GLIBCXX_3.4.30")


@pytest.mark.slow  # builds and installs a wheel, and compiles a target for it
@pytest.mark.timeout(1800)
def test_a_wheel_serves_without_a_compiler(tmp_path: Path) -> None:
    """In an environment of its own, with this one's packages but for the project, on a PATH without a compiler."""
    best = choose_target().name
    build_command = [sys.executable, "tools/build_wheels.py", "--targets", best, "--out", str(tmp_path / "dist")]
    subprocess.run([*build_command, "--no-isolation"], cwd=ROOT, check=True, timeout=1200)
    (wheel,) = (tmp_path / "dist").glob(f"*manylinux*_{platform.machine()}.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_", wheel.name)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    install = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))
    program = (
        "import vibe_sgl_lite; print(vibe_sgl_lite.__file__)\n"
        "with vibe_sgl_lite.LLM(log_level='info') as llm: print(repr(llm.generate('1 + 1 =').text))\n"
    )
    environment = {"PATH": str(python.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("OMP_NUM_THREADS", "TMPDIR"):
        if name in os.environ:
            environment[name] = os.environ[name]
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    where, text = done.stdout.splitlines()
    assert Path(where).is_relative_to(packages)
    assert len(text) > 2
    assert f"CPU kernels ({best})" in done.stderr
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_package_leaves_room_for_objects() -> None:
    """What build_wheels.py adds lies in a folder of a package that is listed, and where `prebuilt` looks."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert build_wheels.INSIDE.rsplit("/", 1)[0].replace("/", ".") in listed
    assert PREBUILT_DIR.parts[-3:] == tuple(build_wheels.INSIDE.split("/"))[-3:]
