"""Whether all ranks got the same batch and drew the same tokens, for --debug-rank-digest."""

import hashlib

import torch

from vibe_sgl_lite.qwen3.layers.parallel_state import Group

DIGEST_BYTES = 8


class RankDigest:
    """Compares bytes over the ranks of `group`. All ranks call `check` in the same order."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device

    def check(self, step: int, what: str, data: bytes) -> None:
        """One small collective. Raises RuntimeError, on every rank, naming the step and the ranks that differ from
        rank 0, when `data` is not the same on all of them. what: what `data` is, for the message."""
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), "little", signed=True)
        mine = torch.tensor([digest], dtype=torch.int64, device=self._device)
        digests: list[int] = self._group.all_gather(mine).tolist()
        odd = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if odd:
            raise RuntimeError(
                f"ranks disagree in step {step}: the {what} of rank {', '.join(odd)} is not that of rank 0"
            )
