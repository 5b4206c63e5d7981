"""A runner on the GPU backend, its kernels interpreted where there is no GPU: transformers' tokens, the CPU's draws."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_worker.fake_device import Clock, FakeDevice, FakeGraphs
from tests.model_worker.test_model_runner import Driver, expected_tokens, new_slot, sampling
from tests.qwen3.harness import DENSE, make_checkpoint, random_tokens
from vibe_sgl_lite.model_worker.compute import Compute, GpuSetup, gpu_compute, torch_compute
from vibe_sgl_lite.model_worker.gpu import draft_model
from vibe_sgl_lite.model_worker.gpu.draft_model import DraftsByModel
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.messages import ForwardBatch, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

PAGE, PAGES_A_SLOT, SLOTS = 8, 12, 6  # as the driver's slots have them
GROUP = DENSE["num_attention_heads"] // DENSE["num_key_value_heads"]


def runner_of(
    folder: Path,
    device: torch.device,
    compute: Compute,
    *,
    int8: bool = False,
    fake: FakeGraphs | None = None,
    drafts: int = 0,
    max_tokens: int = 17,
    fixed_order: bool = False,
) -> ModelRunner:
    """fake: graphs, on a device that works behind the host's back, where there is no such device."""
    config = ModelConfig.from_folder(folder)
    model = Qwen3(config, ParallelState(), torch.float32, device, compute.operations)
    choose_formats(model, "none", None, fixed_order=fixed_order)
    load_weights(model, folder)
    pool = KVPool(config, 1, SLOTS * PAGES_A_SLOT, PAGE, torch.float32, device, int8=int8, layout=compute.kv_layout)
    pool.data.fill_(-1 if int8 else float("nan"))  # whatever is read without having been written shows: -1 is NaN too
    if fake is not None:
        compute = replace(compute, device=FakeDevice(Clock()), graphs=fake)
    length = PAGE * PAGES_A_SLOT
    runner = ModelRunner(
        model, pool, compute, max_slots=SLOTS, context_length=length, max_tokens=max_tokens, device_drafts=drafts
    )
    compute.plan_layers(model, runner.backend)
    return runner


def drafting(folder: Path, device: torch.device, compute: Compute) -> Compute:
    """The same, with drafts by the model in `folder`."""
    config = ModelConfig.from_folder(folder)
    model = Qwen3(config, ParallelState(), torch.float32, device, compute.operations)
    choose_formats(model, "none", None)
    load_weights(model, folder)
    pool = KVPool(config, 1, SLOTS * PAGES_A_SLOT, PAGE, torch.float32, device, layout=compute.kv_layout)
    pool.data.fill_(float("nan"))
    draft_device = compute.device if device.type == "cuda" else FakeDevice(Clock())
    return replace(compute, draft_kernels=DraftsByModel(model, pool, gpu(device, 3), draft_device))


def gpu(device: torch.device, drafts: int = 0, *, fixed_order: bool = False) -> Compute:
    """With graphs where there is a GPU to capture them on."""
    rows, tokens = (4, 60) if device.type == "cuda" else (0, 0)
    return gpu_compute(
        device, GpuSetup(GROUP, DENSE["vocab_size"], SLOTS, rows, tokens, drafts=drafts, fixed_order=fixed_order)
    )


def run(driver: Driver, prompts: list[list[int]], count: int, params: list[Any]) -> dict[int, list[int]]:
    """Prompts arrive one a step, run in chunks of 7 beside what decodes; until each has `count` tokens."""
    computed = [0] * len(prompts)
    for now in range(100):
        present = [s for s in range(min(now + 1, len(prompts))) if len(driver.tokens.get(s, [])) < count]
        if not present:
            break
        rows = []
        for slot in present:
            known = len(prompts[slot]) + len(driver.tokens.get(slot, []))
            rows.append((slot, min(7, known - computed[slot])))
            computed[slot] += rows[-1][1]
        rows.sort(key=lambda row: row[1] != 1)  # those that decode first, as the scheduler sends them
        new = [new_slot(now, prompts[now], params[now])] if now < len(prompts) else []
        driver.run(rows, new=new)
    return driver.tokens


def test_chunks_beside_decodes_give_transformers_tokens(tmp_path: Path, device: torch.device) -> None:
    """Steps with chunks filled up and replayed, the first prompt alone."""
    reference = make_checkpoint(tmp_path, DENSE)
    prompts = [random_tokens(n, seed=n) for n in (3, 17, 9)]
    fake = FakeGraphs(())
    fake.chunk_buckets = ((9, 4), (17, SLOTS))
    runner = runner_of(tmp_path, device, gpu(device), fake=None if device.type == "cuda" else fake)
    runner.warm_up()
    tokens = run(Driver(runner), prompts, 3, [sampling()] * 3)
    for slot, prompt in enumerate(prompts):
        assert tokens[slot] == expected_tokens(reference, prompt, 3)
    if device.type == "cpu":
        replayed = [key[0] for key in fake.replayed if isinstance(key, tuple)]
        assert (replayed.count(9), replayed.count(17)) == (3, 1)  # 3 tokens alone are few; see `run`


def test_more_rows_than_the_chain_takes_give_the_tokens_of_plain_torch(tmp_path: Path, device: torch.device) -> None:
    """Five kernels a layer; rows of different lengths, on one page and on two."""
    make_checkpoint(tmp_path, DENSE)
    lengths, params = (1, 2, 3, 2, 8), sampling()
    tokens = []
    for computes in (gpu(device), torch_compute()):
        runner = runner_of(tmp_path, device if computes.graphs else torch.device("cpu"), computes)
        driver = Driver(runner)
        new = [new_slot(slot, random_tokens(n, seed=slot), params) for slot, n in enumerate(lengths)]
        driver.run([(slot, n) for slot, n in enumerate(lengths)], new=new)
        for _ in range(2):
            driver.run([(slot, 1) for slot in range(len(lengths))])
        tokens.append(driver.tokens)
    assert tokens[0] == tokens[1]


def test_int8_gives_the_tokens_of_plain_torch(tmp_path: Path, device: torch.device) -> None:
    """Over the same cache: steps with chunks as they are, decode rows as a chain."""
    make_checkpoint(tmp_path, DENSE)
    prompts = [random_tokens(n, seed=n) for n in (3, 20)]
    tokens = run(Driver(runner_of(tmp_path, device, gpu(device), int8=True)), prompts, 4, [sampling()] * 2)
    plain = runner_of(tmp_path, torch.device("cpu"), torch_compute(), int8=True)
    assert tokens == run(Driver(plain), prompts, 4, [sampling()] * 2)


def test_seeds_give_the_tokens_of_plain_torch(tmp_path: Path, device: torch.device) -> None:
    """Rows of the fused draw, with filters and without, and steps of which one row wants logprobs, which takes all to
    the other one."""
    make_checkpoint(tmp_path, DENSE)
    prompts = [random_tokens(n, seed=n) for n in (3, 5)]
    for extra in ({}, {"top_k": 5, "top_p": 0.8}, {"top_k": 5, "logprobs": True}):
        params = [sampling(temperature=0.9, top_p=1.0, seed=2**63 + 5), sampling(temperature=1.3, seed=9, **extra)]
        got = run(Driver(runner_of(tmp_path, device, gpu(device))), prompts, 3, params)
        assert got == run(Driver(runner_of(tmp_path, torch.device("cpu"), torch_compute())), prompts, 3, params)


@pytest.mark.slow
def test_in_a_fixed_order_a_request_has_the_same_bits_alone_and_beside_others(
    tmp_path: Path, device: torch.device
) -> None:
    """Whole or in chunks, its tokens those of transformers; one slot stands for cache and companions of all lengths."""
    reference = make_checkpoint(tmp_path, DENSE | {"num_hidden_layers": 1})
    prompt, others = random_tokens(19, seed=4), [random_tokens(n, seed=n) for n in (23, 5)]
    params = sampling(logprobs=True, top_logprobs=2)
    seen = []
    for chunks, companions in (([19], 0), ([7, 1, 11], 2), ([18, 1], 1)):
        runner = runner_of(
            tmp_path, device, gpu(device, fixed_order=True), fake=None if device.type == "cuda" else FakeGraphs(()),
            max_tokens=60, fixed_order=True,
        )  # fmt: skip
        driver, bits = Driver(runner), []
        for number, count in enumerate([*chunks, 1, 1, 1]):
            beside = list(range(1, 1 + companions)) if number else []
            new = [new_slot(0, prompt, params)] if number == 0 else []
            new += [new_slot(slot, others[slot - 1], params) for slot in beside if number == 1]
            rows = [(slot, len(others[slot - 1]) if number == 1 else 1) for slot in beside]
            rows = sorted([*rows, (0, count)], key=lambda row: row[1] != 1)
            result = driver.run(rows, new=new)
            at = [slot for slot, _ in rows].index(0)
            bits += [entry.sampled for entry in result.logprobs if entry.row == at]
        assert driver.tokens[0] == expected_tokens(reference, prompt, 4)
        seen.append(bits)
    assert len(seen[0]) == 4
    assert seen[0] == seen[1] == seen[2]


PLAIN: list[Any] = [sampling(), sampling(temperature=1.0, seed=3), sampling()]
PENALISED: list[Any] = [
    sampling(repetition_penalty=1.1, logprobs=True),
    sampling(temperature=0.5, seed=3, top_k=5, frequency_penalty=0.1),
    sampling(),
]


@pytest.mark.slow
@pytest.mark.parametrize(("params", "in_flight"), [(PLAIN, 3), (PENALISED, 2)], ids=["fused draw", "sampler"])
def test_drafts_that_the_device_makes_change_no_token(
    tmp_path: Path, device: torch.device, params: list[Any], in_flight: int
) -> None:
    """Steps in flight, rows of other lengths and rooms, one that ends, a prompt beside, and steps without drafts."""
    make_checkpoint(tmp_path, DENSE | {"num_hidden_layers": 1})
    again = random_tokens(5, seed=1)
    prompts = [again * 3, again + random_tokens(4, seed=2) + again, random_tokens(7, seed=3), again * 2]
    asked = [*params, sampling()]
    plain = Driver(runner_of(tmp_path, torch.device("cpu"), torch_compute(), max_tokens=60))
    plain.run([(s, len(p)) for s, p in enumerate(prompts)], new=[new_slot(s, prompts[s], asked[s]) for s in range(4)])
    for _ in range(40):
        plain.run([(slot, 1) for slot in range(4)])

    fake = FakeGraphs((4,) if params is PLAIN else ())
    runner = runner_of(
        tmp_path, device, gpu(device, 3), fake=None if device.type == "cuda" else fake, drafts=3, max_tokens=60
    )
    runner.warm_up()
    batches = [
        ForwardBatch(
            0, new=[new_slot(s, prompts[s], asked[s]) for s in range(3)], row_slots=pack_ids(range(3)),
            row_tokens=pack_ids(map(len, prompts[:3])),
        ),
        ForwardBatch(1, row_slots=pack_ids([0, 2, 1]), row_tokens=pack_ids([1, 1, 1])),
        ForwardBatch(2, row_slots=pack_ids([0, 2, 1]), row_tokens=pack_ids([4, 1, 2])),
        *(ForwardBatch(number) for number in range(3, 6)),
        ForwardBatch(
            6, new=[new_slot(3, prompts[3], asked[3])], row_slots=pack_ids([0, 1, 3]), row_tokens=pack_ids([3, 2, 10])
        ),
        ForwardBatch(7, row_slots=pack_ids([0, 1, 3]), row_tokens=pack_ids([3, 4, 2])),
        ForwardBatch(8, released=pack_ids([1]), row_slots=pack_ids([0, 3]), row_tokens=pack_ids([3, 3])),
        ForwardBatch(9),
        ForwardBatch(10, row_slots=pack_ids([0, 3]), row_tokens=pack_ids([1, 1])),
        ForwardBatch(11, row_slots=pack_ids([3, 0]), row_tokens=pack_ids([2, 4])),
        ForwardBatch(12),
    ]  # fmt: skip
    got: dict[int, list[int]] = {slot: [] for slot in range(4)}
    pending: list[tuple[bytes, Any]] = []
    rows, drafted, accepted, entries = b"", 0, 0, 0
    for batch in batches:
        rows = rows if batch.row_slots is None else batch.row_slots
        pending.append((rows, runner.launch(batch)))
        if params is PLAIN and batch.step == 10:  # has no room, and does not wait for what those before it yield
            assert pending[-2][1].results is None
        while len(pending) == in_flight or (batch is batches[-1] and pending):
            own, step = pending.pop(0)
            result = runner.collect(step)
            assert not result.failed
            ids = unpack_ids(result.token_ids)
            counts = unpack_ids(result.counts) if result.counts else [1] * (len(own) // 4)
            for slot, count in zip(unpack_ids(own), counts, strict=True):
                got[slot] += [ids.pop(0) for _ in range(count)]
            drafted += sum(unpack_ids(result.drafted))
            accepted += sum(counts) - len(counts)
            entries += sum(len(entry.sampled) for entry in result.logprobs)
    for slot in range(4):
        assert got[slot] == plain.tokens[slot][: len(got[slot])]
    assert drafted >= accepted > 0  # test_speculate_kernels.py has those that do not hold
    assert not params[0].logprobs or entries == len(got[0])
    if device.type == "cpu" and params is PLAIN:
        assert any(isinstance(key, tuple) and key[:2] == (16, 4) for key in fake.replayed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drafts_by_the_model_itself_all_hold(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy ones, also after steps without drafts, in a slot that was another's, and behind more than is run at once;
    and by another model the tokens are the same."""
    monkeypatch.setattr(draft_model, "CATCH_UP", 20)
    prompts = [random_tokens(length, seed=length) for length in (15, 9, 25)]
    for folder, seed in ((tmp_path / "own", 0), (tmp_path / "other", 1)):
        folder.mkdir()
        make_checkpoint(folder, DENSE | {"num_hidden_layers": 1}, seed=seed)
    plain = Driver(runner_of(tmp_path / "own", torch.device("cpu"), torch_compute(), max_tokens=60))
    plain.run([(s, len(p)) for s, p in enumerate(prompts)], new=[new_slot(s, prompts[s], sampling()) for s in range(3)])
    for _ in range(30):
        plain.run([(slot, 1) for slot in range(3)])
    for name, same in (("own", True), ("other", False)):
        fake = None if device.type == "cuda" else FakeGraphs((4,))
        compute = drafting(tmp_path / name, device, gpu(device, 3))
        runner = runner_of(tmp_path / "own", device, compute, fake=fake, drafts=3, max_tokens=60)
        if same:
            runner.warm_up()
        two, three = pack_ids([0, 1]), pack_ids([0, 1, 2])
        batches = [
            ForwardBatch(
                0, new=[new_slot(s, prompts[s], sampling()) for s in range(2)], row_slots=two,
                row_tokens=pack_ids([15, 9]),
            ),
            ForwardBatch(1, row_slots=two, row_tokens=pack_ids([4, 3])),
            *(ForwardBatch(number) for number in range(2, 4)),
            ForwardBatch(4, row_slots=two, row_tokens=pack_ids([1, 1])),
            ForwardBatch(5),
            ForwardBatch(8, row_slots=two, row_tokens=pack_ids([4, 1])),
            ForwardBatch(
                9, new=[new_slot(2, prompts[2], sampling())], row_slots=three, row_tokens=pack_ids([1, 1, 25])
            ),
            ForwardBatch(10, row_slots=three, row_tokens=pack_ids([2, 1, 4])),
            ForwardBatch(11, row_slots=three, row_tokens=pack_ids([4, 4, 4])),
            ForwardBatch(12),
        ]  # fmt: skip
        batches = batches if same else batches[:4]
        got: dict[int, list[int]] = {slot: [] for slot in range(3)}
        pending: list[tuple[list[int], Any]] = []
        rows, drafted, accepted = b"", 0, 0
        for batch in batches:
            rows = rows if batch.row_slots is None else batch.row_slots
            pending.append((unpack_ids(rows), runner.launch(batch)))
            while len(pending) == 3 or (batch is batches[-1] and pending):
                own, step = pending.pop(0)
                result = runner.collect(step)
                ids = unpack_ids(result.token_ids)
                counts = unpack_ids(result.counts) if result.counts else [1] * len(own)
                for slot, count in zip(own, counts, strict=True):
                    got[slot] += [ids.pop(0) for _ in range(count)]
                drafted += sum(unpack_ids(result.drafted))
                accepted += sum(counts) - len(counts)
        for slot in range(3):
            assert got[slot] == plain.tokens[slot][: len(got[slot])]
        assert drafted > 10
        assert (accepted == drafted) == same
