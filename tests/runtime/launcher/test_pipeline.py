"""The pipeline's life with stand-in processes: ready, drained, stopped, nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.daemon import alive_after
from tests.runtime.launcher.toy import CONFIG, NAMES, children, pipeline, processes, told
from vibe_sgl_lite.runtime.errors import ConfigError, ModelConfigError, StartupError
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.spawn import pipeline_children
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.rundir import default_address


def test_facts_and_a_clean_end(model: Path, run_base: Path) -> None:
    progress: list[tuple[int, int]] = []
    args = ServerArgs(model_path=str(model), page_size=4, log_level="error")
    engine = Pipeline(args, children=children(), on_progress=lambda ready, of: progress.append((ready, of)))
    facts = engine.start()
    running = processes()
    assert set(running) == set(NAMES)
    startup = facts.pop("startup")
    assert isinstance(startup, float)
    assert 0 < startup < 10
    assert facts == {
        "address": default_address(), "model": "toy", "device": "cpu", "dtype": "float32", "tp": 1, "kv_pages": 7,
        "page_size": 4, "context_length": 256,
    }  # fmt: skip
    assert engine.address == default_address()
    assert progress[0] == (0, 4)
    assert progress[-1] == (4, 4)
    assert engine.failure is None
    assert not engine.wait(0)
    engine.stop()
    assert engine.wait(0)
    assert engine.failure is None
    assert not any(p.is_running() for p in running.values())
    assert list(run_base.iterdir()) == []
    engine.stop()  # a second time does nothing


def test_children_get_the_spec_and_their_threads(model: Path, run_base: Path) -> None:
    with pipeline(model, ServerArgs(model_path=str(model), num_threads=3, log_level="error")):
        spec = json.loads(next((run_base / "default").glob("*/spec.json")).read_text())
        assert (spec["device"], spec["dtype"], spec["context_length"]) == ("cpu", "bfloat16", 256)
        assert spec["chunked_prefill_size"] == 512
        assert spec["model"]["num_hidden_layers"] == 1
        running = processes()
        assert running["model_worker.0"].environ()["OMP_NUM_THREADS"] == "3"
        assert running["scheduler"].environ()["OMP_NUM_THREADS"] == "1"
        assert len({os.getsid(p.pid) for p in running.values()} | {os.getsid(0)}) == 5


def test_every_rank_is_started() -> None:
    names = [(child.name, child.module, child.extra) for child in pipeline_children(ServerArgs(tp=3))]
    assert names[:3] == [(f"model_worker.{i}", "vibe_sgl_lite.model_worker.process", (str(i),)) for i in range(3)]
    assert [name for name, _, _ in names[3:]] == ["tokenizer_manager", "scheduler", "detokenizer", "http_server"]
    assert not [child for child in pipeline_children(ServerArgs(no_http=True)) if "http" in child.name]
    assert [child.extra for child in pipeline_children(ServerArgs(http_workers=3))[-3:]] == [("0",), ("1",), ("2",)]
    other = ServerArgs(tp=4, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:1")
    assert [child.name for child in pipeline_children(other)] == ["model_worker.2", "model_worker.3"]


def test_ctrl_c_in_a_caller_without_a_handler(model: Path, run_base: Path) -> None:
    engine = pipeline(model, scheduler="never_ready")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    threading.Timer(1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes() == {}
    assert list(run_base.iterdir()) == []


def test_stop_waits_for_running_requests(model: Path) -> None:
    engine = pipeline(model, tokenizer_manager="note slow_drain")
    engine.start()
    start = time.monotonic()
    engine.stop(20)
    assert 1.0 <= time.monotonic() - start < 15
    assert [line.split("(")[0] for line in told(model)] == ["Drain", "Shutdown"]
    assert engine.failure is None


def test_stop_aborts_what_does_not_finish_and_kills_who_does_not_leave(model: Path) -> None:
    engine = pipeline(model, tokenizer_manager="note never_drained", scheduler="deaf")
    engine.start()
    start = time.monotonic()
    engine.stop(0.5)
    assert time.monotonic() - start < 15
    assert [line.split("(")[0] for line in told(model)] == ["Drain", "AbortAll", "Shutdown"]
    assert processes() == {}
    assert engine.failure is None


def test_a_second_stop_hurries(model: Path) -> None:
    engine = pipeline(model, tokenizer_manager="never_drained")
    engine.start()
    engine.request_stop(30)
    time.sleep(0.2)
    start = time.monotonic()
    engine.stop(1.5)
    assert time.monotonic() - start < 15


def test_stop_while_starting(model: Path, run_base: Path) -> None:
    engine = pipeline(model, scheduler="never_ready")
    threading.Timer(1.0, engine.request_stop).start()
    with pytest.raises(StartupError, match="stopped while starting"):
        engine.start()
    assert engine.failure is None
    assert processes() == {}
    assert list(run_base.iterdir()) == []


def test_who_is_awaited_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pipeline(model, rank="never_ready")

    class Ends(logging.Handler):
        """Stops the engine at the first line."""

        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            engine.request_stop(0.0)

    said: list[str] = []
    logger, handler = logging.getLogger("vibe_sgl_lite.runtime.launcher.watch"), Ends()
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.watch.STILL_STARTING_S", 0.2)
    logger.addHandler(handler)
    try:
        with pytest.raises(StartupError, match="stopped while starting"):
            engine.start()
    finally:
        logger.removeHandler(handler)
    assert said[0].startswith("still starting: ")
    assert "model_worker.0" in said[0]


def test_it_outlives_the_thread_that_started_it(model: Path) -> None:
    engine = pipeline(model)
    thread = threading.Thread(target=engine.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert not engine.wait(0)
    engine.stop(0)


def test_what_children_started_goes_with_them(model: Path) -> None:
    engine = pipeline(model, rank="grandchild")
    engine.start()
    deadline = time.monotonic() + 30
    while not (grandchildren := processes()["model_worker.0"].children()):
        assert time.monotonic() < deadline
    engine.stop(0)
    assert alive_after(grandchildren, 20) == []


def test_bad_models_are_refused_before_any_process(tmp_path: Path, model: Path, run_base: Path) -> None:
    with pytest.raises(ConfigError, match="/nowhere does not exist"):
        Pipeline(ServerArgs(model_path="/nowhere")).start()
    with pytest.raises(ConfigError, match=r"--context-length 300 is above .*256"):
        Pipeline(ServerArgs(model_path=str(model), context_length=300)).start()
    with pytest.raises(ModelConfigError, match="--tp 3"):
        Pipeline(ServerArgs(model_path=str(model), tp=3)).start()
    (model / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelConfigError, match="LlamaForCausalLM"):
        Pipeline(ServerArgs(model_path=str(model))).start()
    assert list(run_base.iterdir()) == []


def test_same_name_twice(model: Path) -> None:
    with pipeline(model):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            pipeline(model).start()
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("moment", ["ready", "starting"])
def test_no_descendant_outlives_a_killed_launcher(model: Path, run_base: Path, moment: str) -> None:
    code = (
        "import sys; from tests.runtime.launcher.toy import pipeline; from pathlib import Path\n"
        f"p = pipeline(Path({str(model)!r}), scheduler={'ready' if moment == 'ready' else 'never_ready'!r})\n"
        "print('go', flush=True); p.start(); print('ready', flush=True); p.wait()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "go\n"
    if moment == "ready":
        assert launcher.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    while len(psutil.Process(launcher.pid).children()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    descendants = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    assert alive_after(descendants, 20) == []
