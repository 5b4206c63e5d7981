"""Our Qwen3 against transformers' on random checkpoints: the same logits, the same greedy tokens however it is run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.qwen3.harness import (
    DENSE,
    MOE,
    PagedRun,
    Row,
    compute_of,
    load_model,
    make_checkpoint,
    random_tokens,
    reference_logits,
)

SHAPES: dict[str, dict[str, Any]] = {
    "one layer, no groups": DENSE | {"num_hidden_layers": 1, "num_key_value_heads": 4},
    "groups of 2": DENSE,
    "groups of 8, tied": DENSE
    | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "groups of 4, wide heads": DENSE | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "heads of 64, six layers, tied": DENSE | {"num_hidden_layers": 6, "head_dim": 64, "tie_word_embeddings": True},
    "own rope base": DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "moe": MOE,
    "moe, not normalised, top 3": MOE | {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "moe with dense layers": MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "moe, one expert a token, tied": MOE | {"num_experts_per_tok": 1, "tie_word_embeddings": True},
}


@pytest.fixture(params=["torch", "kernels"])
def compute_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(tmp_path: Path, name: str, compute_name: str) -> None:
    reference = make_checkpoint(tmp_path, SHAPES[name])
    tokens = random_tokens(50)
    expected = reference_logits(reference, tokens)
    compute = compute_of(compute_name)
    run = PagedRun(load_model(tmp_path, compute=compute), compute=compute)
    logits = run.step([(Row(tokens), len(tokens))])
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_chunks_and_mixed_batches_give_the_same_logits(
    tmp_path: Path, shape: dict[str, Any], compute_name: str
) -> None:
    """Rows of all kinds in one step: first chunk, later chunk, decode."""
    reference = make_checkpoint(tmp_path, shape)
    compute = compute_of(compute_name)
    run = PagedRun(load_model(tmp_path, compute=compute), compute=compute)
    rows = [Row(random_tokens(length, seed=length)) for length in (40, 33, 9)]
    steps = [
        [(rows[0], 17)],
        [(rows[1], 30), (rows[0], 22)],
        [(rows[2], 9), (rows[0], 1), (rows[1], 1)],
        [(rows[1], 2)],
    ]
    collected: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for step in steps:
        logits = torch.split(run.step(step), [count for _, count in step])
        for (row, _), part in zip(step, logits, strict=True):
            collected[next(i for i, r in enumerate(rows) if r is row)].append(part)
    for number, row in enumerate(rows):
        assert (torch.cat(collected[number]) - reference_logits(reference, row.tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_greedy_tokens_do_not_depend_on_chunks_or_batch(
    tmp_path: Path, shape: dict[str, Any], compute_name: str
) -> None:
    compute = compute_of(compute_name)
    reference = make_checkpoint(tmp_path, shape)
    run = PagedRun(load_model(tmp_path, compute=compute), num_pages=1024, compute=compute)
    prompt = random_tokens(70)
    new_tokens = 12
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),  # else token 0 is taken for padding
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    for chunk in (70, 1, 7, 64):
        assert run.greedy(Row(list(prompt)), new_tokens, chunk) == expected

    rows = [Row(list(prompt))] + [Row(random_tokens(5 + 4 * i, seed=i)) for i in range(15)]
    lengths = [len(row.tokens) for row in rows]
    while any(len(row.tokens) - length < new_tokens for row, length in zip(rows, lengths, strict=True)):
        step = [(row, min(16, len(row.tokens) - row.computed)) for row in rows]  # decodes beside prefill chunks
        ends = torch.tensor([count for _, count in step]).cumsum(0) - 1
        for (row, _), token in zip(step, run.step(step)[ends].argmax(-1).tolist(), strict=True):
            if row.computed == len(row.tokens):
                row.tokens.append(token)
    assert rows[0].tokens[len(prompt) :][:new_tokens] == expected


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_fp32_logits_are_the_same_bits_in_any_batch(tmp_path: Path, shape: dict[str, Any], compute_name: str) -> None:
    """Prefilled in the same chunks, alone and beside 9 others, then decoded."""
    compute = compute_of(compute_name)
    make_checkpoint(tmp_path, shape)
    model = load_model(tmp_path, compute=compute)
    prompts = [random_tokens(150 + 7 * i, seed=i) for i in range(10)]
    crowd = PagedRun(model, num_pages=1024, compute=compute)
    rows = [Row(prompt) for prompt in prompts]
    together = [crowd.step([(row, count) for row in rows]) for count in (100, 40, 1, 1)]
    for number, prompt in enumerate(prompts):
        run, row = PagedRun(model, compute=compute), Row(prompt)
        for count, logits in zip((100, 40, 1, 1), together, strict=True):
            assert torch.equal(run.step([(row, count)]), logits[number * count : (number + 1) * count])


def test_bfloat16_stays_close_to_fp32(tmp_path: Path, compute_name: str) -> None:
    """The packed bf16 path computes the same function; its error is what transformers' own bf16 has, not more."""
    reference = make_checkpoint(tmp_path, DENSE | {"num_hidden_layers": 4})
    tokens = random_tokens(50)
    expected = reference_logits(reference, tokens)
    compute = compute_of(compute_name, torch.bfloat16)
    run = PagedRun(load_model(tmp_path, dtype=torch.bfloat16, compute=compute), compute=compute)
    ours = (run.step([(Row(tokens), 50)]).float() - expected).norm() / expected.norm()
    theirs = (reference_logits(reference.to(torch.bfloat16), tokens).float() - expected).norm() / expected.norm()
    assert ours < 1.5 * theirs
    assert ours < 0.1


def test_moe_bfloat16_uses_packed_experts(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, MOE)
    tokens = random_tokens(20)
    expected = reference_logits(reference, tokens)
    run = PagedRun(load_model(tmp_path, dtype=torch.bfloat16))
    logits = run.step([(Row(tokens), 20)]).float()
    # A router near a tie may choose another expert in bf16, so most tokens are compared, not each.
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.05
