"""The name map: which tensors of a Hugging Face checkpoint, and which part of each, make up every weight of one rank.

Knows nothing of files: a loader reads the parts, from wherever, into a buffer a piece of a weight and installs it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vibe_sgl_lite.qwen3.attention import Attention
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.parallel_state import shard
from vibe_sgl_lite.qwen3.layers.weight import Piece, Weight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3


@dataclass(frozen=True)
class Part:
    """One region of one checkpoint tensor and where it goes.

    shape: the whole tensor's shape in the checkpoint. source: what this rank reads of it, a slice a dimension.
    target: index of the weight's buffer that takes it.
    """

    name: str
    shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: tuple[slice | int, ...]

    def within(self, rows: slice) -> "Part | None":
        """What of it belongs to these rows of its matrix, and where it goes in a buffer of them alone."""
        start = next((place.start for place in self.target if isinstance(place, slice)), 0)
        first, *others = self.source
        lower, upper = max(rows.start, start), min(rows.stop, start + first.stop - first.start)
        if lower >= upper:
            return None
        source = slice(first.start + lower - start, first.start + upper - start)
        return Part(self.name, self.shape, (source, *others), (slice(lower - rows.start, upper - rows.start),))


@dataclass(frozen=True)
class LoadItem:
    """What weights are made of, in this order (a tied head and the embedding have the same)."""

    weights: tuple[Weight, ...]
    parts: tuple[Part, ...]

    def pieces(self, weight: Weight) -> Iterator[tuple[Piece | None, tuple[Part, ...]]]:
        """The pieces in which one of the weights is to be installed, and the parts of each."""
        by_expert: dict[int | slice | None, list[Part]] = {}
        for part in self.parts:
            expert = next(iter(part.target), None)
            by_expert.setdefault(expert if isinstance(expert, int) else None, []).append(part)
        for piece in weight.pieces():
            if piece is None:
                yield None, self.parts
            else:
                parts = (part.within(piece.rows) for part in by_expert[piece.expert])
                yield piece, tuple(part for part in parts if part is not None)


def load_items(model: Qwen3) -> Iterator[LoadItem]:
    """All weights of `model`, in the order in which a checkpoint usually has them."""
    config = model.config
    tied = (model.head.weight,) if config.tie_word_embeddings else ()
    yield _vocabulary("model.embed_tokens.weight", (*tied, model.embedding.weight), model)
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}"
        yield _whole(f"{prefix}.input_layernorm.weight", layer.attention_norm)
        yield from _attention(f"{prefix}.self_attn", layer.attention, model)
        yield _whole(f"{prefix}.post_attention_layernorm.weight", layer.feed_forward_norm)
        if isinstance(layer.feed_forward, MoEBlock):
            yield from _moe(f"{prefix}.mlp", layer.feed_forward, model)
        else:
            yield from _mlp(f"{prefix}.mlp", layer.feed_forward, model)
    yield _whole("model.norm.weight", model.norm)
    if not config.tie_word_embeddings:
        yield _vocabulary("lm_head.weight", (model.head.weight,), model)


def weight_bytes(model: Qwen3) -> int:
    """Bytes of memory that this rank's weights take, once they are installed."""
    return sum(weight.nbytes for item in load_items(model) for weight in item.weights)


def _whole(name: str, norm: RMSNorm) -> LoadItem:
    return _item(norm.weight, _part(name, norm.weight.shape))


def _vocabulary(name: str, weights: tuple[Weight, ...], model: Qwen3) -> LoadItem:
    shape = (model.config.vocab_size, model.config.hidden_size)
    return LoadItem(weights, (_part(name, shape, rows=model.embedding.vocab),))


def _attention(prefix: str, attention: Attention, model: Qwen3) -> Iterator[LoadItem]:
    config = model.config
    dim, hidden = config.head_dim, config.hidden_size
    qkv = attention.qkv
    yield _stacked(
        qkv.weight,
        _part(f"{prefix}.q_proj.weight", (config.num_attention_heads * dim, hidden), rows=_scaled(qkv.heads, dim)),
        _part(f"{prefix}.k_proj.weight", (config.num_key_value_heads * dim, hidden), rows=_scaled(qkv.kv_heads, dim)),
        _part(f"{prefix}.v_proj.weight", (config.num_key_value_heads * dim, hidden), rows=_scaled(qkv.kv_heads, dim)),
    )
    yield _whole(f"{prefix}.q_norm.weight", attention.query_norm)
    yield _whole(f"{prefix}.k_norm.weight", attention.key_norm)
    shape = (hidden, config.num_attention_heads * dim)
    yield _item(attention.output.weight, _part(f"{prefix}.o_proj.weight", shape, columns=_scaled(qkv.heads, dim)))


def _mlp(prefix: str, mlp: MLP, model: Qwen3) -> Iterator[LoadItem]:
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    part = shard(width, model.parallel.tp)
    yield _stacked(
        mlp.gate_up.weight,
        _part(f"{prefix}.gate_proj.weight", (width, hidden), rows=part),
        _part(f"{prefix}.up_proj.weight", (width, hidden), rows=part),
    )
    yield _item(mlp.down.weight, _part(f"{prefix}.down_proj.weight", (hidden, width), columns=part))


def _moe(prefix: str, block: MoEBlock, model: Qwen3) -> Iterator[LoadItem]:
    hidden, width = model.config.hidden_size, model.config.moe_intermediate_size
    part = shard(width, model.parallel.expert_tp)
    size = part.stop - part.start
    yield _item(block.router.weight, _part(f"{prefix}.gate.weight", (model.config.num_experts, hidden)))
    gate_up: list[Part] = []
    down: list[Part] = []
    for local, expert in enumerate(range(block.experts.ids.start, block.experts.ids.stop)):
        name = f"{prefix}.experts.{expert}"
        for index, half in enumerate(("gate_proj", "up_proj")):
            target = (local, slice(index * size, (index + 1) * size))
            gate_up.append(Part(f"{name}.{half}.weight", (width, hidden), (part, slice(0, hidden)), target))
        down.append(Part(f"{name}.down_proj.weight", (hidden, width), (slice(0, hidden), part), (local,)))
    yield _item(block.experts.gate_up, *gate_up)
    yield _item(block.experts.down, *down)


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _part(name: str, shape: tuple[int, ...], *, rows: slice | None = None, columns: slice | None = None) -> Part:
    """The whole tensor, or some of its rows, or some of its columns, filling a whole buffer."""
    source = [slice(0, size) for size in shape]
    if rows is not None:
        source[0] = rows
    if columns is not None:
        source[1] = columns
    return Part(name, shape, tuple(source), ())


def _item(weight: Weight, *parts: Part) -> LoadItem:
    return LoadItem((weight,), parts)


def _stacked(weight: Weight, *parts: Part) -> LoadItem:
    """Parts one below the other in the weight's rows."""
    placed: list[Part] = []
    start = 0
    for part in parts:
        stop = start + part.source[0].stop - part.source[0].start
        placed.append(Part(part.name, part.shape, part.source, (slice(start, stop),)))
        start = stop
    assert start == weight.shape[0]
    return LoadItem((weight,), tuple(placed))
