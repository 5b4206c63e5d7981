"""Model folders for tests that need no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from vibe_sgl_lite.runtime.settings.checkpoint import tensor_shapes
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


def write_zeros(folder: Path) -> None:
    """A model.safetensors of bf16 zeros that fits the config.json in `folder`."""
    header, end = {}, 0
    for name, shape in tensor_shapes(ModelConfig.from_folder(folder)).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
