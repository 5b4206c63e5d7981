"""A rank without a model, for benchmarks/internal/pipeline_throughput.py: a step takes a given time, whatever is in it.

It answers with pseudo-random tokens of the vocabulary, none of them an end token's if requests ignore these. The time
of a step is taken from the environment (VIBE_SGL_LITE_NULL_STEP_MS, by default 10): it is the benchmark's alone.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import numpy.typing as npt
import zmq

from vibe_sgl_lite.runtime.launcher.child import HEARTBEAT_S, Child, run_child
from vibe_sgl_lite.runtime.launcher.spawn import RANK_PREFIX
from vibe_sgl_lite.runtime.messages import ForwardBatch, RankInput, RankReady, Shutdown, StepResult
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender

KV_PAGES = 1 << 17
STEP_MS = "VIBE_SGL_LITE_NULL_STEP_MS"


class NullSteps:
    """Known and computed tokens of every slot, and what each step yields."""

    def __init__(self, max_slots: int, vocab_size: int, step_s: float) -> None:
        self._known = np.zeros(max_slots, np.int32)
        self._computed = np.zeros(max_slots, np.int32)
        self._rows: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] = self._known[:0], self._known[:0]
        self._rng = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._step_s = step_s

    def run(self, batch: ForwardBatch) -> StepResult:
        for new in batch.new:
            self._known[new.slot], self._computed[new.slot] = len(new.token_ids) // 4, new.num_computed
        if batch.row_slots is not None and batch.row_tokens is not None:
            self._rows = np.frombuffer(batch.row_slots, np.int32), np.frombuffer(batch.row_tokens, np.int32)
        slots, counts = self._rows
        self._computed[slots] += counts
        samples = self._computed[slots] == self._known[slots]
        self._known[slots] += samples
        ids = np.where(samples, self._rng.integers(0, self._vocab_size, len(slots), np.int32), np.int32(-1))
        tokens = ids.astype(np.int32).tobytes()
        return StepResult(batch.step, tokens, forward_s=self._step_s, total_s=self._step_s, epoch=batch.epoch)


def main(child: Child) -> None:
    spec = child.spec
    inbox: Receiver[RankInput] = Receiver(child.context, spec.endpoints.rank(0), RankInput)
    outbox = Sender(child.context, spec.endpoints.results)
    outbox.send(RankReady(KV_PAGES, spec.device, spec.dtype, spec.endpoints.epoch))
    child.ready()
    step_s = float(os.environ.get(STEP_MS, "10")) / 1e3
    steps = NullSteps(spec.args.max_running_requests, spec.model.vocab_size, step_s)
    poller = zmq.Poller()
    poller.register(inbox.socket, zmq.POLLIN)
    poller.register(child.control, zmq.POLLIN)
    free_at = 0.0
    while True:
        poller.poll(int(HEARTBEAT_S * 1000))
        child.heartbeat()
        if any(isinstance(command, Shutdown) for command in child.commands()):
            return
        for message in inbox.drain(most=1):
            if not isinstance(message, ForwardBatch):
                return
            free_at = max(time.monotonic(), free_at) + step_s
            result = steps.run(message)
            time.sleep(max(0.0, free_at - time.monotonic()))
            outbox.send(result)


if __name__ == "__main__":
    run_child(f"{RANK_PREFIX}{sys.argv[2]}", main)
