"""The sampler over a real Gloo group: two and four processes draw what one draws, tokens and logprobs."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.model_worker.sampling.reference import Row, make_sampler, params
from tests.model_worker.sampling.test_sampler import random_rows
from vibe_sgl_lite.model_worker.parallel import init_parallel
from vibe_sgl_lite.qwen3.layers.parallel_state import Group

VOCAB = 1201  # odd: ranks have unequal parts


def make_rows() -> list[Row]:
    logprobs = [params(temperature=t, logprobs=True, top_logprobs=4, seed=t) for t in (0, 1, 2)]
    generator = torch.Generator().manual_seed(9)
    return random_rows(41, 60, VOCAB) + [Row(torch.randn(VOCAB, generator=generator), p) for p in logprobs]


def draw(group: Group) -> tuple[list[int], Any]:
    rows = make_rows()
    sampler = make_sampler(rows, group)
    logits = torch.stack([row.logits for row in rows])[:, sampler.vocab].contiguous()
    output = sampler.sample(logits, np.arange(len(rows)), np.array([row.position for row in rows]))
    assert output.logprobs is not None
    return output.token_ids.tolist(), output.logprobs.entries()


def rank_main(rank: int, size: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    parallel = init_parallel(rank, size, 1, torch.device("cpu"), Path(rendezvous))
    results.put((rank, draw(parallel.tp)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_draw_what_one_draws(size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (size, str(tmp_path / "store"), results)
    ranks = [context.Process(target=rank_main, args=(rank, *arguments), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
        assert process.exitcode == 0
    tokens, logprobs = draw(Group())
    for rank in range(size):
        assert found[rank][0] == tokens
        assert [(row, e.token_id) for row, e in found[rank][1]] == [(row, e.token_id) for row, e in logprobs]
        for (_, actual), (_, expected) in zip(found[rank][1], logprobs, strict=True):
            assert [t for t, _ in actual.top] == [t for t, _ in expected.top]
            assert actual.logprob == pytest.approx(expected.logprob, abs=1e-6)
