"""The detokenizer process: `python -m vibe_sgl_lite.detokenizer.process <spec file>`.

Sleeps in a poll until the scheduler sends something or the launcher commands; chunks go to the tokenizer manager, stop
matches back to the scheduler.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import zmq

from vibe_sgl_lite.detokenizer.core import Detokenizer
from vibe_sgl_lite.runtime.chrome_trace import DETOKENIZER, ChromeTrace
from vibe_sgl_lite.runtime.launcher.child import HEARTBEAT_S, Child, run_child
from vibe_sgl_lite.runtime.messages import DetokenizerInput, NewScheduler, NewWeights, OpenText, Shutdown
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender

FILE_POLL_S = 0.01
AT_ONCE = 256  # messages between two looks at the launcher's line

log = logging.getLogger(__name__)


def main(child: Child) -> None:
    endpoints = child.spec.endpoints
    receiver: Receiver[DetokenizerInput] = Receiver(child.context, endpoints.detokenizer, DetokenizerInput)
    tokenizer_manager = Sender(child.context, endpoints.tokenizer_manager)
    scheduler = Sender(child.context, endpoints.scheduler)
    _wait_for(Path(endpoints.tokenizer_file))
    detokenizer = Detokenizer(Tokenizer.from_file(endpoints.tokenizer_file))
    profile = child.spec.args.profile
    trace = ChromeTrace(profile, "detokenizer", (DETOKENIZER,)) if profile is not None else None
    poller = zmq.Poller()
    poller.register(receiver.socket, zmq.POLLIN)
    poller.register(child.control, zmq.POLLIN)
    child.ready()
    while True:
        poller.poll(int(HEARTBEAT_S * 1000))
        child.heartbeat()
        if any(isinstance(command, Shutdown) for command in child.commands()):
            break
        for message in receiver.drain(AT_ONCE):
            if isinstance(message, OpenText):
                detokenizer.open(message)
                continue
            if isinstance(message, NewWeights):
                detokenizer.weight_version = message.version
                continue
            if isinstance(message, NewScheduler):
                detokenizer.forget_all()
                continue
            began = time.monotonic()
            batch, matches = detokenizer.step(message)
            if batch.chunks:
                tokenizer_manager.send(batch)
            for match in matches:
                scheduler.send(match)
            if trace is not None:
                args = {"outputs": len(message.outputs), "stop_strings": len(matches)}
                trace.span(DETOKENIZER, "step", began, time.monotonic() - began, args)
    if trace is not None:
        trace.close()
    log.info("leaving: %d samples open, %d late outputs dropped", detokenizer.num_samples, detokenizer.late)
    for channel in (receiver, tokenizer_manager, scheduler):
        channel.close()


def _wait_for(path: Path) -> None:
    """Until the tokenizer manager has written it; should that fail, the launcher ends us."""
    while not path.exists():
        time.sleep(FILE_POLL_S)


if __name__ == "__main__":
    run_child("detokenizer", main)
