"""Parallel linear layers and the vocabulary-parallel embedding and head. With one rank they are the plain layers.

Shapes: T tokens, H hidden size. Column-parallel layers split their output over the TP group and need no collective;
row-parallel ones split their input and end in one all-reduce. attributes: of the tokens, where not all are plain;
nothing here depends on them yet.
"""

from dataclasses import dataclass

from torch import Tensor

from vibe_sgl_lite.qwen3.layers.parallel_state import kv_head_shard, shard, spread
from vibe_sgl_lite.qwen3.layers.setup import Setup
from vibe_sgl_lite.qwen3.layers.weight import EmbeddingWeight, MatrixWeight


@dataclass(frozen=True)
class TokenAttributes:
    """What tells tokens of one forward from others, for the linears; [T] each. adapter: int32, 0 is none."""

    adapter: Tensor


class ColumnParallelLinear:
    """[T, in] -> [T, out / group], replicated input."""

    def __init__(self, in_features: int, out_features: int, setup: Setup) -> None:
        part = spread(out_features, setup.parallel.tp)
        self.weight = MatrixWeight(part.stop - part.start, in_features, setup.dtype, setup.device)

    def __call__(self, x: Tensor, attributes: TokenAttributes | None = None) -> Tensor:
        return self.weight.multiply(x)


class RowParallelLinear:
    """[T, in / group] -> [T, out], summed over the group: the same on every rank."""

    def __init__(self, in_features: int, out_features: int, setup: Setup) -> None:
        self.group = setup.parallel.tp
        part = shard(in_features, self.group)
        self.weight = MatrixWeight(out_features, part.stop - part.start, setup.dtype, setup.device)

    def __call__(self, x: Tensor, attributes: TokenAttributes | None = None) -> Tensor:
        return self.group.all_reduce(self.partial(x, attributes))

    def partial(self, x: Tensor, attributes: TokenAttributes | None = None) -> Tensor:
        """[T, in / group] -> [T, out], this rank's part of the sum."""
        return self.weight.multiply(x)


class QKVLinear:
    """Queries, keys and values of this rank's heads in one matrix, rows in that order.

    [T, H] -> [T, (heads + 2 x kv heads) x head_dim], local heads. KV heads are replicated when ranks exceed them.
    """

    def __init__(self, setup: Setup) -> None:
        config, group = setup.config, setup.parallel.tp
        self.heads = shard(config.num_attention_heads, group)
        self.kv_heads = kv_head_shard(config.num_key_value_heads, group)
        self.num_heads = self.heads.stop - self.heads.start
        self.num_kv_heads = self.kv_heads.stop - self.kv_heads.start
        rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.weight = MatrixWeight(rows, config.hidden_size, setup.dtype, setup.device)

    def __call__(self, x: Tensor, attributes: TokenAttributes | None = None) -> Tensor:
        return self.weight.multiply(x)


class VocabParallelEmbedding:
    """Token ids [T] -> [T, H]. Each rank holds a range of the vocabulary and contributes the rows it has.

    tied: the head's weight, where the embedding has the same values.
    """

    def __init__(self, setup: Setup, tied: MatrixWeight | None) -> None:
        self.group = setup.parallel.tp
        self.vocab = spread(setup.config.vocab_size, self.group)
        rows, width = self.vocab.stop - self.vocab.start, setup.config.hidden_size
        self.weight = EmbeddingWeight(rows, width, setup.dtype, setup.device, tied)

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.weight.rows(token_ids)
        local = token_ids - self.vocab.start
        elsewhere = (local < 0) | (local >= self.vocab.stop - self.vocab.start)
        rows = self.weight.rows(local.masked_fill(elsewhere, 0))
        return self.group.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))
