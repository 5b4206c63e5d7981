"""Rank processes over real channels: ready, steps, end, clear failures. The test plays launcher and scheduler."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.model_worker.test_model_runner import expected_tokens, sampling
from tests.qwen3.harness import DENSE, MOE, make_checkpoint, random_tokens
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.launcher.control import ControlLine
from vibe_sgl_lite.runtime.messages import (
    ChildFailed,
    ChildMessage,
    ChildReady,
    ForwardBatch,
    NewSlot,
    RankOutput,
    RankReady,
    Shutdown,
    StepResult,
    StopRank,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

LIMIT_S = 60.0


class Launcher:
    """Ranks started as the launcher starts them, and the sockets of launcher and scheduler."""

    def __init__(self, folder: Path, directory: Path, *, epoch: int = 0, **args: Any) -> None:
        self.endpoints = Endpoints(directory=str(directory), api="", epoch=epoch)
        settings = ServerArgs(**({"max_total_tokens": 512, "max_running_requests": 8, "page_size": 8} | args))
        spec = PipelineSpec(
            args=settings,
            endpoints=self.endpoints,
            model=ModelConfig.from_folder(folder),
            model_name="test",
            model_folder=str(folder),
            tokenizer_folder=str(folder),
            context_length=64,
            chunked_prefill_size=512,
            page_size=settings.page_size or 16,
            device="cpu",
            dtype="float32",
            epoch="0",
        )
        spec_file = directory / "spec.json"
        spec_file.write_bytes(msgspec.json.encode(spec))
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = ControlLine(self.endpoints.control)
        self.results: Receiver[RankOutput] = Receiver(self.context, self.endpoints.results, RankOutput)
        self.ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vibe_sgl_lite.runtime.launcher.boot",
                    "vibe_sgl_lite.model_worker.process",
                    str(spec_file),
                    str(rank),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(settings.tp)
        ]
        self.senders = [Sender(self.context, self.endpoints.rank(rank)) for rank in range(settings.tp)]
        self.step_results: list[StepResult] = []

    def control_messages(self, until: int) -> list[ChildMessage]:
        """Messages but heartbeats, at least `until` of them."""
        messages: list[ChildMessage] = []
        deadline = time.monotonic() + LIMIT_S
        while len(messages) < until and time.monotonic() < deadline:
            messages += [m for m in self.control.receive(0.2) if isinstance(m, ChildReady | ChildFailed)]
        return messages

    def step(self, batch: ForwardBatch) -> StepResult:
        for sender in self.senders:
            sender.send(batch)
        result = self.results.receive(LIMIT_S)
        assert isinstance(result, StepResult)
        self.step_results.append(result)
        return result

    def exit_codes(self) -> list[int]:
        return [rank.wait(LIMIT_S) for rank in self.ranks]

    def close(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        for sender in self.senders:
            sender.close()
        self.results.close()
        self.control.close()
        self.context.destroy(linger=0)


@contextmanager
def launched(folder: Path, **args: Any) -> Iterator[Launcher]:
    with tempfile.TemporaryDirectory(prefix="vsl") as directory:
        launcher = Launcher(folder, Path(directory), **args)
        try:
            yield launcher
        finally:
            launcher.close()


def generate(launcher: Launcher, prompt: list[int], count: int) -> list[int]:
    """One request in slot 2, its prompt in two chunks, greedily."""
    pages = pack_ids(range(6, -1, -1))
    first = ForwardBatch(
        0,
        new=[NewSlot(2, 1, pack_ids(prompt), len(prompt), 0, pages, sampling())],
        row_slots=pack_ids([2]),
        row_tokens=pack_ids([5]),
    )
    tokens = unpack_ids(launcher.step(first).token_ids)
    assert tokens == [-1]
    rest = ForwardBatch(1, row_slots=pack_ids([2]), row_tokens=pack_ids([len(prompt) - 5]))
    tokens = unpack_ids(launcher.step(rest).token_ids)
    for number in range(count - 1):
        # Rows are named when they change, and left out when not.
        rows = pack_ids([1]) if number == 0 else None
        batch = ForwardBatch(2 + number, row_slots=None if rows is None else pack_ids([2]), row_tokens=rows)
        tokens += unpack_ids(launcher.step(batch).token_ids)
    return tokens


@pytest.mark.parametrize(
    ("shape", "tp", "ep"), [(DENSE, 1, 1), (DENSE, 2, 1), (MOE, 2, 2)], ids=["tp1", "tp2", "moe tp2 ep2"]
)
def test_ranks_serve_and_leave(tmp_path: Path, shape: dict[str, Any], tp: int, ep: int) -> None:
    reference = make_checkpoint(tmp_path, shape)
    prompt = random_tokens(13)
    with launched(tmp_path, tp=tp, ep=ep) as launcher:
        assert all(isinstance(message, ChildReady) for message in launcher.control_messages(tp))
        ready = launcher.results.receive(LIMIT_S)
        assert isinstance(ready, RankReady)
        assert (ready.kv_pages, ready.device, ready.dtype) == (64, "cpu", "float32")
        assert ready.weights.version == "default"
        assert generate(launcher, prompt, 9) == expected_tokens(reference, prompt, 9)
        for rank in range(tp):
            if rank == 0:
                launcher.senders[0].send(StopRank())
            else:
                launcher.control.send(f"model_worker.{rank}", Shutdown())
        assert launcher.exit_codes() == [0] * tp


def test_two_steps_may_be_in_flight(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    prompt = random_tokens(13)
    with launched(tmp_path) as launcher:
        assert isinstance(launcher.results.receive(LIMIT_S), RankReady)
        sender = launcher.senders[0]
        new = NewSlot(0, 1, pack_ids(prompt), 13, 0, pack_ids(range(4)), sampling())
        sender.send(ForwardBatch(0, new=[new], row_slots=pack_ids([0]), row_tokens=pack_ids([13])))
        sender.send(ForwardBatch(1, row_slots=pack_ids([0]), row_tokens=pack_ids([1])))
        for step in range(2, 8):
            sender.send(ForwardBatch(step))
        results = [launcher.results.receive(LIMIT_S) for _ in range(8)]
        tokens = [unpack_ids(result.token_ids)[0] for result in results if isinstance(result, StepResult)]
        assert tokens == expected_tokens(reference, prompt, 8)


def test_a_rank_knows_its_group(tmp_path: Path) -> None:
    """It says which group it belongs to, in all that it sends, and drops what is meant for another."""
    reference = make_checkpoint(tmp_path, DENSE)
    prompt = random_tokens(13)
    with launched(tmp_path, epoch=2) as launcher:
        ready = launcher.results.receive(LIMIT_S)
        assert isinstance(ready, RankReady)
        assert ready.epoch == 2
        new = NewSlot(0, 1, pack_ids(prompt), 13, 0, pack_ids(range(4)), sampling())
        batch = ForwardBatch(0, new=[new], row_slots=pack_ids([0]), row_tokens=pack_ids([13]), epoch=2)
        for epoch in (0, 1, 3):
            launcher.senders[0].send(msgspec.structs.replace(batch, step=9, epoch=epoch))
        launcher.senders[0].send(StopRank(epoch=1))
        result = launcher.step(batch)
        assert (result.epoch, result.step) == (2, 0)
        assert unpack_ids(result.token_ids) == expected_tokens(reference, prompt, 1)
        launcher.senders[0].send(StopRank(epoch=2))
        assert launcher.exit_codes() == [0]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_profile_tells_the_parts_of_every_step(tmp_path: Path, tp: int) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    prompt = random_tokens(13)
    with launched(tmp_path, tp=tp, profile=str(tmp_path / "unused")) as launcher:
        assert isinstance(launcher.results.receive(LIMIT_S), RankReady)
        began = time.monotonic()
        assert generate(launcher, prompt, 9) == expected_tokens(reference, prompt, 9)
        ended = time.monotonic()
        times = [result.times for result in launcher.step_results if result.times is not None]
        assert len(times) == len(launcher.step_results) == 10
        assert all({"idle", "unpack"} <= {*part.between} for part in times)
        assert ["send" in part.between for part in times] == [False] + [True] * 9
        assert all(("collectives" in part.step) == (tp > 1) for part in times)
        last = 0.0
        for part, result in zip(times, launcher.step_results, strict=True):
            assert part.began >= last
            assert sum(part.step.values()) >= result.total_s
            last = part.began + sum(part.step.values())
            if part is not times[0]:
                assert began < part.began < last < ended
                assert part.began - sum(part.between.values()) >= began


def test_without_a_profile_nothing_is_timed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    with launched(tmp_path) as launcher:
        assert isinstance(launcher.results.receive(LIMIT_S), RankReady)
        generate(launcher, random_tokens(13), 3)
        assert [result.times for result in launcher.step_results] == [None] * 4


def test_a_broken_checkpoint_is_told_and_the_rank_leaves(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with launched(tmp_path) as launcher:
        (message,) = launcher.control_messages(1)
        assert isinstance(message, ChildFailed)
        assert message.user
        assert "model.safetensors is not a whole safetensors file" in message.message
        assert launcher.exit_codes() == [1]


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    (tmp_path / "model.safetensors").unlink()
    with launched(tmp_path, load_format="dummy") as launcher:
        assert isinstance(launcher.results.receive(LIMIT_S), RankReady)
        assert len(generate(launcher, random_tokens(9), 5)) == 5
