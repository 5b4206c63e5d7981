"""Every example runs as its users run it, against a real engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http_server.server import Server
from tests.integration.daemon import running

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def run(name: str, *arguments: str, text: str = "") -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=120, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return ENV | {"XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]}  # the suite's own


def test_offline() -> None:
    lines = run("offline.py").splitlines()
    assert [line.split(" -> ")[0] for line in lines[:4]] == [
        "'Once upon a time'",
        "'Once upon a time there was a bear'",
        "'Once there was a little fox'",
        "chat",
    ]
    assert lines[3] == "chat -> '42'"
    assert re.fullmatch(r"usage: Usage\(prompt_tokens=\d+, completion_tokens=\d+, cached_tokens=\d+\)", lines[4])


def test_rollouts() -> None:
    lines = run("rollouts.py", "--steps", "2").splitlines()
    for step, line in enumerate(lines[:2], 1):
        assert re.fullmatch(rf"weights {step}: reward 0\.\d+, logprob of the samples -\d+\.\d", line)
    assert re.fullmatch(r"weights best: '.+'", lines[2])


def test_structured() -> None:
    lines = run("structured.py").splitlines()
    assert re.fullmatch(r"json_schema -> \{'name': '.{0,12}', 'legs': [0-8]\}", lines[0])
    assert lines[1] in ("choice -> yes", "choice -> no")
    assert lines[2].startswith("chat -> '42', after thinking 'Ones: 7 and 5")
    assert lines[3] == "tools -> get_weather({'city': 'Paris'})"


def test_structured_without_its_library(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'llguidance' else find(name, *rest)\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'structured.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the grammar library is missing: pip install 'vibe-sgl-lite[grammar]'\n"


def test_client(server: Server) -> None:
    out = run("client.py", "--address", server.daemon.address)
    assert out.startswith("connected to tiny on cpu\n")
    assert "the same again: True" in out
    assert "refused, field max_new_tokens: max_new_tokens=1000000000" in out
    assert re.search(r"KV pages: \d+, free: \d+, cached: \d+", out)


def test_async_client(server: Server) -> None:
    lines = run("async_client.py", "--address", server.daemon.address).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["Anna", "Ben", "Carl", "Dora"]
    assert re.fullmatch(r"left after \d+ tokens", lines[-1])


def test_streaming(server: Server) -> None:
    out = run("streaming.py", "--address", server.daemon.address, "The little dog")
    assert out.startswith("The little dog")
    assert re.search(r"\[(length|stop): \d+ tokens in [\d.]+ s, the first after \d+ ms\]", out)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_pages_programs_run_on_the_embedded_model(page: str, tmp_path: Path) -> None:
    """Every Python block that uses this package alone, one after the other, beside the default daemon."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    programs = [block for block in blocks if "openai" not in block]
    assert programs
    (tmp_path / "program.py").write_text("\n".join(programs))
    with running("--name", "default"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            capture_output=True, text=True, timeout=240, check=False, env=environment(), cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if page == "README.md":
        assert done.stdout.rstrip().endswith("42")
        assert "\n42\n" in done.stdout
