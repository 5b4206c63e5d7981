"""A prompt of 100,000 tokens with YaRN through the pipeline, against transformers, which computes it in pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.integration.daemon import running
from tests.integration.test_embeddings import TINY
from tests.qwen3.harness import make_checkpoint, random_tokens
from vibe_sgl_lite import SamplingParams

PROMPT, NEW, TRAINED = 100_000, 4, 32_768
PIECE = 500  # so that the reference's mask, [PIECE, context], stays small
SHAPE: dict[str, Any] = {
    "vocab_size": 2056, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 131_072, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": TRAINED,
    },
}  # fmt: skip


class Reference:
    """transformers over one sequence, piece after piece."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = transformers.DynamicCache()

    def run(self, ids: list[int]) -> Tensor:
        """Final hidden states of the next tokens, [n, H]."""
        with torch.inference_mode():
            out = self.model.model(torch.tensor([ids]), cache=self.cache, use_cache=True)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logprobs(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model.lm_head(hidden)
        return logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_prompt_of_100_000_tokens_with_yarn(tmp_path: Path) -> None:
    """Logprobs of the whole prompt and of new tokens at 1e-4, the tokens themselves, and the prompt's embedding."""
    model = make_checkpoint(tmp_path, SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    prompt = random_tokens(PROMPT, vocab=2000)
    asked = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True, logprobs=True, prompt_logprobs=True)
    flags = ["--dtype", "float32", "--max-total-tokens", str(PROMPT + 4096), "--step-timeout", "600"]
    with running("--model-path", str(tmp_path), *flags) as daemon, daemon.client() as client:
        assert client.model.context_length == 131_072
        out = client.generate(input_ids=prompt, sampling_params=asked)
        embedding = client.embed(prompt)
        assert embedding.usage is not None
        assert embedding.usage.cached_tokens > PROMPT - 32, "it found what the other request had computed"

    reference, expected = Reference(model), []
    for start in range(0, PROMPT, PIECE):
        hidden = reference.run(prompt[start : start + PIECE])
        following = torch.tensor(prompt[start + 1 : start + PIECE + 1])
        expected.append(reference.logprobs(hidden)[range(len(following)), following])
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    told = torch.tensor([entry.logprob for entry in out.prompt_logprobs[1:] if entry is not None])
    torch.testing.assert_close(told, torch.cat(expected), atol=1e-4, rtol=1e-4)
    distance = 1 - torch.nn.functional.cosine_similarity(hidden[-1], torch.tensor(np.asarray(embedding.vector)), dim=0)
    assert distance < 1e-4
    assert out.logprobs is not None
    for entry in out.logprobs:
        logprobs = reference.logprobs(hidden[-1])
        assert entry.token_id == int(logprobs.argmax())
        assert abs(entry.logprob - logprobs.max().item()) < 1e-4
        hidden = reference.run([entry.token_id])
    assert len(out.token_ids) == NEW
