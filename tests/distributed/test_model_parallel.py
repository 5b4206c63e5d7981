"""Logits at tensor and expert parallel degrees 1, 2, 4 and their mixes equal transformers', over real Gloo groups."""

from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.cases import PROMPT, SHAPES, folder_of, variants
from tests.distributed.spawn import run_ranks
from tests.qwen3.harness import make_checkpoint, random_tokens, reference_logits


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_equal_transformers(tmp_path: Path, world_size: int) -> None:
    references = {name: make_checkpoint(folder_of(tmp_path, name), shape) for name, shape in SHAPES.items()}
    listening = run_ranks("tests.distributed.cases:all_logits", world_size, tmp_path)
    for name, shape in SHAPES.items():
        a = reference_logits(references[name], PROMPT)
        b = reference_logits(references[name], random_tokens(12, seed=5))
        expected = torch.cat([a[:30], b[:11], a[30:40], b[11:], a[40:]])
        for ep, kind in variants(shape, world_size):
            stem = f"{folder_of(tmp_path, name).name}-ep{ep}-{kind}"
            parts = [np.load(tmp_path / f"{stem}-{rank}.npy") for rank in range(world_size)]
            assert np.abs(np.concatenate(parts, axis=1) - expected.numpy()).max() < 1e-4, stem
    assert all(ip_address(address).is_loopback for addresses in listening for address in addresses)
