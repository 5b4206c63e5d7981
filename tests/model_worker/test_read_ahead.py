"""Reading ahead: what a rank's load needs and no more, so far ahead and no further, and its failures are the load's."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model_worker.test_quantized_files import make
from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from tests.qwen3.quantised import FORMS
from vibe_sgl_lite.model_worker import read_ahead, weights
from vibe_sgl_lite.model_worker.read_ahead import ReadAhead, Span, bring_in
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CHUNK = 1000


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    assert not readers()


@pytest.fixture
def spans_read(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """What was brought in, in chunks of CHUNK."""
    read: list[Span] = []
    monkeypatch.setattr(read_ahead, "SCRATCH_BYTES", CHUNK // 3)

    def noted(span: Span, scratch: memoryview) -> None:
        bring_in(span, scratch)
        read.append(span)

    monkeypatch.setattr(read_ahead, "bring_in", noted)
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", CHUNK)
    return read


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def numbers(spans: list[Span]) -> list[int]:
    return [byte for span in spans for byte in range(span.start, span.stop)]


def file(folder: Path, size: int, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def test_it_keeps_so_many_bytes_ahead(tmp_path: Path, spans_read: list[Span], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 5 * CHUNK)
    first, second = file(tmp_path, 20 * CHUNK, "first"), file(tmp_path, 30 * CHUNK, "second")
    spans = {"a": Span(second, 2 * CHUNK, 10 * CHUNK), "b": Span(first, 500, 18 * CHUNK)}

    def read_to(bytes_of_second: int, bytes_of_first: int) -> None:
        wanted = [[*range(2 * CHUNK, bytes_of_second)], [*range(500, bytes_of_first)]]

        def found() -> list[list[int]]:
            return [sorted(numbers([span for span in spans_read if span.path == path])) for path in (second, first)]

        eventually(lambda: len(numbers(spans_read)) >= sum(map(len, wanted)))
        time.sleep(0.02)  # in which it might read more
        assert found() == wanted

    with ReadAhead(spans) as ahead:
        read_to(7 * CHUNK, 500)
        ahead.reached("a", 4 * CHUNK)
        read_to(9 * CHUNK, 500)
        ahead.reached("a", 3 * CHUNK)  # once more
        ahead.reached("a", 8 * CHUNK)
        read_to(10 * CHUNK, 3 * CHUNK)  # 2,000 bytes and 2,500: another chunk would be more than 5,000
        ahead.reached("b", 18 * CHUNK)
        read_to(10 * CHUNK, 18 * CHUNK)


def test_little_free_memory_is_left_to_others(
    tmp_path: Path, spans_read: list[Span], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        value = 32 * CHUNK

    monkeypatch.setattr(read_ahead, "available_memory", Free)
    with ReadAhead({"a": Span(file(tmp_path, 9 * CHUNK), 0, 9 * CHUNK)}):
        eventually(lambda: len(spans_read) >= 2)
        time.sleep(0.02)  # in which it might read more
    assert sorted(numbers(spans_read)) == [*range(2 * CHUNK)]


def test_a_file_that_ends_early_fails_the_load(tmp_path: Path, spans_read: list[Span]) -> None:
    path = file(tmp_path, 2 * CHUNK + 1)
    says = f"{path} .* ends at byte {2 * CHUNK + 1}"
    with ReadAhead({"a": Span(path, 0, 9 * CHUNK)}) as ahead:
        eventually(lambda: not readers())
        for stop in (1, 2):
            with pytest.raises(WeightsError, match=says):
                ahead.reached("a", stop)
    assert sorted(numbers(spans_read)) == [*range(2 * CHUNK)]


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), FileNotFoundError(2, "No such file")])
def test_a_disk_that_fails_fails_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError) -> None:
    make_checkpoint(tmp_path, DENSE)

    def failing(span: Span, scratch: memoryview) -> None:
        raise fault

    monkeypatch.setattr(read_ahead, "bring_in", failing)
    with pytest.raises(WeightsError) as error:
        load_weights(rank_of(tmp_path, 0, 2), tmp_path, lambda done, total: eventually(lambda: not readers()))
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert str(fault) in str(error.value)


def test_a_load_that_fails_ends_it(tmp_path: Path, spans_read: list[Span]) -> None:
    with pytest.raises(ZeroDivisionError), ReadAhead({"a": Span(file(tmp_path, 9 * CHUNK), 0, 9 * CHUNK)}):
        raise ZeroDivisionError


def test_what_is_in_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, 1 << 20)
    with path.open("rb") as opened:
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system does not tell what is in memory")
    read, counts = os.preadv, []

    def noted(*args: Any) -> int:
        counts.append(read(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", noted)
    bring_in(Span(path, 1, 1 << 20), memoryview(bytearray(1 << 20)))
    assert 1 < sum(counts) < 100


def rank_of(folder: Path, rank: int, size: int) -> Qwen3:
    share: Any = Group(rank, size, object())  # type: ignore[arg-type]  # never used: nothing here communicates
    state = ParallelState(rank=rank, tp=share, ep=Group(), expert_tp=share)
    return Qwen3(ModelConfig.from_folder(folder), state, torch.float16, torch.device("cpu"), TorchOperations())


@pytest.mark.parametrize("form", ["plain", "plain moe", *FORMS, "fp8 moe", "awq moe"])
def test_a_rank_reads_what_it_loads(
    tmp_path: Path, form: str, spans_read: list[Span], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which it loads it, and nothing else."""
    name, _, shape = form.partition(" ")
    if name == "plain":
        make_checkpoint(folder := tmp_path, MOE if shape else DENSE)
    else:
        folder = make(tmp_path, name, shape or "dense")
    loaded: dict[Span, None] = {}
    slice_of = weights._Checkpoint._slice

    def noted(self: Any, name: str, source: tuple[slice, ...]) -> torch.Tensor:
        stored = self._tensors[name]
        places = np.arange(math.prod(stored.shape)).reshape(stored.shape)[source]
        size = (stored.stop - stored.start) // math.prod(stored.shape)
        reach = stored.start + places.min() * size, stored.start + (places.max() + 1) * size
        loaded[Span(stored.path, *reach)] = None
        return slice_of(self, name, source)

    def wait(done: int, total: int) -> None:
        if done == total:
            eventually(lambda: len(numbers(spans_read)) >= len(numbers([*loaded])))

    monkeypatch.setattr(weights._Checkpoint, "_slice", noted)
    monkeypatch.setattr(read_ahead, "THREADS", 1)
    load_weights(rank_of(folder, 1, 2), folder, wait)
    assert numbers(spans_read) == numbers([*loaded])
    assert len(numbers(spans_read)) < 0.8 * (folder / "model.safetensors").stat().st_size
