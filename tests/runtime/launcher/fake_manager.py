"""A stand-in for the tokenizer manager as a process: the fake engine at the pipeline's client address.

A prompt "slow" is accepted and never finished, until an abort of everything ends it.
"""

from __future__ import annotations

from tests.runtime.client.fake_engine import FakeEngine, accepted, answer, chunk
from vibe_sgl_lite.runtime.launcher.child import Child, run_child
from vibe_sgl_lite.runtime.messages import AbortAll, Drain, Finish, Generate, ServerMessage, Shutdown


def main(child: Child) -> None:
    slow: list[str] = []

    def script(request: Generate) -> list[ServerMessage]:
        if request.prompt == "slow":
            slow.append(request.rid)
            return [accepted(request), chunk(request.rid, 0, "par")]
        return answer(request)

    engine = FakeEngine(child.spec.endpoints.api, script)
    child.ready()
    while True:
        child.heartbeat()
        child.control.poll(50)
        for command in child.commands():
            match command:
                case AbortAll(error=error):
                    finish = Finish(reason="abort") if error is None else Finish(reason="error", error=error)
                    engine.send(*(chunk(rid, 3, "", finish) for rid in slow))
                    child.drained()
                case Drain():
                    child.drained()
                case Shutdown():
                    engine.close()
                    return


if __name__ == "__main__":
    run_child("tokenizer_manager", main)
