"""A program that does not run for some seconds (Ctrl-Z, a debugger, a held lock) keeps what it has asked for."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.integration.daemon import running, wait_until

PROGRAM = """
import sys, threading, time
from collections import Counter
from vibe_sgl_lite import LLM, Client
settings = {"log_level": "error", "max_total_tokens": 65536, "dtype": "float32"}
engine = {"llm": lambda: LLM(name=sys.argv[2], **settings), "client": lambda: Client(name=sys.argv[2])}
with engine[sys.argv[1]]() as client:
    print("go", flush=True)
    if sys.argv[3] == "lock":
        def hold():
            time.sleep(0.5)
            start = time.monotonic()
            while time.monotonic() - start < 4:
                sum(range(100_000_000))
        threading.Thread(target=hold).start()
    outs = client.generate(["Once upon a time"] * 40, max_new_tokens=250, ignore_eos=True, seed=1)
    print(dict(Counter((out.finish_reason, len(out.token_ids), len(set(o.text for o in outs))) for out in outs)))
"""


def run(kind: str, name: str, stop_and_continue: Callable[[subprocess.Popen[str]], None] | None) -> None:
    """Without `stop_and_continue`, the program holds its own interpreter lock."""
    how = "lock" if stop_and_continue is None else "stop"
    command = [sys.executable, "-c", PROGRAM, kind, name, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "go\n"
        if stop_and_continue is not None:
            stop_and_continue(program)
        said = program.communicate()[0].strip()
    assert said == "{('length', 250, 1): 40}"


def four_seconds(program: subprocess.Popen[str]) -> None:
    time.sleep(0.5)
    program.send_signal(signal.SIGSTOP)
    time.sleep(4)
    program.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", ["stop", pytest.param("lock", marks=pytest.mark.slow)])
def test_a_private_engine_waits_for_its_program(how: str) -> None:
    run("llm", f"test-{secrets.token_hex(4)}", four_seconds if how == "stop" else None)


def test_a_daemons_client_finds_its_requests_again() -> None:
    """The daemon has given it up meanwhile; what it had is sent again."""
    with running("--dtype", "float32", "--max-total-tokens", "100000") as daemon, daemon.client() as watcher:

        def until_given_up(program: subprocess.Popen[str]) -> None:
            wait_until(lambda: watcher.stats()["num_running"] != 0, 60, "the requests run")
            program.send_signal(signal.SIGSTOP)
            wait_until(lambda: watcher.stats()["sessions"] == 1, 60, "the program is given up")
            program.send_signal(signal.SIGCONT)

        run("client", daemon.name, until_given_up)
        assert watcher.stats()["sessions_total"] == 3  # the watcher's, and the program's two
