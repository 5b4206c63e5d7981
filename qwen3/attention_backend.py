"""What the model asks of attention: one call a layer, over whatever cache the backend keeps.

The model never looks into the metadata; it hands the step's metadata from its caller to the backend.
"""

from typing import Any, Protocol

from torch import Tensor


class AttentionBackend(Protocol):
    """Causal attention of one step's tokens over everything cached of their requests, the new tokens included."""

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor:
        """Store `key` and `value` and attend.

        layer: from 0. query: [T, heads, head_dim]; key, value: [T, kv heads, head_dim]; heads are this rank's, and
        query head h reads kv head h // (heads / kv heads). metadata: which request each token belongs to and where its
        cache lies, in the backend's own form. Returns [T, heads * head_dim] in query's dtype.
        """
        ...
