"""The pipeline's life with stand-in processes: ready, watched, drained, stopped, and its children's deaths told."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from tests.runtime.settings.files import write_zeros
from vibe_sgl_lite.runtime.errors import ConfigError, ModelConfigError, StartupError
from vibe_sgl_lite.runtime.launcher import standby
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec, pipeline_children
from vibe_sgl_lite.runtime.launcher.watch import Watch
from vibe_sgl_lite.runtime.messages import ChildFailed
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.rundir import default_address

NAMES = ("model_worker.0", "tokenizer_manager", "scheduler", "detokenizer")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def run_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pl-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder) / "vibe-sgl-lite"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_zeros(folder)
    return folder


def children(**behaviours: str) -> list[ChildSpec]:
    """The engine's four with behaviours by name (rank 0 is `rank`)."""
    specs = []
    for name in NAMES:
        asked = behaviours.get("rank" if name == "model_worker.0" else name, "ready")
        specs.append(ChildSpec(name, "tests.runtime.launcher.fake_child", (name, *asked.split())))
    return specs


def pipeline(model: Path, args: ServerArgs | None = None, **behaviours: str) -> Pipeline:
    args = args or ServerArgs(model_path=str(model), log_level="error", restart="never")
    return Pipeline(args, children=children(**behaviours))


def processes() -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.Process().children():
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "tests.runtime.launcher.fake_child" in line:
            found[line[line.index("tests.runtime.launcher.fake_child") + 2]] = process
    return found


def alive_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Who still runs; a zombie, which only waits for a slow init to collect it, does not."""
    psutil.wait_procs(processes, timeout=seconds)
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def told(model: Path) -> list[str]:
    file = model / "told"
    return file.read_text().splitlines() if file.exists() else []


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
    assert names[:3] == [(f"model_worker.{i}", "vibe_sgl_lite.model_worker.worker", (str(i),)) for i in range(3)]
    assert [name for name, _, _ in names[3:]] == ["tokenizer_manager", "scheduler", "detokenizer", "http_server"]
    assert not [child for child in pipeline_children(ServerArgs(no_http=True)) if "http" in child.name]
    assert [child.extra for child in pipeline_children(ServerArgs(http_workers=3))[-3:]] == [("0",), ("1",), ("2",)]
    other = ServerArgs(tp=4, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:1")
    assert [child.name for child in pipeline_children(other)] == ["model_worker.2", "model_worker.3"]


@pytest.mark.parametrize(
    ("behaviours", "says"),
    [
        ({"rank": "user_fail"}, "model_worker.0: model.safetensors is cut short: download it again"),
        ({"rank": "fail"}, "model_worker.0: RuntimeError: out of luck"),
        ({"detokenizer": "exit0"}, "detokenizer exited with code 0 while starting"),
        ({"scheduler": "fail_beside", "rank": "user_fail"}, "model_worker.0: model.safetensors"),
    ],
)
def test_a_child_that_does_not_come_up(model: Path, run_base: Path, behaviours: dict[str, str], says: str) -> None:
    specs = children(**{"tokenizer_manager": "never_ready"}, **behaviours)
    engine = Pipeline(ServerArgs(model_path=str(model), log_level="error"), children=specs)
    start = time.monotonic()
    with pytest.raises(StartupError) as error:
        engine.start()
    assert time.monotonic() - start < 30
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
    assert error.value.user == ("user_fail" in behaviours.values())
    assert processes() == {}
    assert list(run_base.iterdir()) == []


def test_a_module_that_cannot_be_imported(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    specs = [*children()[:3], ChildSpec("detokenizer", "tests.runtime.no_such_module")]
    engine = Pipeline(ServerArgs(model_path=str(model), log_level="error"), children=specs)
    with pytest.raises(StartupError, match=r"detokenizer could not be loaded .* while starting") as error:
        engine.start()
    assert error.value.user
    log = capfd.readouterr().err
    assert "tests.runtime.no_such_module cannot be loaded: ImportError: " in log
    assert "Traceback" not in log


@pytest.mark.parametrize("call", ["write_bytes", "touch"])
def test_a_disk_that_is_full_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    def full(path: Path, *rest: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, call, full)
    with pytest.raises(StartupError, match=r"No space left on device: '.*spec") as error:
        pipeline(model).start()
    assert error.value.user
    assert "Traceback" not in capfd.readouterr().err


def test_a_socket_that_cannot_be_bound_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, mode: int) -> None:
        raise zmq.ZMQError(errno.ENOSPC, "No space left on device")

    def contexts() -> list[object]:
        return [thing for thing in gc.get_objects() if isinstance(thing, zmq.Context) and not thing.closed]

    before = contexts()
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.control.bind_ipc", full)
    with pytest.raises(StartupError, match=r"vibe-sgl-lite/default/\w+: No space left on device") as error:
        pipeline(model).start()
    assert error.value.user
    assert contexts() == before  # garbage collection of an open one may hang


@pytest.mark.parametrize("victim", NAMES)
def test_a_killed_child_is_noticed_named_and_told(model: Path, victim: str) -> None:
    engine = pipeline(model, tokenizer_manager="note")
    engine.start()
    running = processes()
    start = time.monotonic()
    running[victim].kill()
    assert engine.wait(20)
    assert time.monotonic() - start < 20
    assert engine.failure == f"{victim} was killed by SIGKILL"
    assert not any(p.is_running() for p in running.values())
    if victim != "tokenizer_manager":
        assert [line for line in told(model) if "AbortAll" in line and "engine_dead" in line and victim in line]


def test_death_is_noticed_at_once(model: Path) -> None:
    engine = pipeline(model, tokenizer_manager="note")
    engine.start()
    processes()["detokenizer"].kill()
    start = time.monotonic()
    while not told(model):
        assert time.monotonic() - start < 2  # 0.2 on an idle machine; a silent child is noticed after 15
        time.sleep(0.005)
    assert engine.wait(30)


def test_a_named_culprit_is_dumped_and_killed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = pipeline(model, scheduler="accuse=model_worker.0", tokenizer_manager="note")
    engine.start()
    assert engine.wait(30)
    assert engine.failure == "model_worker.0 hung and was killed: no step result for 1 s"
    assert "fake_child.py" in capfd.readouterr().err  # its stacks
    assert any("AbortAll" in line for line in told(model))


def test_a_silent_child_is_taken_for_hung(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.watch.HEARTBEAT_LOST_S", 1.5)
    engine = pipeline(model, detokenizer="mute")
    engine.start()
    assert engine.wait(30)
    assert engine.failure == "detokenizer hung and was killed: no heartbeat for 2 s"


def test_a_pause_of_the_launcher_itself_is_no_silence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.watch.HEARTBEAT_LOST_S", 1.0)
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.watch.OWN_PAUSE_S", 0.5)
    turn = Watch._turn
    pauses = [1.5]

    def paused_turn(watch: Watch, timeout_s: float) -> None:
        if pauses:
            time.sleep(pauses.pop())  # and nothing of what came meanwhile is read yet
        else:
            turn(watch, timeout_s)

    with pipeline(model) as engine:
        monkeypatch.setattr(Watch, "_turn", paused_turn)
        assert not engine.wait(2.5)
        assert pauses == []


def test_nonsense_on_the_control_line_changes_nothing(model: Path, run_base: Path) -> None:
    with pipeline(model) as engine, zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
        control = next((run_base / "default").glob("*/control"))
        intruder.setsockopt(zmq.IDENTITY, b"intruder")
        intruder.connect(f"ipc://{control}")
        failed = msgspec.msgpack.encode(ChildFailed(name="scheduler", message="not me", culprit="model_worker.0"))
        for frames in ([b"garbage"], [b""], [b"\xc1"], [failed], [b"scheduler", failed]):
            intruder.send_multipart(frames)
        assert not engine.wait(1.0)
        assert engine.failure is None


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
        "import sys; from tests.runtime.launcher.test_pipeline import pipeline; from pathlib import Path\n"
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


# ---------------------------------------------------------------------------------------------------------- restarts


def restarting(model: Path, max_restarts: int = 3, **behaviours: str) -> Pipeline:
    args = ServerArgs(model_path=str(model), log_level="error", restart="on-failure", max_restarts=max_restarts)
    return Pipeline(args, children=children(tokenizer_manager="note", **behaviours))


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("victim", "together", "told_manager"),
    [
        ("model_worker.0", {"model_worker.0"}, False),
        ("scheduler", {"model_worker.0", "scheduler"}, True),
        ("detokenizer", {"detokenizer"}, True),
    ],
)
def test_a_killed_child_starts_again_alone_or_with_its_group(
    model: Path, victim: str, together: set[str], told_manager: bool
) -> None:
    with restarting(model) as engine:
        before = processes()
        before[victim].kill()
        wait_for(lambda: processes().get(victim, before[victim]) != before[victim])
        wait_for(lambda: len(processes()) == 4)
        after = processes()
        assert {name for name in NAMES if after[name].pid != before[name].pid} == together
        if told_manager:
            wait_for(lambda: any("EngineLost" in line and victim in line for line in told(model)))
        assert engine.failure is None
        assert not any("AbortAll" in line for line in told(model))


def test_the_scheduler_hears_of_lost_ranks_and_lost_clients(model: Path) -> None:
    args = ServerArgs(model_path=str(model), log_level="error", restart="on-failure")
    with Pipeline(args, children=children(scheduler="note ready")):
        processes()["model_worker.0"].kill()
        wait_for(lambda: [line for line in told(model) if "RanksLost(epoch=1)" in line])
        processes()["tokenizer_manager"].kill()
        wait_for(lambda: [line for line in told(model) if "ClientsLost" in line])
        wait_for(lambda: "model_worker.0" in processes())
        processes()["model_worker.0"].kill()
        wait_for(lambda: [line for line in told(model) if "RanksLost(epoch=2)" in line])


def test_a_restarted_rank_has_sockets_and_a_pool_of_its_own(model: Path, run_base: Path) -> None:
    def spec() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next((run_base / "default").glob("*/spec.json")).read_text())
        return found

    with restarting(model):
        first = spec()
        assert (first["endpoints"]["epoch"], first["args"]["max_total_tokens"]) == (0, None)
        processes()["model_worker.0"].kill()
        wait_for(lambda: spec()["endpoints"]["epoch"] == 1)
        assert spec()["args"]["max_total_tokens"] == 7 * 16
        assert spec()["epoch"] != first["epoch"]


def test_it_gives_up_after_the_restarts_it_may_try(model: Path) -> None:
    engine, seen = restarting(model, max_restarts=1), []
    engine.start()
    for _ in range(2):
        wait_for(lambda: "detokenizer" in processes())
        seen.append(processes()["detokenizer"])
        seen[-1].kill()
        wait_for(lambda: processes().get("detokenizer") != seen[-1])
    assert engine.wait(30)
    assert engine.failure is not None
    assert engine.failure.startswith("detokenizer was killed by SIGKILL")  # "while starting" where it was quick
    assert engine.failure.endswith("given up after 1 restarts in 60 s")
    assert [line for line in told(model) if "AbortAll" in line and "engine_dead" in line]
    assert processes() == {}


def test_a_spare_process_takes_the_place_of_a_dead_rank(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spares() -> list[int]:
        """Those that began as one."""
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child.pid] if "--standby" in child.cmdline() else []
        return found

    monkeypatch.setattr(standby, "FIRST_S", 0.0)
    with restarting(model, rank="note ready") as engine:
        wait_for(spares)
        (spare,) = spares()
        rank = next(c for c in psutil.Process().children() if c.pid != spare and "model_worker.0" in c.cmdline())
        rank.kill()
        wait_for(lambda: len(spares()) == 2)  # one runs as the rank, and there is another for the next time
        assert spare in spares()
        assert engine.failure is None
        engine.stop()
    assert told(model).count("Shutdown()") == 2  # of the tokenizer manager and of the rank
    assert processes() == {}


def test_a_full_disk_is_waited_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child that starts again reads cannot be written twice, then it can."""
    write_spec, calls = Pipeline._write_spec, []

    def full(pipeline: Pipeline, epoch: int) -> Path:
        calls.append(epoch)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_spec(pipeline, epoch)

    monkeypatch.setattr(Pipeline, "_write_spec", full)
    with restarting(model) as engine:
        processes()["detokenizer"].kill()
        wait_for(lambda: len(calls) == 4 and "detokenizer" in processes())
        assert engine.failure is None


def test_a_hung_child_starts_again(model: Path) -> None:
    with restarting(model, scheduler="accuse=model_worker.0 ready") as engine:
        first = processes()["model_worker.0"]
        wait_for(lambda: processes().get("model_worker.0", first) != first)
        assert engine.failure is None


def test_a_stop_while_a_child_starts_again_is_clean(model: Path) -> None:
    engine = restarting(model)
    engine.start()
    processes()["detokenizer"].kill()
    engine.stop()
    assert engine.wait(0)
    assert processes() == {}
