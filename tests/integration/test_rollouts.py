"""Weights that change under a running engine, through the whole pipeline: what is generated, with which logprobs, by
which weights, is what transformers makes of the same checkpoint."""

from __future__ import annotations

import copy
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.integration.daemon import Daemon, running
from tests.qwen3.harness import DENSE, MOE, make_checkpoint
from vibe_sgl_lite import Client, EngineError, Output, RequestError, SamplingParams
from vibe_sgl_lite.runtime.client.outputs import WeightSpan

SIZES: dict[str, Any] = {"vocab_size": 2560, "max_position_embeddings": 4096}
DRAWN = SamplingParams(max_new_tokens=24, temperature=1.0, top_logprobs=2, ignore_eos=True, seed=5)
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=3000, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8] * 6, [100, 3, 100, 3, 9], list(range(1, 60))]
BASE = ("--tokenizer-path", "embedded", "--context-length", "4096", "--max-total-tokens", "8192")


class Models:
    """Checkpoints of one shape, and transformers' models of them, in fp32."""

    def __init__(self, folder: Path, shape: dict[str, Any]) -> None:
        self.folder = folder
        self.reference = {
            name: make_checkpoint(folder / name, shape | SIZES, seed=seed) for seed, name in enumerate("abc")
        }

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def logprobs(self, name: str, out: Output, prompt: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Of each generated token, as transformers has it."""
        model = self.reference[name] if dtype == torch.float32 else copy.deepcopy(self.reference[name]).to(dtype)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + out.token_ids])).logits[0].float()
        rows: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return rows[torch.arange(len(out.token_ids)), torch.tensor(out.token_ids)]


def sampled(out: Output) -> torch.Tensor:
    assert out.logprobs is not None
    return torch.tensor([entry.logprob for entry in out.logprobs])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("dense"), DENSE)


@pytest.fixture(scope="module")
def daemon(models: Models) -> Iterator[Daemon]:
    with running("--model-path", models.path("a"), "--dtype", "float32", *BASE) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon, models: Models) -> Iterator[Client]:
    """Every test begins with the same weights."""
    with daemon.client() as client:
        client.update_weights_from_disk(models.path("a"), "a")
        yield client
        client.wake_up()
        client.continue_generation()


def generate(client: Client, params: SamplingParams = DRAWN) -> list[Output]:
    return client.generate(input_ids=PROMPTS, sampling_params=params)


def check_exact(models: Models, name: str, outputs: list[Output]) -> None:
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        assert len(out.token_ids) == 24
        assert out.weight_versions == [WeightSpan(name, 0, 24)]
        torch.testing.assert_close(sampled(out), models.logprobs(name, out, prompt), atol=1e-3, rtol=0)


def test_logprobs_are_those_of_the_weights_in_force(client: Client, models: Models) -> None:
    check_exact(models, "a", generate(client))
    tokens = set()
    for name in ("b", "c", "a"):
        assert client.update_weights_from_disk(models.path(name), name) == name == client.weight_version()
        outputs = generate(client)
        check_exact(models, name, outputs)
        check_exact(models, name, generate(client))  # out of the cache
        tokens.add(tuple(outputs[0].token_ids))
    assert len(tokens) == 3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [DENSE, DENSE | {"tie_word_embeddings": True}, MOE], ids=["dense", "tied", "moe"])
def test_bf16_is_no_farther_from_fp32_than_transformers(tmp_path: Path, shape: dict[str, Any]) -> None:
    models = Models(tmp_path, shape)
    ours, theirs = [], []
    with running("--model-path", models.path("a"), "--dtype", "bfloat16", *BASE) as daemon, daemon.client() as client:
        for name in ("b", "a", "c"):
            client.update_weights_from_disk(models.path(name), name)
            for prompt, out in zip(PROMPTS, generate(client), strict=True):
                exact = models.logprobs(name, out, prompt)
                ours.append((sampled(out) - exact).abs())
                theirs.append((models.logprobs(name, out, prompt, torch.bfloat16) - exact).abs())
    # Where a near tie sends a token to another expert, it is far off, and so few tokens say nothing of the mean: see
    # tests/model_worker/test_distance.py.
    typical = torch.Tensor.median if "num_experts" in shape else torch.Tensor.mean
    assert typical(torch.cat(ours)) <= 1.1 * typical(torch.cat(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (("--tp", "2"), DENSE),
        (("--tp", "2", "--ep", "2"), MOE),
        (("--tp", "2", "--moe-dispatch", "all-to-all"), MOE | {"tie_word_embeddings": True}),
    ],
    ids=["tp", "ep", "all-to-all"],
)
def test_every_rank_takes_its_part(tmp_path: Path, flags: tuple[str, ...], shape: dict[str, Any]) -> None:
    models = Models(tmp_path, shape)
    start = ("--model-path", models.path("a"), "--dtype", "float32", "--debug-rank-digest", *flags, *BASE)
    with running(*start) as daemon, daemon.client() as client:
        for name in ("b", "a"):
            client.update_weights_from_disk(models.path(name), name)
            check_exact(models, name, generate(client))
        client.sleep(2)
        client.update_weights_from_disk(models.path("c"), "c")
        client.wake_up()
        check_exact(models, "c", generate(client))


def test_kept_streams_go_on_with_the_new_weights(client: Client, models: Models) -> None:
    with client.stream(input_ids=PROMPTS[0], sampling_params=ENDLESS) as stream:
        ids: list[int] = []
        for chunk in stream:
            ids += chunk.token_ids
            if len(ids) > 20:
                break
        client.pause_generation("keep")
        waiting: list[Output] = []
        thread = threading.Thread(
            target=lambda: waiting.append(client.generate(input_ids=PROMPTS[0], sampling_params=GREEDY))
        )
        thread.start()
        client.update_weights_from_disk(models.path("b"), "b")
        assert not waiting
        assert client.stats()["num_running"] == 1
        client.continue_generation()
        changes: list[tuple[int, str]] = []
        for chunk in stream:
            ids += chunk.token_ids
            changes += chunk.weight_versions
            if changes and len(ids) > changes[0][0] + 20:
                break
    thread.join(30)
    (first, version) = changes[0]
    assert (version, len(changes)) == ("b", 1)
    assert ids[:first] == reference_greedy(models, "a", PROMPTS[0], first)
    assert waiting[0].token_ids == reference_greedy(models, "b", PROMPTS[0], 24)  # shares nothing with the stream
    assert waiting[0].weight_versions == [WeightSpan("b", 0, 24)]


def reference_greedy(models: Models, name: str, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = models.reference[name].generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token) for token in out[0, len(prompt) :]]


def test_aborted_requests_give_back_what_they_have(client: Client) -> None:
    outputs: list[Output] = []
    thread = threading.Thread(
        target=lambda: outputs.append(client.generate(input_ids=PROMPTS[0], sampling_params=ENDLESS))
    )
    thread.start()
    wait_until(lambda: int(client.stats()["num_running"]) == 1)
    client.pause_generation()
    thread.join(30)
    assert outputs[0].finish_reason == "abort"
    assert 0 <= len(outputs[0].token_ids) < 3000
    assert client.stats()["paused"]
    client.continue_generation()
    assert len(generate(client, GREEDY)) == 3


def wait_until(true: Any, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_does_not_fit_is_refused_and_nothing_changes(client: Client, models: Models, tmp_path: Path) -> None:
    before = [out.token_ids for out in generate(client)]
    make_checkpoint(tmp_path / "deeper", DENSE | SIZES | {"num_hidden_layers": 3})
    with pytest.raises(RequestError, match="num_hidden_layers=3 where the model that is served has 2"):
        client.update_weights_from_disk(tmp_path / "deeper")
    shutil.copytree(models.path("b"), tmp_path / "nan")
    broken = make_checkpoint(tmp_path / "nan", DENSE | SIZES, seed=9)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")  # the last one: all others are installed by then
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(RequestError, match=r"model\.norm\.weight has NaN or inf"):
        client.update_weights_from_disk(tmp_path / "nan", "nan")
    assert client.weight_version() == "a"
    assert [out.token_ids for out in generate(client)] == before
    assert not client.stats()["paused"]


def test_two_updates_at_once_come_one_after_the_other(client: Client, daemon: Daemon, models: Models) -> None:
    done: list[str] = []

    def update(name: str) -> None:
        with daemon.client() as other:
            done.append(other.update_weights_from_disk(models.path(name), name))

    threads = [threading.Thread(target=update, args=(name,)) for name in ("b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == ["b", "c"]
    check_exact(models, str(client.weight_version()), generate(client))


def rank(daemon: Daemon) -> psutil.Process:
    return daemon.children()["model_worker.0"]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_and_wake_brings_it_back(client: Client, daemon: Daemon, models: Models, level: int) -> None:
    before = [out.token_ids for out in generate(client)]
    client.generate(input_ids=[[n] * 900 for n in range(8)], sampling_params=GREEDY)  # the pool is in use
    full = rank(daemon).memory_info().rss
    client.sleep(level)
    pool = 8192 * 2 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, their width, bytes
    assert full - rank(daemon).memory_info().rss > pool / 2
    assert client.health()["status"] == "sleeping"
    outputs: list[list[Output]] = []
    thread = threading.Thread(target=lambda: outputs.append(generate(client)))
    thread.start()
    wait_until(lambda: int(client.stats()["num_waiting"]) == 3)
    client.wake_up()
    thread.join(30)
    assert [out.token_ids for out in outputs[0]] == before
    assert client.health()["status"] == "ok"


def test_a_sleeping_engine_takes_new_weights(client: Client, models: Models) -> None:
    for level, name in ((2, "b"), (1, "c")):
        client.sleep(level)
        client.update_weights_from_disk(models.path(name), name)
        client.wake_up()
        check_exact(models, name, generate(client))


def test_ranks_that_start_again_have_the_weights_in_force(client: Client, daemon: Daemon, models: Models) -> None:
    client.update_weights_from_disk(models.path("b"), "b")
    with client.stream(input_ids=PROMPTS[0], sampling_params=GREEDY) as stream:
        ids = list(next(stream).token_ids)
        rank(daemon).send_signal(signal.SIGKILL)
        for chunk in stream:
            ids += chunk.token_ids
    assert ids == reference_greedy(models, "b", PROMPTS[0], 24)
    assert client.weight_version() == "b"
    check_exact(models, "b", generate(client))


@pytest.mark.slow
def test_an_update_of_an_engine_that_ends_is_told(models: Models) -> None:
    with running("--model-path", models.path("a"), "--dtype", "float32", *BASE) as daemon, daemon.client() as client:
        client.generate(input_ids=[1], sampling_params=GREEDY)
        error: list[BaseException] = []

        def update() -> None:
            try:
                client.update_weights_from_disk(models.path("b"))
            except EngineError as caught:
                error.append(caught)

        with client.stream(input_ids=PROMPTS[0], sampling_params=ENDLESS) as stream:
            next(stream)
            thread = threading.Thread(target=update)  # waits for the stream
            thread.start()
            daemon.process.terminate()
            thread.join(60)
        assert not thread.is_alive()
        assert error
