"""A step's Python is the same for any number of rows: what grows with the batch runs in kernels, numpy and torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.model_worker.test_model_runner import new_slot, runner_of, sampling
from tests.qwen3.harness import DENSE, compute_of, load_model, make_checkpoint, random_tokens
from vibe_sgl_lite.runtime.messages import ForwardBatch, pack_ids

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k and top-p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},  # never beyond its candidates
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
}


def instructions(call: Callable[[], object]) -> int:
    """How many bytecode instructions run in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_no_python_runs_for_single_rows(tmp_path: Path, kind: str) -> None:
    """Of plain decode steps, and of one that has a row less than the one before, so that everything is planned anew."""
    make_checkpoint(tmp_path, DENSE)
    compute = compute_of("kernels")
    model = load_model(tmp_path, compute=compute)

    def counts(rows: int) -> list[int]:
        runner = runner_of(model, compute=compute)
        new = [new_slot(slot, random_tokens(9, seed=slot), sampling(**SAMPLINGS[kind])) for slot in range(rows)]
        runner.run(ForwardBatch(0, new=new, row_slots=pack_ids(range(rows)), row_tokens=pack_ids([9] * rows)))
        same = pack_ids(range(rows)), pack_ids([1] * rows)
        less = pack_ids(range(rows - 1)), pack_ids([1] * (rows - 1))
        batches = [
            ForwardBatch(1, row_slots=same[0], row_tokens=same[1]),
            ForwardBatch(2),
            ForwardBatch(3),
            ForwardBatch(4, row_slots=less[0], row_tokens=less[1]),
        ]
        return [instructions(lambda batch=batch: runner.run(batch)) for batch in batches]  # type: ignore[misc]

    with torch.inference_mode():
        few, many = counts(3), counts(19)
    assert few == many
    assert min(few) > 1000
