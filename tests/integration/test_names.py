"""Modules of a user's own that are called as the engine's folders: beside the script, or on PYTHONPATH."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import ROOT

LINKS = sorted(path.name for path in (ROOT / "vibe_sgl_lite").iterdir() if path.is_symlink())
NAMES = [*LINKS, "launch", "tests", "docs"]
SCRIPT = (
    "import sys\n"
    "from vibe_sgl_lite import LLM\n"
    "with LLM(name=sys.argv[1], log_level='error', max_total_tokens=4096, num_threads=1) as llm:\n"
    "    print(llm.generate('Once', max_new_tokens=2).finish_reason)\n"
    "    print(llm.generate('Once', max_new_tokens=20, choice=['yes']).text)\n"
)


@pytest.mark.parametrize(
    ("where", "form"),
    [("beside the script", "module"), ("on PYTHONPATH", "package"), ("in the current folder", "module")],
)
def test_users_modules_break_nothing(tmp_path: Path, where: str, form: str) -> None:
    script, other = tmp_path / "script", tmp_path / "other"
    script.mkdir()
    other.mkdir()
    (script / "app.py").write_text(SCRIPT)
    assert {"runtime", "scheduler", "qwen3", "model_worker"} <= set(NAMES)
    for name in NAMES:
        file = script if where == "beside the script" else other
        file = file / f"{name}.py" if form == "module" else file / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise RuntimeError('a module of the user was imported')\n")
    paths = [str(ROOT), *([str(other)] if where == "on PYTHONPATH" else [])]
    done = subprocess.run(
        [sys.executable, str(script / "app.py"), f"test-{secrets.token_hex(4)}"],
        capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(reversed(paths))},
        cwd=other if where == "in the current folder" else tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "length\nyes\n"), done.stderr
