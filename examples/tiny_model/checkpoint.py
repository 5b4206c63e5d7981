"""The two models' shapes, and writing them in Hugging Face format.

Every size divides by 4, so that both run on 1, 2 or 4 ranks, the experts too.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.tiny_model.tokenizer import MAX_POSITIONS, VOCAB_SIZE, save_tokenizer

Kind = Literal["dense", "moe"]

_GENERATION = {
    # Answers have one right form, so sampling stays close to greedy; stories still differ from call to call.
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 20,
    "top_p": 0.95,
}


def model_config(kind: Kind, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of the dense or the MoE model."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 768,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "qwen3",
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    if kind == "dense":
        return config
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    }


def new_model(kind: Kind, tokenizer: Tokenizer, seed: int) -> PreTrainedModel:
    """A model of that kind with seeded random weights in bfloat16, on the CPU.

    Only weights are bfloat16: the rotary frequencies stay float32, as they are in a model loaded from a checkpoint.
    """
    torch.manual_seed(seed)
    config = {key: value for key, value in model_config(kind, tokenizer).items() if key != "torch_dtype"}
    dense = kind == "dense"
    model = Qwen3ForCausalLM(Qwen3Config(**config)) if dense else Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def save_checkpoint(model: PreTrainedModel, kind: Kind, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (bfloat16, one safetensors file), configurations and tokenizer; a card already there stays."""
    save_tokenizer(tokenizer, folder)
    config = model_config(kind, tokenizer)
    generation = {
        "bos_token_id": config["bos_token_id"],
        **_GENERATION,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["pad_token_id"],
    }
    _write_json(config, folder / "config.json")
    _write_json(generation, folder / "generation_config.json")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch, max_shard_size="1GB")
        weights = Path(scratch) / "model.safetensors"
        weights.chmod(0o644)
        weights.replace(folder / "model.safetensors")


def _write_json(value: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
