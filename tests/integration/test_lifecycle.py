"""A daemon's life: ready, drain, signals, and everything that must be refused at the start in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import MODELS
from tests.integration.daemon import ROOT, Daemon, running, wait_until
from vibe_sgl_lite import Client, OverloadedError, SamplingParams, VibeError
from vibe_sgl_lite.runtime.settings.model_source import embedded_folder

READY_LINE = re.compile(
    r"ready (ipc|tcp)://\S+ model=\S+ device=(cpu|cuda) dtype=(float32|bfloat16|float16) tp=1 kv_pages=\d+ "
    r"page_size=16 startup=\d+\.\d+\n"
)
LONG = SamplingParams(max_new_tokens=16_000, temperature=0, ignore_eos=True)


class Background:
    """One stream in a thread; its tokens counted, how it ended kept."""

    def __init__(self, client: Client, params: SamplingParams) -> None:
        self.finish: str | None = None
        self.error: VibeError | None = None
        self.tokens = 0
        self._thread = threading.Thread(target=self._run, args=(client, params))
        self._thread.start()

    def _run(self, client: Client, params: SamplingParams) -> None:
        try:
            for chunk in client.stream("Once upon a time", params):
                self.tokens += len(chunk.token_ids)
                self.finish = chunk.finish_reason
        except VibeError as error:
            self.error = error

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "no terminal event"


def run_launch(*flags: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of a launch that must fail; nothing may be left of it."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--name", "refused", "--log-level", "warning", *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    took = time.monotonic() - start
    left = [p for p in psutil.process_iter(["cmdline"]) if "/refused/" in " ".join(p.info["cmdline"] or [])]
    assert left == []
    return done.returncode, done.stdout, done.stderr, took


@pytest.mark.parametrize("name", MODELS)
def test_ready_serve_stop(name: str) -> None:
    begun = time.monotonic()
    with Daemon(*MODELS[name]) as daemon:
        facts = daemon.wait_ready()
        assert 0.0 < float(facts["startup"]) <= time.monotonic() - begun + 0.1
        assert READY_LINE.fullmatch(daemon.ready_line)
        assert facts["address"] == daemon.address
        assert set(daemon.children()) == {"model_worker.0", "tokenizer_manager", "scheduler", "detokenizer"}
        with daemon.client() as client:
            output = client.generate("Once upon a time", SamplingParams(max_new_tokens=8, ignore_eos=True))
            assert len(output.token_ids) == 8
            assert output.finish_reason == "length"
            stats = client.stats()
            assert stats["kv_pages_total"] == int(facts["kv_pages"])
        assert daemon.stop() == 0
        assert daemon.rest_of_stdout() == ""
        assert daemon.survivors() == []
        assert not Path(daemon.address.removeprefix("ipc://")).parent.exists()


def test_ctrl_c_reaches_all_and_ends_cleanly() -> None:
    with running() as daemon, daemon.client() as client:
        call = Background(client, LONG)
        wait_until(lambda: call.tokens > 0, 60, "first token")
        os.killpg(daemon.process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.killpg(daemon.process.pid, signal.SIGINT)
        start = time.monotonic()
        assert daemon.wait_exit() == 0
        assert time.monotonic() - start < 100
        call.join(30)
        assert call.finish == "abort", call.error
        assert daemon.survivors() == []
        assert "Traceback" not in daemon.log()


def test_sigterm_drains() -> None:
    with running() as daemon, daemon.client() as client:
        params = SamplingParams(max_new_tokens=400, temperature=0, ignore_eos=True)
        calls = [Background(client, params) for _ in range(4)]
        wait_until(lambda: all(call.tokens > 0 for call in calls), 60, "first tokens")
        daemon.process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        with pytest.raises(OverloadedError, match=r"(?i)drain|stopping"):
            client.generate("too late", params)
        assert daemon.wait_exit() == 0
        for call in calls:
            call.join(30)
            assert (call.finish, call.tokens) == ("length", 400), call.error
        assert daemon.survivors() == []


def test_same_name_twice() -> None:
    with running() as daemon:
        start = time.monotonic()
        with Daemon(name=daemon.name) as second:
            assert second.wait_exit(10) == 2
            assert time.monotonic() - start < 10
            assert second.log().strip() == (
                f"error: --name {daemon.name} is in use by process {daemon.process.pid}: stop it or choose another"
            )
        with daemon.client() as client:
            assert client.health()


def test_tcp_port_is_read_back_and_taken() -> None:
    with Daemon("--address", "tcp://127.0.0.1:0") as daemon:
        address = daemon.wait_ready()["address"]
        assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d+", address)
        with Client(address) as client:
            assert client.generate("hi", SamplingParams(max_new_tokens=1)).token_ids
        code, _, stderr, took = run_launch("--address", address)
        assert code == 2
        assert took < 10
        assert re.search(rf"--address {address} is in use by process \d+", stderr)


def test_config_file(tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text('max-total-tokens = 640\ndtype = "float32"\n')
    with Daemon("--config", str(config), "--page-size", "8") as daemon:
        facts = daemon.wait_ready()
        assert (facts["kv_pages"], facts["page_size"], facts["dtype"]) == ("80", "8", "float32")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be broken."""
    return Path(shutil.copytree(embedded_folder(), tmp_path / "broken"))


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def break_wrong_architecture(folder: Path) -> str:
    edit_config(folder, architectures=["LlamaForCausalLM"])
    return "LlamaForCausalLM"


def break_config_json(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json cannot be read as JSON"


def break_missing_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "safetensors"


def break_cut_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return "model.safetensors"


def break_wrong_shape(folder: Path) -> str:
    edit_config(folder, intermediate_size=64)
    return "shape"


def break_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer"


def break_missing_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


@pytest.mark.parametrize(
    "breaker",
    [
        break_wrong_architecture, break_config_json, break_missing_weights, break_cut_weights, break_wrong_shape,
        break_tokenizer, break_missing_tokenizer,
    ],
    ids=lambda breaker: breaker.__name__.removeprefix("break_"),
)  # fmt: skip
def test_a_broken_model_is_one_line(copy: Path, breaker: object) -> None:
    assert callable(breaker)
    says = breaker(copy)
    code, stdout, stderr, took = run_launch("--model-path", str(copy))
    assert code != 0
    assert stdout == ""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert says in errors[0]
    assert "Traceback" not in stderr
    assert took < 30


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model-path", "/nowhere"], "--model-path /nowhere does not exist"),
        (
            ["--tp", "3"],
            "--tp 3 does not fit this model: num_attention_heads=8 is not divisible by 3; possible: 1, 2, 4",
        ),
        (["--tp", "2", "--ep", "2"], "--ep 2 does not fit --tp 2: Qwen3ForCausalLM has no experts; possible: 1"),
        (["--tp", "2", "--nnodes", "2"], "--nnodes 2 needs --dist-init-addr"),
        (["--page-sise", "2"], "did you mean --page-size"),
        (["--context-length", "100000000"], "--context-length 100000000 is above the model's"),
        (["--address", "tcp://0.0.0.0:1"], "beyond loopback"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], says: str) -> None:
    code, stdout, stderr, took = run_launch(*flags)
    assert code == 2
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ")
    assert says in stderr
    assert took < 20


@pytest.mark.slow
def test_a_stop_that_waits_says_so() -> None:
    with running() as daemon, daemon.client() as client:
        call = Background(client, LONG)
        wait_until(lambda: call.tokens > 0, 60, "first token")
        daemon.process.send_signal(signal.SIGINT)
        wait_until(lambda: "requests that run get up to 30 s" in daemon.log(), 30, "what is waited for")
        assert "once more aborts them" in daemon.log()
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.wait_exit() == 0
        call.join(30)
        assert call.finish == "abort", call.error


@pytest.mark.slow
def test_a_terminal_that_closes_drains_and_nohup_does_not_notice() -> None:
    with running() as daemon, daemon.client() as client:
        call = Background(client, SamplingParams(max_new_tokens=400, temperature=0, ignore_eos=True))
        wait_until(lambda: call.tokens > 0, 60, "first token")
        os.killpg(daemon.process.pid, signal.SIGHUP)
        assert daemon.wait_exit() == 0
        call.join(30)
        assert (call.finish, call.tokens) == ("length", 400), call.error
        assert daemon.survivors() == []
    with Daemon(under=("nohup",)) as daemon:
        daemon.wait_ready()
        daemon.process.send_signal(signal.SIGHUP)
        with daemon.client() as client:
            assert client.generate("Once", max_new_tokens=2).finish_reason == "length"
        assert daemon.stop() == 0


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_leaves_no_traceback() -> None:
    for pause in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2):
        with Daemon() as daemon:
            time.sleep(pause)
            os.killpg(daemon.process.pid, signal.SIGINT)
            code, log = daemon.wait_exit(), daemon.log()
            # Python's own start comes before any line of ours: there it ends as any program does.
            assert code in (0, 130, -signal.SIGINT) or "site" in log, log
            assert not re.search(r"/vibe_sgl_lite/runtime/|from vibe_sgl_lite", log), log


@pytest.mark.parametrize(
    "what", ["all", *(pytest.param(part, marks=pytest.mark.slow) for part in ("its own", "socket and lock"))]
)
def test_a_run_directory_that_is_removed_meanwhile(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As logind does at logout, and cleaners of /tmp: who is connected is served, and the end is clean."""
    base = tempfile.mkdtemp(prefix="lc-", dir="/tmp")
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    with running() as daemon, daemon.client() as client:
        folder = Path(daemon.address.removeprefix("ipc://")).parent
        if what == "all":
            shutil.rmtree(folder.parent)
        elif what == "its own":
            shutil.rmtree(folder)
        else:
            for name in ("api.sock", "lock"):
                (folder / name).unlink()
        assert client.generate("Once", max_new_tokens=3, ignore_eos=True).finish_reason == "length"
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log()
        assert daemon.survivors() == []
    shutil.rmtree(base, ignore_errors=True)
