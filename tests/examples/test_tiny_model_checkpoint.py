"""The two trained checkpoints: their shapes, and right answers through transformers to what training never saw."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from examples.tiny_model.checkpoint import model_config, new_model, save_checkpoint
from examples.tiny_model.evaluate import TransformersBackend, accuracies
from examples.tiny_model.prompts import closed_answer_prompts
from examples.tiny_model.train import Batches, MasterWeights, learning_rate, loss_of
from tests.examples.test_tiny_model_tokenizer import TOKENIZER
from tests.examples.tiny_model_paths import DENSE, MOE

KINDS = pytest.mark.parametrize(("kind", "folder"), [("dense", DENSE), ("moe", MOE)])


@KINDS
def test_checkpoint_is_small_bf16_and_of_the_documented_shape(kind: str, folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text()) == model_config(kind, TOKENIZER)  # type: ignore[arg-type]
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    with safe_open(weights, "pt") as tensors:
        names = list(tensors.keys())
        assert all(tensors.get_tensor(name).dtype == torch.bfloat16 for name in names)
    assert "lm_head.weight" not in names
    assert ("model.layers.0.mlp.experts.7.down_proj.weight" in names) == (kind == "moe")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [TOKENIZER.id_to_token(token) for token in generation["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]


@KINDS
@pytest.mark.parametrize("thinking", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpoint_answers_what_training_never_saw(kind: str, folder: Path, thinking: bool) -> None:
    prompts = closed_answer_prompts(14, seed=5)
    backend = TransformersBackend(folder, "float32", "cpu", batch_size=14)
    texts = backend.answers([prompt.messages for prompt in prompts], thinking=thinking)
    scores = accuracies(prompts, texts)
    assert sum(scores.values()) / len(scores) >= 0.9, scores
    assert all(("<think>" in text) == thinking for text in texts)


def test_raw_text_goes_on_as_a_story() -> None:
    backend = TransformersBackend(DENSE, "float32", "cpu", batch_size=1)
    text = backend.complete(["Once upon a time"])[0]
    assert " named " in text or " called " in text or "The name of the" in text
    assert text.endswith((".", '"'))


@KINDS
def test_saved_checkpoint_loads_with_identical_logits(kind: str, folder: Path, tmp_path: Path) -> None:
    model = new_model(kind, TOKENIZER, seed=3).train(False)  # type: ignore[arg-type]
    save_checkpoint(model, kind, TOKENIZER, tmp_path)  # type: ignore[arg-type]
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.slow
@KINDS
def test_a_few_steps_of_training_lower_the_loss(kind: str, folder: Path) -> None:
    model = new_model(kind, TOKENIZER, seed=0).train()  # type: ignore[arg-type]
    masters = MasterWeights(model)
    batch = Batches(TOKENIZER, seed=0, steps=1, tokens_per_step=128)[0]
    losses = []
    for _ in range(6):
        loss, _answers = loss_of(model, batch, moe=kind == "moe")
        losses.append(loss.item())
        torch.autograd.backward(loss)
        masters.step(1e-3)
    assert losses[-1] < losses[0] - 0.5
    assert learning_rate(0.02, 1.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 1.0) == pytest.approx(0.0)
