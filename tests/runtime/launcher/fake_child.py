"""A stand-in for one of the engine's processes: `fake_child SPEC NAME BEHAVIOUR [BEHAVIOUR ...]`.

Behaviours: ready, fail, no_threads, no_memory, user_fail, fail_beside (once another does user_fail), exit0,
never_ready, deaf (ignores Shutdown), mute (no heartbeats), never_drained, slow_drain, grandchild (starts a sleeping
process), accuse=NAME, note (writes what it was told to a file).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.launcher.child import Child, run_child
from vibe_sgl_lite.runtime.messages import AbortAll, Drain, Shutdown


def main(child: Child) -> None:
    behaviours = sys.argv[3:]
    failing = Path(child.spec.model_folder) / "failing"
    if "fail_beside" in behaviours:
        while not failing.exists():
            time.sleep(0.001)
    if "user_fail" in behaviours:
        failing.touch()
        raise WeightsError("model.safetensors is cut short:\ndownload it again")
    if "fail" in behaviours or "fail_beside" in behaviours:
        raise RuntimeError("out of luck")
    if "no_threads" in behaviours:
        raise RuntimeError("can't start new thread")  # Python's words where the address space is used up
    if "no_memory" in behaviours:
        raise MemoryError
    if "exit0" in behaviours:
        return
    if "grandchild" in behaviours:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], stdin=subprocess.DEVNULL)
    if "never_ready" not in behaviours:
        if child.name == "scheduler":
            child.ready(kv_pages=7, device="cpu", dtype="float32")
        else:
            child.ready()
    accused = next((b.removeprefix("accuse=") for b in behaviours if b.startswith("accuse=")), None)
    if accused is not None:
        time.sleep(0.5)
        child.failed("no step result for 1 s", culprit=accused)
    drain_end: float | None = None
    while True:
        if "mute" not in behaviours:
            child.heartbeat()
        child.control.poll(50)
        for command in child.commands():
            if "note" in behaviours:
                with (Path(child.spec.model_folder) / "told").open("a") as file:
                    file.write(f"{command}\n")
            match command:
                case Drain() if "slow_drain" in behaviours:
                    drain_end = time.monotonic() + 1.0
                case Drain() if "never_drained" in behaviours:
                    pass
                case Drain() | AbortAll():
                    child.drained()
                case Shutdown() if "deaf" not in behaviours:
                    return
        if drain_end is not None and time.monotonic() > drain_end:
            drain_end = None
            child.drained()


if __name__ == "__main__":
    run_child(sys.argv[2], main)
