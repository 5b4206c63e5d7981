"""Children that do not come up, die, or hang: noticed, named and told."""

from __future__ import annotations

import errno
import gc
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.runtime.launcher.toy import NAMES, children, pipeline, processes, told
from vibe_sgl_lite.runtime.errors import StartupError
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.launcher.spawn import ChildSpec
from vibe_sgl_lite.runtime.launcher.watch import Watch
from vibe_sgl_lite.runtime.messages import ChildFailed
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs


@pytest.mark.parametrize(
    ("behaviours", "says"),
    [
        ({"rank": "user_fail"}, "model_worker.0: model.safetensors is cut short: download it again"),
        ({"rank": "fail"}, "model_worker.0: RuntimeError: out of luck"),
        ({"rank": "no_threads"}, "model_worker.0: RuntimeError: can't start new thread (memory is limited by "),
        ({"rank": "no_memory"}, "model_worker.0: MemoryError: (memory is limited by "),
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
    assert error.value.user == bool({"user_fail", "no_threads", "no_memory"} & set(behaviours.values()))
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
