"""docs/http.md: its curl examples run, and it names every path."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http_server.server import Server
from vibe_sgl_lite.http_server.app import ROUTES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "http.md").read_text()
EXAMPLES = [
    block
    for page in (PAGE, (ROOT / "README.md").read_text())
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    if block.startswith("curl")
]


def test_every_path_is_told() -> None:
    for _, path in ROUTES:
        assert f"{path}`" in PAGE or f"{path} " in PAGE or path in ("/get_server_info", "/get_model_info"), path


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split()[1][:60])
def test_the_examples_run(server: Server, example: str) -> None:
    command = example.replace("http://127.0.0.1:30000", server.url)
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_the_readme_asks_with_openais_client(server: Server) -> None:
    [program] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "openai" in block
    ]
    program = program.replace("http://127.0.0.1:30000", server.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("42", 0), done.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
