"""`vibe-sgl-lite chat | top | bench` as people type them, against a real engine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.integration.daemon import ROOT, Daemon, running
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.runtime.commands.main import main
from vibe_sgl_lite.runtime.commands.top import render

COMMAND = [sys.executable, "-m", "vibe_sgl_lite.runtime.commands.main"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, input=text, capture_output=True, text=True, timeout=60, check=False
    )


def test_chat_with_a_daemon(daemon: Daemon) -> None:
    script = "What is 17 + 25?\nAnd 3 more?\n/reset\nHello\n\n/quit\nnot reached\n"
    out = run("chat", "--address", daemon.address, "--max-new-tokens", "20", text=script).stdout
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
    out = run("chat", "--address", daemon.address, "--max-new-tokens", "100000", text="hi\nhi again\n").stdout
    assert out.count("[max_new_tokens=100000 with a prompt of") == 2
    command = [
        *COMMAND,
        "chat",
        "--address",
        "ipc:///nowhere/api.sock",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no engine answers at ipc:///nowhere/api.sock")
    assert "Traceback" not in done.stderr


def test_chat_starts_its_own_engine_and_ctrl_c_cuts_an_answer_short() -> None:
    command = [
        *COMMAND,
        "chat",
        "--max-new-tokens",
        "20000",
        "--temperature",
        "0",
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
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


def test_chat_takes_a_system_prompt(daemon: Daemon) -> None:
    script = "What is 17 + 25?\n/system You are a poet.\nWhat is 17 + 25?\n/reset\nWhat is 17 + 25?\n"
    done = run("chat", "--address", daemon.address, "--max-new-tokens", "4", "--temperature", "0", text=script)
    assert done.returncode == 0, done.stderr
    counts = [
        int(line.split(" of ")[1].split()[0]) for line in done.stdout.splitlines() if " prompt tokens were" in line
    ]
    assert counts[0] == counts[2] < counts[1]


def test_top_shows_what_runs(daemon: Daemon) -> None:
    with daemon.client() as client:
        stream = client.stream("Once upon a time", SamplingParams(max_new_tokens=5000, ignore_eos=True), rid="the-one")
        next(stream)
        done = run("top", "--address", daemon.address, "--once")
        view = client.watch()
        stream.close()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny: ")
    assert "1 running, 0 waiting" in lines[0]
    assert any(line.startswith("the-one") and " decode " in line for line in lines)
    assert any(line.startswith("radix tree") for line in lines)
    assert next(iter(render("m", view, 12.6))).startswith("m: 13 tokens/s")


def test_top_goes_on_until_ctrl_c(daemon: Daemon) -> None:
    command = [*COMMAND, "top", "--address", daemon.address, "--interval", "0.1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        seen = ""
        while seen.count("\x1b[H") < 3:
            seen += top.stdout.read(50)
        top.send_signal(signal.SIGINT)
        _, errors = top.communicate(timeout=20)
    assert "Traceback" not in errors
    assert top.returncode == 130


def test_bench_counts_exactly(daemon: Daemon) -> None:
    with daemon.client() as client:
        before = int(client.stats()["completion_tokens_total"])
        done = run(
            "bench", "--address", daemon.address, "--num-requests", "6", "--concurrency", "3", "--input-len", "20",
            "--output-len", "8",
        )  # fmt: skip
        after = int(client.stats()["completion_tokens_total"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["input_tokens"], report["output_tokens"]) == (120, 48)
    assert after - before == 48 + 2
    assert report["first_token_p50"] <= report["first_token_p99"] < report["seconds"]
    assert report["output_tokens_per_s"] == pytest.approx(48 / report["seconds"])


def test_nobody_there_is_one_line() -> None:
    for command in ("top", "chat", "bench"):
        done = run(command, "--address", "ipc:///nowhere/api.sock")
        assert done.returncode == 1
        assert done.stderr.startswith("error: no engine answers at ipc:///nowhere/api.sock")
        assert "Traceback" not in done.stderr


def test_flags_alone_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("vibe-sgl-lite ")
    assert main(["--frobnicate"]) == 2
    assert "--frobnicate" in capsys.readouterr().err
