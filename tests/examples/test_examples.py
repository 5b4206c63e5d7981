"""Every example runs as its users run it, against a real engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon, running

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


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


def test_structured() -> None:
    lines = run("structured.py").splitlines()
    assert re.fullmatch(r"json_schema -> \{'name': '.{0,12}', 'legs': [0-8]\}", lines[0])
    assert lines[1] in ("choice -> yes", "choice -> no")
    assert lines[2].startswith("chat -> '42', after thinking 'Ones: 7 and 5")
    assert lines[3] == "tools -> get_weather({'city': 'Paris'})"


def test_client(daemon: Daemon) -> None:
    out = run("client.py", "--address", daemon.address)
    assert out.startswith("connected to tiny on cpu\n")
    assert "the same again: True" in out
    assert "refused, field max_new_tokens: max_new_tokens=1000000000" in out
    assert re.search(r"KV pages: \d+, free: \d+, cached: \d+", out)


def test_async_client(daemon: Daemon) -> None:
    lines = run("async_client.py", "--address", daemon.address).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["Anna", "Ben", "Carl", "Dora"]
    assert re.fullmatch(r"left after \d+ tokens", lines[-1])


def test_streaming(daemon: Daemon) -> None:
    out = run("streaming.py", "--address", daemon.address, "The little dog")
    assert out.startswith("The little dog")
    assert re.search(r"\[(length|stop): \d+ tokens in [\d.]+ s, the first after \d+ ms\]", out)


def test_chat_with_a_daemon(daemon: Daemon) -> None:
    script = "What is 17 + 25?\nAnd 3 more?\n/reset\nHello\n\n/quit\nnot reached\n"
    out = run("chat.py", "--address", daemon.address, "--max-new-tokens", "20", text=script)
    assert out.startswith("tiny: /reset forgets")
    said = re.findall(
        r"\[(\d+) tokens(?:, [\d.]+ tokens/s)?, the first after \d+ ms; "
        r"(\d+) of (\d+) prompt tokens were cached; (?:stop|length)\]",
        out,
    )
    assert len(said) == 3
    prompts = [int(prompt) for _, _, prompt in said]
    assert prompts[2] < prompts[0] < prompts[1]  # history grows, /reset forgets it
    assert int(said[1][1]) >= 16  # the first turn's pages are found again
    assert out.count("[forgotten]") == 1


def test_chat_says_what_is_wrong(daemon: Daemon) -> None:
    out = run("chat.py", "--address", daemon.address, "--max-new-tokens", "100000", text="hi\nhi again\n")
    assert out.count("[max_new_tokens=100000 with a prompt of") == 2
    command = [sys.executable, str(ROOT / "examples" / "chat.py"), "--address", "ipc:///nowhere/api.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no engine answers at ipc:///nowhere/api.sock")
    assert "Traceback" not in done.stderr


def test_chat_starts_its_own_engine_and_ctrl_c_cuts_an_answer_short() -> None:
    command = [sys.executable, str(ROOT / "examples" / "chat.py"), "--max-new-tokens", "20000", "--temperature", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        assert chat.stdout.readline().startswith("tiny: /reset forgets")
        chat.stdin.write("Repeat: one two three\n")
        chat.stdin.flush()
        assert chat.stdout.read(3)[:2] == "> "  # the prompt, and the first of an answer
        time.sleep(0.3)
        chat.send_signal(signal.SIGINT)
        rest, log = chat.communicate("/quit\n", timeout=30)
    assert chat.returncode == 0, log
    assert "[cut short]" in rest or "tokens were cached" in rest  # a short answer may have ended by itself
    assert log.startswith("starting an engine ...")
    assert "Traceback" not in log
