"""Who may import whom (the table of the design), that only ranks import torch, and that nothing unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = (
    "launch", "vibe_sgl_lite", "runtime", "tokenizer_manager", "scheduler", "detokenizer", "model_worker", "qwen3",
)  # fmt: skip
MAY_IMPORT = {
    "launch": {"runtime"},
    "vibe_sgl_lite": {"runtime"},
    "runtime": set(),
    "tokenizer_manager": {"runtime"},
    "scheduler": {"runtime"},
    "detokenizer": {"runtime"},
    "model_worker": {"runtime", "qwen3"},
    "qwen3": {"runtime"},  # runtime.model_config alone, see below
}
TORCH_FREE = ("vibe_sgl_lite", "runtime", "tokenizer_manager", "scheduler", "detokenizer")
PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLING_NAMES = {
    "recv_pyobj", "send_pyobj", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
PICKLING_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"}


def files(part: str) -> list[Path]:
    """The Python files of a folder, or of `launch.py`."""
    return [ROOT / "launch.py"] if part == "launch" else sorted((ROOT / part).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports start at the top-level names"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("part", ENGINE)
def test_the_import_table(part: str) -> None:
    assert files(part), part
    for path in files(part):
        for module in imports(path):
            top = module.split(".")[0]
            if top in (*ENGINE, "tests", "examples", "benchmarks") and top != part:
                assert top in MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {module}"


def test_qwen3_knows_only_the_model_config_of_ours() -> None:
    for path in files("qwen3"):
        ours = {module for module in imports(path) if module.startswith("runtime")}
        assert ours <= {"runtime.model_config"}, path


def test_examples_use_the_public_face() -> None:
    for path in files("examples"):
        for module in imports(path):
            assert module.split(".")[0] not in set(ENGINE) - {"vibe_sgl_lite"}, f"{path.relative_to(ROOT)}: {module}"


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_is_imported_by_ranks_alone(part: str) -> None:
    """First by reading the files, then by importing every module of the folder and looking what came along."""
    for path in files(part):
        assert not {m for m in imports(path) if m.split(".")[0] == "torch"}, path
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files(part)
        if path.name != "__main__.py"
    ]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("part", ENGINE)
def test_nothing_unpickles(part: str) -> None:
    for path in files(part):
        where = path.relative_to(ROOT)
        assert not {m for m in imports(path) if m.split(".")[0] in PICKLING_MODULES}, where
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in PICKLING_NAMES, f"{where}:{node.lineno} {node.attr}"
                assert ast.unparse(node) not in PICKLING_CALLS, f"{where}:{node.lineno} {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom):
                taken = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not taken & PICKLING_CALLS, f"{where}:{node.lineno} {taken}"
                assert not {alias.name for alias in node.names} & PICKLING_NAMES, f"{where}:{node.lineno}"


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for part in ENGINE
        if part != "launch"
        for path in (ROOT / part).rglob("*.py")
    }
    assert listed == there
