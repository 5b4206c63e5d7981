"""With `fixed_order`, a sequence's logits have the same bits whatever it is cut into and whatever runs beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.qwen3.harness import DENSE, PagedRun, Row, load_model, make_checkpoint, random_tokens
from vibe_sgl_lite.model_worker.compute import kernel_compute
from vibe_sgl_lite.model_worker.cpu import load
from vibe_sgl_lite.model_worker.cpu.targets import runnable_targets

LENGTH = 150
# The best that this machine can execute, as it is built for use; and the others.
BEST, *OTHERS = [target.name for target in runnable_targets()]
FORMATS = [
    pytest.param(torch.bfloat16, "none", id="bf16"),
    pytest.param(torch.float32, "none", id="fp32", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, "int8", id="int8", marks=pytest.mark.slow),
    pytest.param(torch.float32, "int8", id="int8-fp32", marks=pytest.mark.slow),
]
TARGETS = [BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def surrounded(run: PagedRun, tokens: list[int], seed: int, largest: int, most_others: int = 20) -> torch.Tensor:
    """[LENGTH, vocabulary]: in chunks of any size up to `largest`, beside other rows that come and go."""
    rng = np.random.default_rng(seed)
    row, others, logits = Row(list(tokens)), list[Row](), []
    while row.computed < LENGTH:
        while len(others) < rng.integers(0, most_others):
            others.append(Row(rng.integers(0, 256, int(rng.integers(1, 90))).tolist()))
        count = min(int(rng.integers(1, largest + 1)), LENGTH - row.computed)
        beside = [(one, min(int(rng.choice([1, 1, 1, 2, 5, 30])), len(one.tokens) - one.computed)) for one in others]
        rows = [(row, count), *beside]
        place = int(rng.integers(0, len(rows)))
        rows[0], rows[place] = rows[place], rows[0]
        first = sum(number for _, number in rows[:place])
        logits.append(run.step(rows)[first : first + count].clone())
        for one in [one for one in others if one.computed == len(one.tokens)]:
            run.free_pages += one.pages
            others.remove(one)
    for one in (row, *others):
        run.free_pages += one.pages
    return torch.cat(logits)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_bits_are_the_same_in_any_surroundings(
    tmp_path: Path, target: str, dtype: torch.dtype, quantization: str
) -> None:
    make_checkpoint(tmp_path, DENSE)
    kernels = load(target=target, fixed_order=True)
    assert kernels is not None
    compute = kernel_compute(kernels)
    model = load_model(tmp_path, dtype=dtype, compute=compute, quantization=quantization)
    run = PagedRun(model, num_pages=1024, compute=compute)
    tokens = random_tokens(LENGTH)
    alone = surrounded(run, tokens, 0, 1, most_others=1)
    for seed, largest in ((1, 1), (2, 3), (3, 9), (4, 40), (5, LENGTH)):
        assert torch.equal(surrounded(run, tokens, seed, largest), alone)
