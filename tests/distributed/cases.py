"""What the ranks of test_model_parallel.py run. One spawn runs all cases of a world size: starting ranks is slow."""

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests.qwen3.harness import DENSE, MOE, PagedRun, Row, load_model, random_tokens
from vibe_sgl_lite.model_worker.nodes import relay_group
from vibe_sgl_lite.model_worker.parallel import build_state
from vibe_sgl_lite.model_worker.rank_digest import RankDigest
from vibe_sgl_lite.model_worker.relay import INLINE_BYTES, BatchRelay
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind

SHAPES: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    "dense, replicated kv heads, tied": DENSE
    | {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "dense, odd vocabulary": DENSE | {"num_hidden_layers": 1, "vocab_size": 257, "tie_word_embeddings": True},
    "moe": MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "moe, not normalised": MOE | {"norm_topk_prob": False, "num_experts_per_tok": 3},
}
PROMPT = random_tokens(41)
# Rows of one step, 41 tokens in all: a count that no rank count divides. Then one decode row: fewer tokens than ranks.
STEPS = [[("a", 30), ("b", 11)], [("a", 10), ("b", 1)], [("a", 1)]]
FRAME_SIZES = [0, 1, 100, INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 0, 300_000, 5]
Variant = tuple[int, DispatchKind]


def folder_of(root: Path, name: str) -> Path:
    return root / name.replace(" ", "-").replace(",", "")


def variants(shape: dict[str, Any], world_size: int) -> list[Variant]:
    """Expert parallel degrees and dispatch paths to run `shape` with."""
    if "num_experts" not in shape:
        return [(1, "all_reduce")]
    degrees = [degree for degree in (1, 2, 4) if world_size % degree == 0]
    return [(degree, kind) for degree in degrees for kind in ("all_reduce", "all_to_all")]


def steps_logits(run: PagedRun) -> torch.Tensor:
    """Logits of all tokens of STEPS, this rank's part of the vocabulary."""
    rows = {"a": Row(PROMPT), "b": Row(random_tokens(12, seed=5))}
    return torch.cat([run.step([(rows[name], count) for name, count in step]) for step in STEPS])


def all_logits(rank: int, world_size: int, root: Path) -> list[str]:
    """Every shape in every variant, logits to <root>/<case>-<rank>.npy. Returns the addresses this rank listens on."""
    for name, shape in SHAPES.items():
        for ep, kind in variants(shape, world_size):
            parallel = build_state(rank, world_size, ep)
            model = load_model(folder_of(root, name), parallel=parallel, dispatch=kind)
            logits = steps_logits(PagedRun(model))
            np.save(root / f"{folder_of(root, name).name}-ep{ep}-{kind}-{rank}.npy", logits.numpy())
    sockets = psutil.Process().net_connections(kind="inet")
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]


def digest_verdicts(rank: int, world_size: int, root: Path) -> list[str]:
    """What RankDigest says of equal data, and of data that differ on the last rank."""
    digest = RankDigest(build_state(rank, world_size, 1).tp, torch.device("cpu"))
    said = []
    for step, data in ((6, b"same"), (7, b"same" if rank < world_size - 1 else b"other")):
        try:
            digest.check(step, "batch", data)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def relayed(rank: int, world_size: int, root: Path) -> list[str]:
    """Hex digests of what reaches the ranks other than 0 and 1 of frames of many lengths; rank 1 takes no part."""
    group = relay_group(2, world_size)
    if rank == 1:
        return []
    relay = BatchRelay(group)
    frames = [random.Random(size).randbytes(size) for size in FRAME_SIZES]
    if rank == 0:
        for frame in frames:
            relay.send(frame)
    else:
        frames = [relay.receive() for _ in frames]
    return [hashlib.sha256(frame).hexdigest() for frame in frames]
