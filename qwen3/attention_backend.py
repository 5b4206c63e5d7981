"""What the model asks of attention: one call a layer, over whatever cache the backend keeps.

A backend owns the layout of its cache and its metadata: what it wants to know of a step, made once outside the layers
(model_worker/device_batch.py says of what and when). The model never looks into the metadata; it hands them on.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vibe_sgl_lite.qwen3.layers.linear import TokenAttributes
from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.part_timer import PartTimer
from vibe_sgl_lite.qwen3.layers.rotary import RopeAngles


class AttentionBackend(Protocol):
    """Causal attention of one step's tokens over everything cached of their requests, the new tokens included.

    Norm, rotation, storing and attending are one call, so that a backend can fuse them.
    """

    def forward(
        self, layer: int, qkv: Tensor, query_norm: RMSNorm, key_norm: RMSNorm, angles: RopeAngles, metadata: Any
    ) -> Tensor:
        """Normalise queries and keys a head, rotate them, store keys and values, and attend.

        layer: from 0. qkv: [T, (heads + 2 x kv heads) x head_dim], queries, then keys, then values; it may be
        overwritten. Heads are this rank's, and query head h reads kv head h // (heads / kv heads). metadata: which
        request each token belongs to and where its cache lies, in the backend's own form.
        Returns [T, heads * head_dim] in qkv's dtype, scores scaled by head_dim ** -0.5. Reads nothing back from the
        device.
        """
        ...


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of one forward share. attributes: None where all tokens are plain."""

    angles: RopeAngles
    attention: AttentionBackend
    metadata: Any
    timer: PartTimer
    attributes: TokenAttributes | None = None
