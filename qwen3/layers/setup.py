"""What all layers of one rank's model are made for."""

from dataclasses import dataclass

import torch

from vibe_sgl_lite.qwen3.layers.norm import RMSNorm
from vibe_sgl_lite.qwen3.layers.operations import LayerOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


@dataclass(frozen=True)
class Setup:
    """operations: what runs between the matrix products."""

    config: ModelConfig
    parallel: ParallelState
    operations: LayerOperations
    dtype: torch.dtype
    device: torch.device

    def norm(self, size: int) -> RMSNorm:
        return RMSNorm(size, self.config.rms_norm_eps, self.dtype, self.device)
