"""Qwen3, dense and mixture-of-experts: the MLP of each layer is chosen by the config, all else is shared.

Knows nothing of requests, caches and sampling. Everything a forward needs is an argument. T tokens, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from qwen3.attention import Attention
from qwen3.attention_backend import AttentionBackend
from qwen3.linear import ColumnParallelLinear, VocabParallelEmbedding
from qwen3.mlp import MLP
from qwen3.moe import DispatchKind, MoEBlock, make_dispatch
from qwen3.norm import RMSNorm
from qwen3.parallel import ParallelState
from qwen3.rope import RopeAngles, RotaryEmbedding
from runtime.model_config import ModelConfig


class DecoderLayer:
    """Attention and feed-forward, each normalised before and added to the residual stream after."""

    def __init__(
        self,
        attention: Attention,
        feed_forward: MLP | MoEBlock,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.feed_forward = feed_forward

    def __call__(self, x: Tensor, angles: RopeAngles, backend: AttentionBackend, metadata: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, backend, metadata)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Qwen3:
    """The model of one rank. Its weights are empty until a loader has filled `qwen3.checkpoint.load_items(model)`."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        device: torch.device,
        dispatch: DispatchKind = "all_reduce",
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        self.device = device
        expert_dispatch = make_dispatch(dispatch, parallel)
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel.tp, dtype, device)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, dtype, device)
        self.layers = [
            DecoderLayer(
                Attention(layer, config, parallel, dtype, device),
                MoEBlock(config, parallel, expert_dispatch, dtype, device)
                if config.layer_is_moe(layer)
                else MLP(config, parallel, dtype, device),
                config,
                dtype,
                device,
            )
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.head = ColumnParallelLinear(config.hidden_size, config.vocab_size, parallel.tp, dtype, device)

    def forward(self, token_ids: Tensor, positions: Tensor, backend: AttentionBackend, metadata: Any) -> Tensor:
        """Final hidden states, after the last norm.

        token_ids, positions: [T] int32 or int64, the tokens of all rows one after another. metadata: handed to
        `backend` as it is. Returns [T, H] in the model's dtype, the same on every rank.
        """
        x = self.embedding(token_ids)
        angles = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, angles, backend, metadata)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, H] final hidden states -> [rows, vocab / tp], this rank's range `embedding.vocab` of the vocabulary.

        Call it with only the rows that are sampled: the head is a quarter of the weights of a small model.
        """
        return self.head(hidden)
