"""Text of every script comes through whole, over the real tokenizer, process by process, chunk by chunk."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.integration.daemon import Daemon
from vibe_sgl_lite import AsyncClient, Client, SamplingParams
from vibe_sgl_lite.runtime.settings.model_source import find_model

PROMPT = "请用中文写一个故事 👩‍👩‍👧‍👦 नमस्ते, café, ¡olé!"
HANDFUL = 40  # tokens a stream
STREAMS = 12


@pytest.fixture(scope="module")
def oracle(model: list[str]) -> Tokenizer:
    """The tokenizers library's own one-shot decoding."""
    path = model[model.index("--model-path") + 1] if model else "embedded"
    folder: Path = find_model(path, weights=False).folder
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


async def collect(client: AsyncClient, seed: int) -> tuple[list[int], list[str]]:
    """Ids and text pieces of one stream, drawn close to uniformly over the vocabulary."""
    params = SamplingParams(
        max_new_tokens=HANDFUL, temperature=100.0, top_k=-1, top_p=1.0, min_p=0.0, seed=seed, ignore_eos=True,
        skip_special_tokens=False,
    )  # fmt: skip
    ids: list[int] = []
    pieces: list[str] = []
    async for chunk in client.stream(PROMPT, params):
        ids += chunk.token_ids
        pieces.append(chunk.text)
    return ids, pieces


def test_random_tokens_stream_as_their_one_shot_decoding(daemon: Daemon, oracle: Tokenizer) -> None:
    """Uniform ids are of all scripts of the vocabulary, with many cuts inside of characters."""

    async def all_streams() -> list[tuple[list[int], list[str]]]:
        async with daemon.async_client() as client:
            return await asyncio.gather(*(collect(client, seed) for seed in range(STREAMS)))

    seen = ""
    for ids, pieces in asyncio.run(all_streams()):
        assert len(ids) == HANDFUL
        text = "".join(pieces)
        assert text == oracle.decode(ids, skip_special_tokens=False)
        assert len([piece for piece in pieces if piece]) > 1  # it did come in pieces
        seen += text
    if oracle.get_vocab_size() > 100_000:
        assert re.search(r"[\u4e00-\u9fff]", seen)


def test_prompts_of_every_script_are_tokenized_as_by_the_oracle(client: Client, oracle: Tokenizer) -> None:
    output = client.generate(PROMPT, SamplingParams(max_new_tokens=1, temperature=0))
    assert output.usage is not None
    assert output.usage.prompt_tokens == len(oracle.encode(PROMPT).ids)


def test_a_chat_in_chinese_with_emoji(client: Client, oracle: Tokenizer) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    params = SamplingParams(max_new_tokens=16, temperature=0)
    output = client.chat(messages, params, enable_thinking=False)
    assert output.finish_reason in ("stop", "length")
    assert output.text == oracle.decode(output.token_ids, skip_special_tokens=True)
