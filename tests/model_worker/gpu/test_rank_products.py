"""How a rank's products of published shapes are cut: wholly, and within the memory that is there for splits."""

import pytest
import torch
import triton

from benchmarks.internal.rank_products import NAMES, sides
from benchmarks.parallel_gpu import SHAPES
from vibe_sgl_lite.model_worker.gpu.rank_products import MOST_ROWS, MOST_SILU_ROWS, PLACES, choose_cut


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("shape", ["0.6B", "4B", "8B", "32B"])
def test_cuts_fit(shape: str, ranks: int) -> None:
    for name in NAMES:
        outputs, inputs = sides(name, SHAPES[shape], ranks)
        silu, taken = name == "gate_up", 0
        for rows in (1, 5, 16, 17, 32, 33, 64, 128, 129):
            cut = choose_cut(rows, outputs, inputs, torch.bfloat16, silu=silu)
            if cut is None:
                continue
            taken = rows
            assert rows <= cut.rows
            assert outputs % cut.width == 0
            assert inputs % cut.inputs == 0
            assert cut.splits <= inputs // cut.inputs
            blocks = outputs // cut.width
            assert cut.outputs == triton.next_power_of_2(cut.width)
            assert cut.splits == 1 or (not silu and blocks * cut.splits <= 2 * PLACES)
        if inputs % 128 == 0 and outputs % 64 == 0:
            assert taken == (MOST_SILU_ROWS if silu else MOST_ROWS)


def test_float32_has_a_cut_for_small_matrices() -> None:
    cut = choose_cut(3, 96, 64, torch.float32, silu=False)
    assert cut is not None
    assert cut.splits == 1


@pytest.mark.parametrize(("ranks", "rows"), [(2, 33), (2, 64), (4, 64)])
def test_gate_and_up_of_64_rows_run_all_at_once(ranks: int, rows: int) -> None:
    outputs, inputs = sides("gate_up", SHAPES["32B"], ranks)
    cut = choose_cut(rows, outputs, inputs, torch.bfloat16, silu=True)
    assert cut is not None
    assert outputs // cut.width <= PLACES
