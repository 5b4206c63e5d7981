"""What `--deterministic` promises, in bf16: the same bits of tokens and logprobs in any surroundings."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from benchmarks.internal.in_process import InProcess, Sample
from tests.integration.test_speculation import END, FOLDER, KINDS, prompts
from tests.model_worker.sampling.reference import params
from vibe_sgl_lite.model_worker.ngram import NgramDrafter
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling

ASKED = prompts(24)
pytestmark = pytest.mark.usefixtures("one_thread")


def sampling(number: int, new_tokens: int) -> ResolvedSampling:
    kind = KINDS[number % len(KINDS)] | {"logprobs": True, "top_logprobs": 2}
    return params(seed=number, end_token_ids=(END,), max_new_tokens=new_tokens, **kind)


def bits(sample: Sample) -> Any:
    return sample.tokens, [(entry.logprob, entry.top) for entry in sample.logprobs], sample.finish


@pytest.mark.parametrize(("requests", "runs"), [(4, 3), pytest.param(8, 60, marks=pytest.mark.slow)])
def test_a_request_has_the_same_bits_in_any_surroundings(requests: int, runs: int) -> None:
    """Alone; and with random others, chunk sizes, pages too few for all, cached prefixes, and drafts."""
    engine, small = (InProcess(FOLDER, torch.bfloat16, fixed_order=True, pages=n, page_size=4) for n in (1600, 90))
    tested = range(requests)
    alone = [engine.serve([ASKED[number]], [sampling(number, 24)])[0] for number in tested]
    retractions = accepted = cached = 0
    for surroundings in range(runs):
        rng = Random(surroundings)
        order = [*tested, *rng.choices(range(requests, len(ASKED)), k=requests), *tested[:2]]
        rng.shuffle(order)
        asked = [sampling(number, 24 if number in tested else rng.randint(1, 40)) for number in order]
        drafter = NgramDrafter(rng.randint(1, 6)) if surroundings % 2 else None
        chosen = small if surroundings % 3 == 2 else engine
        samples = chosen.serve(
            [ASKED[number] for number in order], asked, drafter, chunked_prefill_size=rng.choice([7, 32, 64, 500]),
            max_running_requests=rng.choice([2, 5, 16]), conservativeness=0.1, base_tokens=2000.0, timed=False,
        )  # fmt: skip
        stats = chosen.core.stats()
        retractions += int(stats["num_retractions"])
        accepted += int(stats["accepted_tokens_total"])
        cached += int(stats["cached_tokens_total"])
        for number, sample in zip(order, samples, strict=True):
            if number in tested:
                assert bits(sample) == bits(alone[number])
    assert min(retractions, accepted, cached) > 0
