"""Which steps of published shapes run as five kernels a layer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.internal.rank_products import sides
from benchmarks.parallel_gpu import SHAPES
from vibe_sgl_lite.model_worker.gpu.fused_layers import ANY_ROWS, FusedLayers, LayerWeights, plan_tiles
from vibe_sgl_lite.model_worker.gpu.layers import GpuLayers


def weights_of(shape: str) -> LayerWeights:
    (qkv, hidden), (_, heads), (inner, _), _ = (
        sides(name, SHAPES[shape], 1) for name in ("qkv", "output", "gate_up", "down")
    )
    each = ((qkv, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner))
    norm: Any = None
    qkv_matrix, output, gate_up, down = (torch.empty(sizes, dtype=torch.bfloat16, device="meta") for sizes in each)
    return LayerWeights(qkv_matrix, output, gate_up, down, norm, norm, norm, norm)


@pytest.mark.parametrize(("shape", "most"), [("0.6B", 256), ("8B", 16), ("4B", 0), ("32B", 0)])
def test_rows(shape: str, most: int) -> None:
    planned = plan_tiles(weights_of(shape))
    assert max((rows for rows, _ in planned), default=0) == most
    fixed = plan_tiles(weights_of(shape), fixed_order=True)
    assert [rows for rows, _ in fixed] == ([ANY_ROWS] if most else [])


def test_more_rows_run_layer_by_layer() -> None:
    attention: Any = SimpleNamespace(fixed_order=False)
    weights = weights_of("8B")
    fused = FusedLayers([weights], plan_tiles(weights), attention)
    ran = list[str]()

    def layer(update: torch.Tensor, *_: Any) -> torch.Tensor:
        ran.append("layer")
        return update

    class Fused:
        most_rows = fused.most_rows

        def __call__(self, update: torch.Tensor, context: Any) -> torch.Tensor:
            ran.append("fused")
            return update

    stub: Any = Fused()
    both: Any = [layer, layer]
    layers = GpuLayers(both, [], stub, attention, None)
    context: Any = SimpleNamespace(metadata=SimpleNamespace(chain_tiles=None, chunks=None))
    for rows in (16, 17):
        update = torch.zeros(rows, 4)
        layers(update, update, context)
    assert ran == ["fused", "layer", "layer"]
