"""YaRN against transformers: the angles at positions far beyond what was trained, and a model's logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.qwen3.harness import DENSE, PagedRun, Row, load_model, make_checkpoint, random_tokens, reference_logits
from vibe_sgl_lite.qwen3.layers.rotary import RotaryEmbedding
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

SCALINGS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 2.0},
    {"factor": 1.0, "original_max_position_embeddings": 64},
    {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
    {"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.1},
    {"factor": 8.0, "original_max_position_embeddings": 640, "truncate": False},
]


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles(tmp_path: Path, scaling: dict[str, Any], theta: float) -> None:
    rope = {"rope_type": "yarn", "rope_theta": theta} | scaling
    shape = DENSE | {"head_dim": 128, "max_position_embeddings": 40960, "rope_parameters": rope}
    theirs_config = transformers.Qwen3Config(**shape)
    theirs_config.architectures = ["Qwen3ForCausalLM"]
    theirs_config.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    theirs: Any = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(theirs_config)
    positions = torch.tensor([0, 1, 2, 63, 64, 1000, 32768, 131071])
    cos, sin = theirs(torch.zeros(1), positions.unsqueeze(0))
    cpu = torch.device("cpu")
    ours = RotaryEmbedding(config.head_dim, config.rope_theta, torch.float32, cpu, yarn=config.yarn)
    angles = ours(positions)
    known = RotaryEmbedding(config.head_dim, config.rope_theta, torch.float32, cpu, 2048, config.yarn)(positions[:6])
    torch.testing.assert_close(known.cos, angles.cos[:6], atol=0, rtol=0)
    torch.testing.assert_close(known.sin, angles.sin[:6], atol=0, rtol=0)
    torch.testing.assert_close(angles.cos, cos[0, :, :64], atol=1e-5, rtol=0)
    torch.testing.assert_close(angles.sin, sin[0, :, :64], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scaling", SCALINGS[3:])
def test_logits_beyond_the_trained_length(tmp_path: Path, scaling: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0} | scaling
    reference = make_checkpoint(tmp_path, DENSE | {"rope_parameters": rope})
    tokens = random_tokens(300)
    logits = PagedRun(load_model(tmp_path)).step([(Row(tokens), 300)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)
