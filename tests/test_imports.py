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
PACKAGE = "vibe_sgl_lite"
FOLDERS = ("runtime", "tokenizer_manager", "scheduler", "detokenizer", "http_server", "model_worker", "qwen3")
ENGINE = ("launch", PACKAGE, *FOLDERS)
SETTINGS = {"runtime.errors", "runtime.logs", "runtime.settings"}
MESSAGES = SETTINGS | {"runtime.messages"}
TRANSPORT = MESSAGES | {"runtime.transport"}
LAUNCHER = TRANSPORT | {"runtime.launcher", "runtime.page_folder"}
# Each part and what else of ours it may import. The longest part that a module's name begins with counts.
MAY_IMPORT: dict[str, set[str]] = {
    "launch": {"runtime"},
    "": {"runtime"},  # the public face
    "runtime.errors": set(),
    "runtime.logs": set(),
    "runtime.chrome_trace": {"runtime.errors", "runtime.observer_file"},
    "runtime.observer_file": set(),
    "runtime.page_folder": {"runtime.errors"},
    "runtime.settings": SETTINGS,
    "runtime.messages": SETTINGS,
    "runtime.transport": MESSAGES,
    "runtime.launcher": LAUNCHER,
    "runtime.text": SETTINGS,
    "runtime.client": LAUNCHER | {"runtime.text"},
    "runtime.commands": LAUNCHER | {"runtime.client"},
    "tokenizer_manager": {"runtime"},
    "scheduler": {"runtime"},
    "detokenizer": {"runtime"},
    "http_server": {"runtime"},
    "model_worker": {"runtime", "qwen3"},
    "qwen3": {"runtime.settings.model_config"},
    "qwen3.layers": {"runtime.settings.model_config"},
}
TORCH_FREE = (PACKAGE, "runtime", "tokenizer_manager", "scheduler", "detokenizer", "http_server")
PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLING_NAMES = {
    "recv_pyobj", "send_pyobj", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
PICKLING_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"}


def files(part: str) -> list[Path]:
    """The Python files of a folder, or of `launch.py`. The public face's links to other folders are not followed."""
    if part == "launch":
        return [ROOT / "launch.py"]
    return sorted((ROOT / part).glob("*.py" if part == PACKAGE else "**/*.py"))


def module_name(path: Path) -> str:
    """As it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    return f"{PACKAGE}.{name}" if parts[0] in FOLDERS else name


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports start at {PACKAGE}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, parts: set[str] | dict[str, set[str]]) -> str | None:
    """The longest of `parts` that `module` is or lies in."""
    found = [part for part in parts if part == "" or module == part or module.startswith(f"{part}.")]
    return max(found, key=len, default=None)


@pytest.mark.parametrize("part", ENGINE)
def test_the_import_table(part: str) -> None:
    assert files(part), part
    for path in files(part):
        own = "launch" if part == "launch" else within(module_name(path).removeprefix(PACKAGE).strip("."), MAY_IMPORT)
        assert own is not None, path
        for module in imports(path):
            top = module.split(".")[0]
            assert top not in (*FOLDERS, "tests", "examples", "benchmarks"), f"{path.relative_to(ROOT)}: {module}"
            if not module.startswith(f"{PACKAGE}."):
                continue
            inner = module.removeprefix(f"{PACKAGE}.")
            if within(inner, {own}) is None and inner.split(".")[0] in FOLDERS:
                assert within(inner, MAY_IMPORT[own]) is not None, f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_imports_the_folders_bare() -> None:
    """`import scheduler` works in a checkout by accident of the current folder, and nowhere else."""
    for part in ("tests", "examples", "benchmarks"):
        for path in files(part):
            bare = {module for module in imports(path) if module.split(".")[0] in FOLDERS}
            assert not bare, f"{path.relative_to(ROOT)}: {bare}"


def test_no_import_circle() -> None:
    """Between modules, imports in functions and type-checking blocks included."""
    modules = {module_name(path): path for part in ENGINE for path in files(part)}
    edges = {name: {m for m in imports(path) if m in modules} - {name} for name, path in modules.items()}
    while leaves := [name for name, needed in edges.items() if not needed]:
        for leaf in leaves:
            del edges[leaf]
        for needed in edges.values():
            needed.difference_update(leaves)
    assert not edges, f"a circle is among {sorted(edges)}"


def test_examples_and_benchmarks_use_the_public_face() -> None:
    """What measures internals lies in benchmarks/internal."""
    for path in (*files("examples"), *files("benchmarks")):
        if path.parent.name != "internal":
            for module in imports(path):
                assert within(module, {f"{PACKAGE}.{f}" for f in FOLDERS}) is None, (
                    f"{path.relative_to(ROOT)}: {module}"
                )


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_is_imported_by_ranks_alone(part: str) -> None:
    """First by reading the files, then by importing every module of the folder and looking what came along."""
    for path in files(part):
        assert not {m for m in imports(path) if m.split(".")[0] == "torch"}, path
    names = [module_name(path) for path in files(part) if path.name != "__main__.py"]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("scheduler.process", {"numpy"}),
        ("model_worker.worker", {"jinja2", "tokenizers", "transformers"}),
        ("model_worker.process", {"torch", "numpy"}),
    ],
)
def test_processes_start_without_what_few_requests_need(module: str, late: set[str]) -> None:
    code = f"import sys, {PACKAGE}.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not late & {*done.stdout.split()}


def test_the_public_face_is_lazy() -> None:
    """A child imports its own package's parent; that must not bring the client, nor anything else."""
    code = (
        f"import sys, {PACKAGE}; "
        f"early = [m for m in sys.modules if m.startswith('{PACKAGE}.')]; "
        f"missing = [n for n in {PACKAGE}.__all__ if not hasattr({PACKAGE}, n)]; print(early, missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


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
    there = {module_name(path.parent / "__init__.py") for part in (PACKAGE, *FOLDERS) for path in files(part)}
    assert listed == there


def test_the_package_links_to_every_folder() -> None:
    """So that a checkout, an editable installation and a wheel all know one name (docs/architecture.md)."""
    for folder in FOLDERS:
        link = ROOT / PACKAGE / folder
        assert link.is_symlink(), folder
        assert link.readlink() == Path("..") / folder
