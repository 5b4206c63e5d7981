"""Qwen3, dense and mixture-of-experts: the MLP of each layer is chosen by the config, all else is shared.

Knows nothing of requests, caches and sampling. Everything a forward needs is an argument. T tokens, H hidden size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.attention import Attention
from vibe_sgl_lite.qwen3.attention_backend import AttentionBackend, ForwardContext
from vibe_sgl_lite.qwen3.layers.linear import ColumnParallelLinear, TokenAttributes, VocabParallelEmbedding
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind, MoEBlock
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, OTHER, PartTimer
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles, RotaryEmbedding
from vibe_sgl_lite.qwen3.layers.setup import Setup
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.steps import AddNorm, Block, RunExperts, run_block
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


class DecoderLayer:
    """Attention and feed-forward, each over the normalised residual stream, to which its output is added."""

    def __init__(self, layer: int, setup: Setup, dispatch: DispatchKind) -> None:
        config, operations = setup.config, setup.operations
        self.attention_norm = setup.norm(config.hidden_size)
        self.attention = Attention(layer, setup)
        self.feed_forward_norm = setup.norm(config.hidden_size)
        feed_forward: MLP | MoEBlock = MoEBlock(setup, dispatch) if config.layer_is_moe(layer) else MLP(setup)
        self.feed_forward = feed_forward
        forward = (RunExperts(feed_forward),) if isinstance(feed_forward, MoEBlock) else feed_forward.steps
        self.blocks: tuple[Block, ...] = (
            (AddNorm(self.attention_norm, operations), *self.attention.steps),
            (AddNorm(self.feed_forward_norm, operations), *forward),
        )

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        """Add `update`, the last block's output, to `residual` in place; return the next update. All [T, H]."""
        for block in self.blocks:
            update = run_block(block, update, residual, context)
        return update


class AllLayers(Protocol):
    """All decoder layers at once, where a device has a faster way than one operation after another."""

    def __call__(self, update: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        """As calling every layer in turn: `residual`, [T, H], in place, and the last layer's update returned.

        update may be overwritten.
        """
        ...


# What the layers start from: the first update, [T, H], of a residual stream that starts at zero, the second; and the
# angles of the positions.
Begin = Callable[[Tensor, Tensor, PartTimer], tuple[Tensor, Tensor, RopeAngles]]


class Qwen3:
    """The model of one rank. Its weights are empty until a loader has filled `qwen3.checkpoint.load_items(model)`."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        device: torch.device,
        operations: LayerOperations,
        dispatch: DispatchKind = "all_reduce",
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        self.device = device
        self.operations = operations
        setup = Setup(config, parallel, operations, dtype, device)
        self.head = ColumnParallelLinear(config.hidden_size, config.vocab_size, setup)
        self.embedding = VocabParallelEmbedding(setup, self.head.weight if config.tie_word_embeddings else None)
        positions = config.context_limit if device.type == "cuda" else 0  # a launch less for each function
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, dtype, device, positions, config.yarn)
        self.layers = [DecoderLayer(layer, setup, dispatch) for layer in range(config.num_hidden_layers)]
        self.norm = setup.norm(config.hidden_size)
        self.all_layers: AllLayers | None = None
        self.begin: Begin = self._begin

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        backend: AttentionBackend,
        metadata: Any,
        timer: PartTimer = NO_TIMER,
        attributes: TokenAttributes | None = None,
    ) -> Tensor:
        """Final hidden states, after the last norm.

        token_ids, positions: [T] int32 or int64, the tokens of all rows one after another. metadata: handed to
        `backend` as it is. attributes: where not all tokens are plain. Returns [T, H] in the model's dtype, the same on
        every rank.
        """
        update, residual, angles = self.begin(token_ids, positions, timer)
        context = ForwardContext(angles, backend, metadata, timer, attributes)
        if self.all_layers is not None and attributes is None:
            update = self.all_layers(update, residual, context)
        else:
            for layer in self.layers:
                update = layer(update, residual, context)
        timer.mark("norm")
        return self.operations.add_rms_norm(update, residual, self.norm.weight.tensor, self.norm.eps)

    def _begin(self, token_ids: Tensor, positions: Tensor, timer: PartTimer) -> tuple[Tensor, Tensor, RopeAngles]:
        timer.mark("rope")
        angles = self.rotary(positions)
        timer.mark("embedding")
        update = self.embedding(token_ids)
        timer.mark(OTHER)
        return update, torch.zeros_like(update), angles

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, H] final hidden states -> [rows, vocab / tp], this rank's range `embedding.vocab` of the vocabulary.

        Call it with only the rows that are sampled: the head is a quarter of the weights of a small model.
        """
        return self.head(hidden)
