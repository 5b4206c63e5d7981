"""Embeddings and scores on one rank: transformers' hidden states and logits, beside rows that generate."""

from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tests.model_worker.fake_device import Clock, FakeDevice, FakeGraphs
from tests.model_worker.test_launch_collect import runner_on
from tests.model_worker.test_model_runner import Driver, expected_tokens, new_slot, runner_of, sampling
from tests.qwen3.harness import (
    DENSE,
    MOE,
    compute_of,
    load_model,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, StepResult, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling

WIDTH = DENSE["hidden_size"]
YES, NO = 17, 40


def pooled_slot(slot: int, ids: list[int], pooling: Pooling) -> NewSlot:
    return new_slot(slot, ids, msgspec.structs.replace(sampling(), pooling=pooling))


def values(result: StepResult) -> dict[int, Tensor]:
    return {row.row: torch.tensor(array("f", row.values)) for row in result.pooled}


def embedding(reference: Any, tokens: list[int], dimensions: int = WIDTH) -> Tensor:
    """The model card's: the last token's hidden state behind the final norm, cut, of length 1."""
    with torch.inference_mode():
        last: Tensor = reference.model(torch.tensor([tokens])).last_hidden_state[0, -1, :dimensions]
    return torch.nn.functional.normalize(last, dim=0)


def score(reference: Any, tokens: list[int]) -> Tensor:
    """The model card's: the probabilities of two tokens against each other."""
    return reference_logits(reference, tokens)[-1, [YES, NO]].log_softmax(0).exp()


@pytest.mark.parametrize("compute_name", ["torch", "kernels"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_they_are_transformers_beside_generation(tmp_path: Path, shape: dict[str, Any], compute_name: str) -> None:
    """Slots 0 and 1 generate, 2 to 5 are embedded, 6 and 7 scored; prompts in chunks, one of them with one token."""
    compute = compute_of(compute_name)
    reference = make_checkpoint(tmp_path, shape)
    driver = Driver(runner_of(load_model(tmp_path, compute=compute), compute=compute))
    prompts = {slot: random_tokens(length, seed=slot) for slot, length in enumerate((9, 5, 1, 7, 8, 20, 12, 13))}
    poolings = {2: Pooling(WIDTH), 3: Pooling(WIDTH), 4: Pooling(10), 5: Pooling(1)}
    poolings |= dict.fromkeys((6, 7), Pooling(WIDTH, (YES, NO)))
    new = [pooled_slot(s, prompts[s], poolings[s]) if s in poolings else new_slot(s, prompts[s]) for s in prompts]
    known, computed = {slot: len(ids) for slot, ids in prompts.items()}, dict.fromkeys(prompts, 0)
    got: dict[int, Tensor] = {}
    for now in range(5):
        rows = [(slot, min(7, known[slot] - computed[slot])) for slot in prompts if known[slot] > computed[slot]]
        result = driver.run(rows, new=new if now == 0 else [])
        for slot, count in rows:
            computed[slot] += count
            known[slot] += computed[slot] == known[slot] and slot not in poolings
        got |= {rows[row][0]: vector for row, vector in values(result).items()}
    assert sorted(got) == sorted(poolings)
    for slot, pooling in poolings.items():
        expected = score(reference, prompts[slot]) if pooling.labels else None
        if expected is None:
            expected = embedding(reference, prompts[slot], pooling.dimensions)
        torch.testing.assert_close(got[slot], expected, atol=2e-5, rtol=0)
    assert set(driver.tokens) == {0, 1}
    for slot, tokens in driver.tokens.items():
        assert tokens == expected_tokens(reference, prompts[slot], len(tokens))


def test_a_row_with_a_nan_gives_no_vector(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    model = load_model(tmp_path)
    model.embedding.weight.tensor[3] = float("nan")
    driver = Driver(runner_of(model))
    new = [pooled_slot(0, [1, 2, 3], Pooling(WIDTH)), pooled_slot(1, [1, 2, 4], Pooling(WIDTH))]
    result = driver.run([(0, 3), (1, 3)], new=new)
    assert [row.row for row in result.failed] == [0]
    assert list(values(result)) == [1]
    assert torch.isfinite(values(result)[1]).all()


@pytest.mark.parametrize("graphs", [None, FakeGraphs([2, 4])], ids=["plain", "graphs"])
def test_a_device_that_works_in_its_own_time(tmp_path: Path, graphs: FakeGraphs | None) -> None:
    """Two steps in flight, nothing read back before its time; a prompt of one token looks like a row that decodes."""
    reference = make_checkpoint(tmp_path, DENSE)
    runner = runner_on(load_model(tmp_path), FakeDevice(Clock()), graphs)
    if graphs is not None:
        runner.warm_up()
    prompts = {slot: random_tokens(length, seed=slot) for slot, length in enumerate((7, 9, 4, 1))}
    pooled = {1: Pooling(WIDTH), 2: Pooling(WIDTH, (YES, NO)), 3: Pooling(12)}
    new = [new_slot(0, prompts[0]), *(pooled_slot(slot, prompts[slot], pooled[slot]) for slot in pooled)]
    steps = [({0: 7, 1: 5, 2: 3}, new[:3]), ({0: 1, 1: 4, 2: 1}, []), ({0: 1, 3: 1}, new[3:]), ({0: 1}, [])]
    pending = [
        runner.launch(ForwardBatch(number, new=come, row_slots=pack_ids(rows), row_tokens=pack_ids(rows.values())))
        for number, (rows, come) in enumerate(steps)
    ]
    results = [runner.collect(step) for step in pending]
    assert [[row.row for row in result.pooled] for result in results] == [[], [1, 2], [1], []]
    expected = {(1, 1): embedding(reference, prompts[1]), (1, 2): score(reference, prompts[2])}
    expected[2, 1] = embedding(reference, prompts[3], 12)
    for (step, row), vector in expected.items():
        torch.testing.assert_close(values(results[step])[row], vector, atol=2e-5, rtol=0)
    drawn = [unpack_ids(result.token_ids)[0] for result in results]
    assert drawn == expected_tokens(reference, prompts[0], 4)
