"""Checkpoints of each published quantised form, made of a plain one; and what they mean, as a plain one too.

    python -m tests.qwen3.quantised fp8 PLAIN_FOLDER NEW_FOLDER

The plain values come from codes, zeros and scales before they are packed, so that they are an oracle of the reader.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq-act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "gptq-v2": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2",
    },
    "gptq-int8": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": True},
}  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E4M3_MOST = 448.0


def make_quantised(form: str, plain: Path, folder: Path, meaning: Path) -> None:
    """Write `folder` in `form`, and to `meaning` the plain checkpoint (fp32) that it stands for."""
    config = json.loads((plain / "config.json").read_text())
    tensors, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj." not in name:
            tensors[name] = values[name] = tensor
            continue
        base = name.removesuffix(".weight")
        stored, values[name] = _fp8(tensor) if form == "fp8" else _groups(tensor, FORMS[form])
        tensors |= {base + suffix: part.contiguous() for suffix, part in stored.items()}
    for path, content, described in ((folder, tensors, {"quantization_config": FORMS[form]}), (meaning, values, {})):
        shutil.copytree(plain, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "config.json").write_text(json.dumps(config | described))
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})


def _fp8(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    outputs, inputs = matrix.shape
    codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-outputs // 128), -(-inputs // 128))
    values = torch.empty_like(matrix)
    for row in range(0, outputs, 128):
        for column in range(0, inputs, 128):
            block = matrix[row : row + 128, column : column + 128]
            scale = block.abs().max() / E4M3_MOST
            scales[row // 128, column // 128] = scale
            part = (block / scale).to(torch.float8_e4m3fn)
            codes[row : row + 128, column : column + 128] = part
            values[row : row + 128, column : column + 128] = part.float() * scale
    return {".weight": codes, ".weight_scale_inv": scales}, values


def _groups(matrix: Tensor, form: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Codes of `bits` bits with a scale and a zero for each output and group of inputs."""
    bits, size = form["bits"], form["group_size"]
    outputs, inputs = matrix.shape
    group_of = torch.arange(inputs) // size
    if form.get("desc_act"):
        group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    levels = (1 << bits) - 1
    scales, zeros = torch.empty(inputs // size, outputs), torch.empty(inputs // size, outputs, dtype=torch.int64)
    for group in range(inputs // size):
        part = matrix[:, group_of == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        scales[group] = ((high - low) / levels).half().float()
        zeros[group] = (-low / scales[group]).round().clamp(1, levels).long()
    codes = (matrix.t() / scales[group_of]).round().long() + zeros[group_of]
    codes = codes.clamp(0, levels)  # [I, O]
    values = ((codes - zeros[group_of]).float() * scales[group_of]).t().contiguous()
    stored = {".scales": scales.half()}
    if form["quant_method"] == "awq":
        stored |= {".qweight": _pack(codes, bits, AWQ_ORDER), ".qzeros": _pack(zeros, bits, AWQ_ORDER)}
    else:
        lowered = zeros - int(form.get("checkpoint_format") != "gptq_v2")
        plain_order = tuple(range(32 // bits))
        stored |= {
            ".qweight": _pack(codes.t(), bits, plain_order).t(),
            ".qzeros": _pack(lowered, bits, plain_order),
            ".g_idx": group_of.int(),
        }
    return stored, values


def _pack(codes: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """[n, m] -> [n, m x bits / 32] int32; `order` tells which of a word's codes takes which place."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // len(order), dtype=torch.int64)
    for place, which in enumerate(order):
        words |= codes[:, which :: len(order)] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


if __name__ == "__main__":
    name, source, target = sys.argv[1:]
    make_quantised(name, Path(source), Path(target), Path(target + "-plain"))
