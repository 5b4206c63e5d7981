"""Two ranks on the GPU backend, their kernels interpreted, draw the tokens of one rank of plain torch."""

from pathlib import Path

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.model_worker.gpu.rank_cases import COUNT, LAYOUT, PARAMS, PROMPTS
from tests.model_worker.gpu.test_backend import run, runner_of
from tests.model_worker.test_model_runner import Driver
from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from vibe_sgl_lite.model_worker.compute import torch_compute


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_ranks_draw_the_tokens_of_one(tmp_path: Path) -> None:
    """The chain of few rows and without it, layers one by one in chunks, experts with all tokens and sent some, and the
    draw over parts of the vocabulary."""
    expected = []
    for name, shape, times in (("dense", DENSE, 2), ("moe", MOE, 2)):
        make_checkpoint(tmp_path / name, shape)
        runner = runner_of(tmp_path / name, torch.device("cpu"), torch_compute())
        tokens = run(Driver(runner), PROMPTS, COUNT, PARAMS)
        expected += [tokens[slot] for slot in range(len(PROMPTS))] * times
    for rank in range(2):
        (tmp_path / f"region-{rank}").write_bytes(bytes(LAYOUT.nbytes))
    assert run_ranks("tests.model_worker.gpu.rank_cases:tokens", 2, tmp_path, timeout_s=900) == [expected] * 2
