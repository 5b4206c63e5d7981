"""Requests for what a prompt gives without new tokens: what is told to the scheduler, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tokenizer_manager.harness import CONTEXT, VOCAB, make_spec
from tests.tokenizer_manager.world import World
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import Generate, Refused, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PipelineSpec:
    return make_spec(Path(tmp_path_factory.mktemp("spec")))


def ask(spec: PipelineSpec, sampling: dict[str, Any] | None = None, **fields: Any) -> World:
    world = World(spec)
    world.hello(b"a")
    values: dict[str, Any] = {"prompt": "ab", "input_ids": None, "messages": None} | fields
    raw = msgspec.Raw(msgspec.msgpack.encode(sampling or {}))
    world.say(b"a", Generate("r", sampling=raw, **values))
    if world.work:
        world.tokenize()
    return world


def test_an_embedding_is_one_token_that_is_not_made(spec: PipelineSpec) -> None:
    """Up to the whole context, and whatever the model samples with."""
    for fields, dimensions in (({"dimensions": 0}, 64), ({"dimensions": 7}, 7)):
        for count in (1, CONTEXT):
            [added] = ask(
                spec, {"timeout_s": 3.0, "seed": 5}, prompt=None, input_ids=pack_ids([9] * count), **fields
            ).added()
            assert added.sampling.pooling == Pooling(dimensions)
            assert (added.sampling.max_new_tokens, added.sampling.temperature, added.sampling.top_k) == (1, 0, -1)
            assert (added.sampling.n, added.timeout_s, len(added.token_ids)) == (1, 3.0, 4 * count)
            assert added.sampling.end_token_ids == ()


def test_this_tokenizer_cannot_score(spec: PipelineSpec) -> None:
    """tests/integration/test_embeddings.py has one that can."""
    [refused] = ask(spec, prompt=None, pair=["i", "q", "d"]).got(b"a", Refused)
    assert refused.error.message == "'yes' is no token of small, so it cannot score: use a Qwen3-Reranker"


@pytest.mark.parametrize(
    ("sampling", "fields", "field"),
    [
        ({}, {"dimensions": 65}, "dimensions"),
        ({}, {"dimensions": -1}, "dimensions"),
        ({}, {"prompt": None, "pair": []}, "pair"),
        ({}, {"prompt": None, "pair": ["a"] * 4}, "pair"),
        ({}, {"prompt": None, "pair": ["a"] * 3, "dimensions": 5}, "dimensions"),
        ({}, {"pair": ["a"] * 3}, "prompt"),
        ({}, {"prompt": None, "pair": ["a", "b", "c" * 200_000]}, "prompt"),
        ({}, {"dimensions": 0, "prompt": None, "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({}, {"dimensions": 0, "regex": "x"}, "regex"),
        ({}, {"dimensions": 0, "resume_ids": [b""]}, "resume_ids"),
        ({"n": 2}, {"dimensions": 0}, "n"),
        ({"max_new_tokens": 5}, {"dimensions": 0}, "max_new_tokens"),
        ({}, {"dimensions": 0, "prompt": None, "input_ids": pack_ids([VOCAB])}, "input_ids"),
        ({}, {"dimensions": 0, "prompt": None, "input_ids": pack_ids([1] * (CONTEXT + 1))}, "prompt"),
        ({}, {"dimensions": 0, "prompt": ""}, "prompt"),
    ],
)
def test_what_is_refused(spec: PipelineSpec, sampling: dict[str, Any], fields: dict[str, Any], field: str) -> None:
    world = ask(spec, sampling, **fields)
    [refused] = world.got(b"a", Refused)
    assert refused.error.field == field
    assert "\n" not in refused.error.message
    assert not world.added()


def test_a_model_without_a_head_only_embeds(spec: PipelineSpec) -> None:
    headless = msgspec.structs.replace(spec, model=msgspec.structs.replace(spec.model, has_head=False))
    assert ask(headless, dimensions=0).added()
    for world in (ask(headless), ask(headless, prompt=None, pair=["a"] * 3)):
        [refused] = world.got(b"a", Refused)
        assert "has no lm_head" in refused.error.message
