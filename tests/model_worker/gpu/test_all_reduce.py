"""Sums over ranks that meet in each other's memory: processes of their own, their kernels interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.model_worker.gpu.peer_ranks import (
    CALLS,
    EPS,
    LAYOUT,
    NORMED,
    PAIRED,
    SENT,
    factors,
    inputs,
    residual_of,
    weight_of,
)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_are_those_of_torch_and_the_same_on_all_ranks(tmp_path: Path, ranks: int) -> None:
    for rank in range(ranks):
        (tmp_path / f"region-{rank}").write_bytes(bytes(LAYOUT.nbytes))
    command = [sys.executable, "-m", "tests.model_worker.gpu.peer_ranks"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(rank), str(ranks), str(tmp_path)], env=environment) for rank in range(ranks)
    ]
    try:
        assert [process.wait(300) for process in started] == [0] * ranks
    finally:
        for process in started:
            process.kill()
    results = [np.load(tmp_path / f"{rank}.npz") for rank in range(ranks)]
    gathered = torch.stack([inputs(rank, PAIRED[-1]).float() for rank in range(ranks)])
    assert all(np.array_equal(result["gathered"], gathered.numpy()) for result in results)
    for number, (_, _, kind, _) in enumerate(CALLS):
        parts = [inputs(rank, number).float() for rank in range(ranks)]
        if kind in SENT:
            parts = [x @ matrix.T for x, matrix in (factors(rank, number) for rank in range(ranks))]
        x = torch.stack(parts).sum(0)
        residual, gain = residual_of(number).float(), weight_of(number).float()
        if kind != "sum":
            residual = residual + x
        if kind in NORMED:
            x = F.rms_norm(residual, residual.shape[1:], gain, EPS)
        for name, expected in (("x", x), ("residual", residual)):
            if kind in ("add", "few sent") and name == "x":
                continue  # spent
            got = [result[f"{name}{number}"] for result in results]
            assert np.abs(got[0] - expected.numpy()).max() < (0.1 if number in PAIRED else 1e-5), (number, name)
            assert all(np.array_equal(other, got[0]) for other in got)
