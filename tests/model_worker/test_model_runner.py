"""One rank's runner, driven by batches as the scheduler sends them: transformers' tokens, whatever the batching."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tests.qwen3.harness import DENSE, MOE, compute_of, load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite.model_worker.compute import Compute, torch_compute
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.sampling import prompt_logprobs
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, PartTimer
from vibe_sgl_lite.qwen3.layers.weight import MatrixWeight
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.messages import FailedRow, ForwardBatch, NewSlot, StepResult, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, resolve

PAGE = 8
PAGES_A_SLOT = 12
CONTEXT = PAGE * PAGES_A_SLOT


def runner_of(
    model: Qwen3, max_slots: int = 20, compute: Compute | None = None, timer: PartTimer = NO_TIMER
) -> ModelRunner:
    pool = KVPool(model.config, model.parallel.tp.size, max_slots * PAGES_A_SLOT, PAGE, model.dtype, model.device)
    return ModelRunner(
        model,
        pool,
        compute or torch_compute(),
        max_slots=max_slots,
        context_length=CONTEXT,
        max_tokens=max_slots * CONTEXT,
        timer=timer,
    )


def sampling(**values: Any) -> ResolvedSampling:
    resolved = resolve(
        SamplingParams(**({"temperature": 0.0, "seed": 0, "max_new_tokens": 1} | values)),
        model_defaults={},
        end_token_ids=(),
        prompt_tokens=1,
        context_length=CONTEXT,
        vocab_size=256,
    )
    return resolved


def new_slot(slot: int, ids: list[int], params: ResolvedSampling | None = None, prompt: int | None = None) -> NewSlot:
    """Slot s owns pages s * PAGES_A_SLOT and on, in falling order."""
    pages = [slot * PAGES_A_SLOT + i for i in reversed(range(PAGES_A_SLOT))]
    return NewSlot(slot, slot, pack_ids(ids), prompt or len(ids), 0, pack_ids(pages), params or sampling())


class Driver:
    """Sends batches and keeps what comes back by slot."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.step = 0
        self.tokens: dict[int, list[int]] = {}

    def run(self, rows: list[tuple[int, int]], *, new: list[NewSlot] = [], released: list[int] = []) -> StepResult:  # noqa: B006
        result = self.runner.run(
            ForwardBatch(
                self.step,
                released=pack_ids(released),
                new=new,
                row_slots=pack_ids(slot for slot, _ in rows),
                row_tokens=pack_ids(count for _, count in rows),
            )
        )
        assert result.step == self.step
        self.step += 1
        for (slot, _), token in zip(rows, unpack_ids(result.token_ids), strict=True):
            if token >= 0:
                self.tokens.setdefault(slot, []).append(token)
        return result


def expected_tokens(reference: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(reference, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("compute_name", ["torch", "kernels"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_sixteen_requests_mixed_give_transformers_tokens(
    tmp_path: Path, shape: dict[str, Any], compute_name: str
) -> None:
    compute = compute_of(compute_name)
    reference = make_checkpoint(tmp_path, shape)
    driver = Driver(runner_of(load_model(tmp_path, compute=compute), compute=compute))
    prompts = {slot: random_tokens(3 + 4 * slot, seed=slot) for slot in range(16)}
    computed = dict.fromkeys(prompts, 0)
    count = 10
    for now in range(200):
        arriving = [slot for slot in prompts if slot == now]  # one a step: prefill chunks run beside decodes
        present = [slot for slot in prompts if slot <= now and len(driver.tokens.get(slot, [])) < count]
        if not present:
            break
        rows = []
        for slot in present:
            known = len(prompts[slot]) + len(driver.tokens.get(slot, []))
            rows.append((slot, min(7, known - computed[slot])))
            computed[slot] += rows[-1][1]
        driver.run(rows, new=[new_slot(slot, prompts[slot]) for slot in arriving])
    for slot, prompt in prompts.items():
        assert driver.tokens[slot] == expected_tokens(reference, prompt, count)


def test_a_resumed_slot_goes_on_where_it_was(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    prompt = random_tokens(11)
    expected = expected_tokens(reference, prompt, 8)
    driver = Driver(runner_of(load_model(tmp_path)))
    driver.run([(0, 11)], new=[new_slot(0, prompt)])
    for _ in range(3):
        driver.run([(0, 1)])
    resumed = prompt + expected[:4]
    driver.run([(3, 15)], new=[new_slot(3, resumed, prompt=11)], released=[0])
    for _ in range(3):
        driver.run([(3, 1)])
    assert driver.tokens == {0: expected[:4], 3: expected[4:]}


def test_seeded_sampling_depends_on_nothing_else_in_the_batch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    model = load_model(tmp_path)
    prompt, params = random_tokens(9), sampling(temperature=1.5, seed=77, top_k=50)
    alone = Driver(runner_of(model))
    alone.run([(0, 9)], new=[new_slot(0, prompt, params)])
    for _ in range(6):
        alone.run([(0, 1)])
    crowd = Driver(runner_of(model))
    others = [new_slot(slot, random_tokens(5, seed=slot), sampling(temperature=1.0, seed=slot)) for slot in range(5)]
    crowd.run([(slot, 5) for slot in range(5)] + [(9, 4)], new=[*others, new_slot(9, prompt, params)])
    crowd.run([(9, 5)])
    for _ in range(6):
        crowd.run([(slot, 1) for slot in (4, 9, 0)])
    assert crowd.tokens[9] == alone.tokens[0]
    assert len(set(alone.tokens[0])) > 1


def test_only_the_row_with_a_nan_fails(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    model = load_model(tmp_path)
    bad, good = [5, 6, 200, 8], [t for t in random_tokens(12) if t != 200]
    model.embedding.weight.tensor[200] = float("nan")
    driver = Driver(runner_of(model))
    result = driver.run([(0, 4), (1, len(good))], new=[new_slot(0, bad), new_slot(1, good)])
    assert result.failed == [FailedRow(0, "numerical_error")]
    assert unpack_ids(result.token_ids)[0] == -1
    driver.run([(1, 1)], released=[0])
    assert driver.tokens[1] == expected_tokens(reference, good, 2)


def test_a_chunk_with_a_nan_fails_before_its_end(tmp_path: Path) -> None:
    """The rows' last tokens are not enough: a chunk in the middle of a prompt must not reach the prefix cache."""
    make_checkpoint(tmp_path, DENSE)
    model = load_model(tmp_path)
    model.embedding.weight.tensor[200] = float("inf")
    driver = Driver(runner_of(model))
    result = driver.run([(0, 2), (1, 3)], new=[new_slot(0, [1, 2, 3, 4]), new_slot(1, [1, 200, 3, 4])])
    assert [failed.row for failed in result.failed] == [1]
    assert unpack_ids(result.token_ids) == [-1, -1]


def test_logprobs_are_those_of_the_model(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    prompt = random_tokens(9)
    driver = Driver(runner_of(load_model(tmp_path)))
    asked = msgspec.structs.replace(sampling(), logprobs=True, top_logprobs=3)
    result = driver.run([(1, 5), (0, 9)], new=[new_slot(0, prompt, asked), new_slot(1, random_tokens(5))])
    expected = reference_logits(reference, prompt)[-1].log_softmax(-1)
    (entry,) = result.logprobs
    assert entry.row == 1
    (token,) = entry.sampled
    assert token.token_id == int(expected.argmax())
    assert math.isclose(token.logprob, float(expected.max()), abs_tol=1e-4)
    assert [alternative for alternative, _ in token.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("head_rows", [128, 3])
def test_prompt_logprobs_cover_the_prompt_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_rows: int
) -> None:
    """Beside a row that asks for none; resumed with generated tokens, which are not the prompt's."""
    monkeypatch.setattr(prompt_logprobs, "HEAD_ROWS", head_rows)
    reference = make_checkpoint(tmp_path, DENSE)
    tokens = random_tokens(15)
    asked = msgspec.structs.replace(sampling(), prompt_logprobs=True, top_logprobs=2)
    driver = Driver(runner_of(load_model(tmp_path)))
    chunks = [(0, 4), (0, 1), (0, 8), (0, 2)]  # the prompt's 12 tokens end within the third
    news = [new_slot(0, tokens, asked, prompt=12), new_slot(1, random_tokens(9))]
    results = [driver.run([(1, 3), chunks[0]], new=news), *(driver.run([(1, 1), chunk]) for chunk in chunks[1:])]
    entries = [entry for result in results for entry in result.logprobs]
    assert [entry.row for entry in entries] == [1, 1, 1]
    assert [entry.prompt_first for entry in entries] == [1, 5, 6]
    scores = [score for entry in entries for score in entry.prompt]
    assert [score.token_id for score in scores] == tokens[1:12]
    expected = reference_logits(reference, tokens).log_softmax(-1)
    for position, score in enumerate(scores):
        assert math.isclose(score.logprob, float(expected[position, score.token_id]), abs_tol=1e-4)
        assert [token for token, _ in score.top] == expected[position].topk(2).indices.tolist()


def test_prompt_and_sampled_logprobs_come_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    asked = msgspec.structs.replace(sampling(), prompt_logprobs=True, logprobs=True)
    driver = Driver(runner_of(load_model(tmp_path)))
    (entry,) = driver.run([(0, 5)], new=[new_slot(0, random_tokens(5), asked)]).logprobs
    assert entry.sampled is not None
    assert len(entry.prompt) == 4
    (entry,) = driver.run([(0, 1)]).logprobs
    assert entry.prompt == ()
    single = driver.run([(1, 1)], new=[new_slot(1, [3], asked)])
    assert single.logprobs[0].prompt == ()


def test_a_warm_up_leaves_nothing_behind(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, DENSE)
    runner = runner_of(load_model(tmp_path))
    runner.pool.data.zero_()
    runner.warm_up()
    assert runner.pool.data[runner.pool.padding_page].any()
    assert not runner.pool.data[: runner.pool.padding_page].any()
    driver = Driver(runner)
    prompt = random_tokens(9)
    driver.run([(0, 9)], new=[new_slot(0, prompt)])
    driver.run([(0, 1)])
    assert driver.tokens[0] == expected_tokens(reference, prompt, 2)


def test_an_empty_step_only_applies_changes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    driver = Driver(runner_of(load_model(tmp_path)))
    driver.run([(0, 3)], new=[new_slot(0, [1, 2, 3])])
    assert driver.run([], released=[0]).token_ids == b""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compute_name", ["torch", "kernels"])
def test_bad_logits_fail_their_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_name: str, value: float
) -> None:
    """Whatever the row samples with; the hidden states are fine."""
    reference = make_checkpoint(tmp_path, DENSE)
    compute = compute_of(compute_name)
    runner = runner_of(load_model(tmp_path, compute=compute), compute=compute)
    logits = runner.model.logits

    def spoilt(hidden: Tensor) -> Tensor:
        made = logits(hidden)
        made[::2, 77] = value
        return made

    monkeypatch.setattr(runner.model, "logits", spoilt)
    good = random_tokens(12)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0}, {"logprobs": True}]
    new = [
        new_slot(slot, good, sampling() if slot % 2 else sampling(**kinds[slot // 2])) for slot in range(2 * len(kinds))
    ]
    driver = Driver(runner)
    result = driver.run([(slot, len(good)) for slot in range(len(new))], new=new)
    assert result.failed == [FailedRow(row, "numerical_error") for row in range(0, len(new), 2)]
    assert unpack_ids(result.token_ids) == [-1, *expected_tokens(reference, good, 1)] * len(kinds)
    assert result.logprobs == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compute_name", ["torch", "kernels"])
def test_a_damaged_head_is_an_error(tmp_path: Path, compute_name: str, value: float) -> None:
    make_checkpoint(tmp_path, DENSE)
    compute = compute_of(compute_name)
    model = load_model(tmp_path, compute=compute)
    spoilt = torch.randn(256, 64)
    spoilt[5] = value
    model.head.weight = MatrixWeight(256, 64, torch.float32, model.device)
    model.head.weight.install(spoilt)
    result = Driver(runner_of(model, compute=compute)).run([(0, 4)], new=[new_slot(0, [1, 2, 3, 4])])
    assert result.failed == [FailedRow(0, "numerical_error")]
