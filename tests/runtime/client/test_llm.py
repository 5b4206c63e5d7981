"""The offline engine with stand-in processes: it starts, answers, dies with a cause, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runtime.launcher.toy import CONFIG
from vibe_sgl_lite import LLM, AsyncClient, Client
from vibe_sgl_lite.runtime.errors import ClosedError, ConfigError, EngineDeadError, ModelConfigError, StartupError
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec

FAKES = {
    "model_worker.0": ChildSpec("model_worker.0", "tests.runtime.launcher.fake_child", ("model_worker.0", "ready")),
    "tokenizer_manager": ChildSpec("tokenizer_manager", "tests.runtime.launcher.fake_manager"),
    "scheduler": ChildSpec("scheduler", "tests.runtime.launcher.fake_child", ("scheduler", "ready")),
}
# What a script needs in front to run on stand-ins.
PATCH = """
import vibe_sgl_lite.runtime.launcher.pipeline
from tests.runtime.client.test_llm import FAKES
vibe_sgl_lite.runtime.launcher.pipeline.pipeline_children = lambda ranks: tuple(FAKES.values())
from vibe_sgl_lite import LLM
"""


@pytest.fixture(autouse=True)
def run_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llm-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr(
            "vibe_sgl_lite.runtime.launcher.pipeline.pipeline_children", lambda ranks: tuple(FAKES.values())
        )
        yield Path(folder) / "vibe-sgl-lite"


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


def make(model: str, **settings: Any) -> LLM:
    return LLM(model, load_format="dummy", log_level="error", **settings)


def children() -> dict[str, psutil.Process]:
    """This process's engine children, by name."""
    found = {}
    for process in psutil.Process().children():
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:  # a zombie too: about to be reaped
            continue
        if "vibe_sgl_lite.runtime.launcher.boot" in line:
            module = line[line.index("vibe_sgl_lite.runtime.launcher.boot") + 1]
            found["tokenizer_manager" if module.endswith("fake_manager") else line[-2]] = process
    return found


def wait_gone(run_base: Path) -> None:
    deadline = time.monotonic() + 8
    while children() or any(run_base.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_a_client_with_an_engine(model: str, run_base: Path) -> None:
    with make(model) as llm:
        assert set(children()) == set(FAKES)
        assert llm.generate("abc").text == "cba"
        assert [c.text for c in llm.stream("ab")] == ["b", "a"]
        assert llm.chat([{"role": "user", "content": "hi"}]).text == "ih"
        assert llm.facts["kv_pages"] == 7
        with Client(llm.address) as other:
            assert other.generate("abc").text == "cba"
    assert children() == {}
    assert list(run_base.iterdir()) == []
    llm.close()
    with pytest.raises(ClosedError):
        llm.generate("abc")


def test_two_at_once(model: str) -> None:
    with make(model) as one, make(model) as two:
        assert one.address != two.address
        assert one.generate("ab").text == two.generate("ab").text == "ba"


def test_close_ends_what_runs(model: str) -> None:
    llm = make(model)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, "slow")
        time.sleep(0.2)
        llm.close()
        assert isinstance(call.exception(30), ClosedError)


@pytest.mark.parametrize("victim", list(FAKES))
def test_a_death_ends_every_call_with_its_cause(model: str, victim: str, run_base: Path) -> None:
    with make(model, restart="never") as llm, ThreadPoolExecutor(2) as pool:
        stream = llm.stream("slow")
        assert next(stream).text == "par"
        calls = [pool.submit(llm.generate, "slow") for _ in range(2)]
        time.sleep(0.2)
        start = time.monotonic()
        os.kill(children()[victim].pid, signal.SIGKILL)
        for call in calls:
            error = call.exception(30)
            assert isinstance(error, EngineDeadError)
            assert f"{victim} was killed by SIGKILL" in str(error)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            next(stream)
        assert time.monotonic() - start < 10
        wait_gone(run_base)
        start = time.monotonic()
        with pytest.raises(EngineDeadError, match=f"the engine died: {victim} was killed by SIGKILL"):
            llm.generate("abc")
        assert time.monotonic() - start < 10


def test_a_forgotten_one_is_stopped(model: str, run_base: Path) -> None:
    llm = make(model)
    assert children()
    del llm
    gc.collect()
    wait_gone(run_base)


@pytest.mark.parametrize(
    ("settings", "field"), [({"nonsense": 1}, "nonsense"), ({"page_size": 0}, "page_size"), ({"tp": "two"}, "tp")]
)
def test_bad_settings_are_named(model: str, settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field.replace("_", ".")) as caught:
        make(model, **settings)
    assert caught.value.field == field
    with pytest.raises((ModelConfigError, ConfigError), match="no-such-folder"):
        LLM("./no-such-folder")


def test_a_failed_start_leaves_nothing(model: str, run_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ChildSpec("scheduler", "tests.runtime.launcher.fake_child", ("scheduler", "fail"))
    monkeypatch.setattr(
        "vibe_sgl_lite.runtime.launcher.pipeline.pipeline_children", lambda ranks: (*list(FAKES.values())[:2], failing)
    )
    with pytest.raises(StartupError, match="out of luck"):
        make(model)
    wait_gone(run_base)


@pytest.mark.parametrize("ending", ["llm.close()", "", "1 / 0", "import sys; sys.exit(3)"])
def test_from_stdin_without_a_main_guard(model: str, run_base: Path, ending: str) -> None:
    """However the program ends, nothing is left; without close() too."""
    script = f"{PATCH}\nllm = LLM({model!r}, load_format='dummy', log_level='error')\nprint(llm.generate('abc').text)\n"
    done = subprocess.run(
        [sys.executable, "-"], input=script + ending, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "cba\n"
    assert done.returncode == {"1 / 0": 1, "import sys; sys.exit(3)": 3}.get(ending, 0)
    assert ("ZeroDivisionError" in done.stderr) == (ending == "1 / 0")
    assert "Exception ignored" not in done.stderr
    assert list(run_base.iterdir()) == []


@pytest.mark.parametrize(
    "child",
    [
        "sys.exit(0)",
        "llm.close(); sys.exit(0)",
        "del llm; gc.collect(); sys.exit(0)",
        "client.close(); sys.exit(0)",
        "raised(lambda: llm.generate('abc')); sys.exit(0)",
        "raised(lambda: client.stats()); sys.exit(0)",
        "threading.Thread(target=llm.close).start()",
    ],
)
def test_a_fork_beside_an_engine_can_exit_and_harms_nobody(model: str, run_base: Path, child: str) -> None:
    script = f"""
{PATCH}
import gc, os, sys, threading, time
def raised(call):
    try:
        call()
    except vibe_sgl_lite.ClosedError:
        return
    os._exit(5)
llm = LLM({model!r}, load_format='dummy', log_level='error')
client = vibe_sgl_lite.Client(llm.address)
pid = os.fork()
if pid == 0:
    {child}
    sys.exit(0)
deadline = time.monotonic() + 5
while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
    time.sleep(0.02)
if ended == (0, 0):
    os.kill(pid, 9)
print(ended[1] if ended[0] else "hung", llm.generate('abc').text, client.generate('ab').text)
"""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.splitlines()[-1] == "0 cba ba", done.stderr
    assert done.returncode == 0
    assert list(run_base.iterdir()) == []


def test_from_another_thread_and_for_async_clients(model: str) -> None:
    async def ask(address: str) -> str:
        async with AsyncClient(address) as client:
            return (await client.generate("abc")).text

    with ThreadPoolExecutor(1) as pool:
        llm = pool.submit(make, model).result(20)
    with llm:  # its thread is gone, the engine is not
        time.sleep(0.2)
        assert asyncio.run(ask(llm.address)) == "cba"


def test_the_public_face_is_light() -> None:
    """It imports neither torch nor transformers."""
    code = "import sys, vibe_sgl_lite; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - start < 10
