"""A program that does not run for some seconds (Ctrl-Z, a debugger, a held lock) keeps what it has asked for."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.daemon import running

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


def run(kind: str, name: str, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind, name, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "go\n"
        if how == "stop":
            time.sleep(0.5)
            program.send_signal(signal.SIGSTOP)
            time.sleep(4)
            program.send_signal(signal.SIGCONT)
        said = program.communicate()[0].strip()
    assert said == "{('length', 250, 1): 40}"


@pytest.mark.parametrize("how", ["stop", pytest.param("lock", marks=pytest.mark.slow)])
def test_a_private_engine_waits_for_its_program(how: str) -> None:
    run("llm", f"test-{secrets.token_hex(4)}", how)


def test_a_daemons_client_finds_its_requests_again() -> None:
    """The daemon has given it up meanwhile; what it had is sent again."""
    with running("--dtype", "float32", "--max-total-tokens", "100000") as daemon:
        run("client", daemon.name, "stop")
        with daemon.client() as client:
            assert client.stats()["sessions_total"] == 3  # its second session, and this one
