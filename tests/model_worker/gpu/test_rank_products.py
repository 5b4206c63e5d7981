"""How a rank's products of published shapes are cut: wholly, and within the memory that is there for splits."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import triton

from benchmarks.internal.rank_products import NAMES, sides
from benchmarks.parallel_gpu import SHAPES
from tests.model_worker.gpu.test_cluster_products import require_clusters
from vibe_sgl_lite.model_worker.gpu import driver
from vibe_sgl_lite.model_worker.gpu.driver import compile_source
from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import Layout, Outbox, all_reduce
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import ClusterTiles, ProductForm, cluster_product
from vibe_sgl_lite.model_worker.gpu.rank_products import (
    MOST_ROWS,
    MOST_SILU_ROWS,
    PLACES,
    choose_clusters,
    choose_cut,
)


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


def cluster_forms(ranks: int) -> Iterator[tuple[str, ProductForm]]:
    """Of the 32B shape's products that are by clusters, by names."""
    for name in NAMES:
        outputs, inputs = sides(name, SHAPES["32B"], ranks)
        cut = choose_clusters(MOST_ROWS, outputs, inputs, torch.bfloat16, silu=name == "gate_up")
        if cut is not None:
            sent = ranks if name in ("output", "down") else 0
            yield name, ProductForm(cut, outputs, inputs, 0, False, name == "gate_up", torch.bfloat16, sent)


def test_clusters_of_two_ranks_are_all_at_once() -> None:
    forms = dict(cluster_forms(2))
    assert list(forms) == list(NAMES)
    for form in forms.values():
        assert form.outputs // form.tiles.width * form.tiles.splits == 128
        assert f"#define SPAN {form.tiles.span}\n" in form.source()  # which is checked when it is made
    assert forms["output"].ring < forms["down"].ring


@pytest.mark.parametrize("shape", ["0.6B", "4B", "8B"])
def test_shapes_that_were_not_measured_have_no_clusters(shape: str) -> None:
    for name in NAMES:
        outputs, inputs = sides(name, SHAPES[shape], 2)
        assert choose_clusters(MOST_ROWS, outputs, inputs, torch.bfloat16, silu=name == "gate_up") is None


def test_more_rows_and_other_numbers_have_no_clusters() -> None:
    assert choose_clusters(MOST_ROWS + 1, 5120, 5120, torch.bfloat16, silu=False) is None
    assert choose_clusters(MOST_ROWS, 5120, 5120, torch.float32, silu=False) is None
    assert choose_clusters(MOST_ROWS, 5120, 5120, torch.float16, silu=False) is None  # which is not sent


@pytest.mark.slow
def test_clusters_compile() -> None:
    try:
        driver._nvrtc()
    except OSError as error:
        pytest.skip(str(error))
    for ranks in (2, 4):
        for _, form in cluster_forms(ranks):
            assert compile_source(form.source()).startswith(b"\x7fELF")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 16, 64])
def test_clusters_are_right(rows: int, device: torch.device) -> None:
    require_clusters(device)
    for name, form in cluster_forms(2):
        matrix = torch.randn((form.outputs * (2 if form.silu else 1), form.inputs), device=device).bfloat16()
        matrix *= form.inputs**-0.5
        x = torch.randn((2, rows, form.inputs), device=device).bfloat16()
        if form.ranks:
            check_sent(x, matrix, form.tiles)
            continue
        output = torch.full((rows, form.outputs), float("nan"), dtype=torch.bfloat16, device=device)
        cluster_product(x[0], matrix, output, form.tiles, pdl=True, silu=form.silu)
        expected = x[0].float() @ matrix.float().T
        if form.silu:
            expected = F.silu(expected[:, : form.outputs]) * expected[:, form.outputs :]
        assert (output.float() - expected).norm() / expected.norm() < 1e-2, name


def check_sent(x: torch.Tensor, matrix: torch.Tensor, tiles: ClusterTiles) -> None:
    """Two ranks on one card, one after the other: their sum is that of what both multiplied, time and again."""
    layout, (_, rows, _), columns = Layout(1 << 20, 1 << 20, 2), x.shape, len(matrix)
    regions = torch.zeros((2, layout.nbytes), dtype=torch.uint8, device=x.device)
    addresses = torch.tensor([region.data_ptr() for region in regions], device=x.device)
    calls = torch.zeros((2, 1), dtype=torch.int64, device=x.device)
    part, gain = x.new_empty((rows, columns)), x.new_ones(columns)
    for turn in range(3):
        for rank in range(2):
            cluster_product(
                x[rank] * (turn + 1), matrix, part, tiles, pdl=True, outbox=Outbox(addresses, calls[rank], layout, rank)
            )  # fmt: skip
        expected = (x[0] * (turn + 1)).float() @ matrix.float().T + (x[1] * (turn + 1)).float() @ matrix.float().T + 0.5
        for rank in range(2):
            residual = torch.full_like(part, 0.5)
            all_reduce(
                part, addresses, calls[rank], layout, rank, pdl=True, sent=True, beside=True, residual=residual,
                weight=gain, eps=1e-6,
            )  # fmt: skip
            assert (residual.float() - expected).norm() / expected.norm() < 1e-2
            torch.testing.assert_close(part.float(), F.rms_norm(residual.float(), (columns,)), atol=0.05, rtol=0.02)
    assert not regions[:, layout.words : layout.numbered].any()  # all were read
