"""Small random checkpoints made by transformers, and our model run over a paged pool, for comparing the two."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from vibe_sgl_lite.model_worker.compute import Compute, choose_compute, torch_compute
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, IntArray
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

DENSE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def make_checkpoint(folder: Path, shape: dict[str, Any], *, seed: int = 0, **save: Any) -> Any:
    """Save a random model of `shape` to `folder` and return transformers' model in fp32, for reference.

    Weights are larger than a fresh initialisation's and norms are no ones, so that no part of the model is negligible.
    """
    moe = "num_experts" in shape
    config_class: Any = transformers.Qwen3MoeConfig if moe else transformers.Qwen3Config
    model_class: Any = transformers.Qwen3MoeForCausalLM if moe else transformers.Qwen3ForCausalLM
    torch.manual_seed(seed)
    model = model_class(config_class(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, **save)
    return model


def load_model(
    folder: Path,
    *,
    parallel: ParallelState | None = None,
    dtype: torch.dtype = torch.float32,
    dispatch: DispatchKind = "all_reduce",
    compute: Compute | None = None,
    quantization: str | None = None,
) -> Qwen3:
    """quantization: None keeps matrices in torch's own formats, whatever `compute` has."""
    compute = compute or torch_compute()
    model = Qwen3(
        settle(ModelConfig.from_folder(folder), folder),
        parallel or ParallelState(),
        dtype,
        torch.device("cpu"),
        compute.operations,
        dispatch,
    )
    if quantization is not None:
        choose_formats(model, quantization, compute.kernels)
    load_weights(model, folder)
    return model


def compute_of(name: str, dtype: torch.dtype = torch.float32) -> Compute:
    """ "torch" or "kernels"; tests of the latter fail where no compiler is, which is right: they need one."""
    if name == "torch":
        return torch_compute()
    compute = choose_compute(dtype, torch.device("cpu"), 8)
    assert compute.name.startswith("CPU kernels")
    return compute


@dataclass
class Row:
    """One request: its tokens, how many of them are computed, and its pages."""

    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)


def device_batch(
    starts: IntArray, lengths: IntArray, table: Tensor, slots: list[int], tokens: list[int], positions: list[int]
) -> DeviceBatch:
    """A step's rows, made without the runner. starts: [R + 1]; lengths: [R], contexts with the new tokens."""
    chunks = np.flatnonzero(np.diff(starts) != 1)
    return DeviceBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        query_start=torch.from_numpy(starts),
        context_lengths=torch.from_numpy(lengths),
        page_table=table,
        num_decode_rows=int(chunks[0]) if len(chunks) else len(lengths),
        host_query_start=starts,
        host_context_lengths=lengths,
        max_context=int(lengths.max()),
    )


class PagedRun:
    """Runs rows through a model over a pool whose pages are handed out in scattered order."""

    def __init__(
        self,
        model: Qwen3,
        *,
        num_pages: int = 256,
        page_size: int = 4,
        compute: Compute | None = None,
        int8: bool = False,
    ) -> None:
        self.model = model
        self.pool = KVPool(
            model.config, model.parallel.tp.size, num_pages, page_size, model.dtype, model.device, int8=int8
        )
        # Whatever is read without having been written shows; in int8, its scale is NaN.
        self.pool.data.view(torch.uint8).fill_(0xFF)
        self.backend = (compute or torch_compute()).attention(self.pool)
        self.free_pages = np.random.default_rng(0).permutation(num_pages).tolist()

    def step(self, rows: Sequence[tuple[Row, int]]) -> Tensor:
        """Run the next `count` tokens of each row; logits of all of them, [T, vocab / tp]."""
        size = self.pool.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for row, count in rows:
            end = row.computed + count
            while len(row.pages) * size < end:
                row.pages.append(self.free_pages.pop())
            tokens += row.tokens[row.computed : end]
            positions += range(row.computed, end)
            slots += [row.pages[p // size] * size + p % size for p in range(row.computed, end)]
            row.computed = end
        starts = np.cumsum([0] + [count for _, count in rows], dtype=np.int32)
        lengths = np.array([row.computed for row, _ in rows], dtype=np.int32)
        table = torch.full((len(rows), max(len(row.pages) for row, _ in rows)), self.pool.padding_page)
        for i, (row, _) in enumerate(rows):
            table[i, : len(row.pages)] = torch.tensor(row.pages)
        batch = device_batch(starts, lengths, table.to(torch.int32), slots, tokens, positions)
        with torch.inference_mode():
            metadata = self.backend.prepare(batch)
            hidden = self.model.forward(batch.token_ids, batch.positions, self.backend, metadata)
            return self.model.logits(hidden)

    def greedy(self, row: Row, count: int, chunk: int) -> list[int]:
        """Prefill in chunks, then decode alone; the `count` generated tokens."""
        prompt_length = len(row.tokens)
        while len(row.tokens) < prompt_length + count:
            logits = self.step([(row, min(chunk, len(row.tokens) - row.computed))])
            if row.computed == len(row.tokens):
                row.tokens.append(int(logits[-1].argmax()))
        return row.tokens[prompt_length:]


def random_tokens(count: int, *, vocab: int = 256, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    """[T, vocab] of transformers' model, in one piece."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
