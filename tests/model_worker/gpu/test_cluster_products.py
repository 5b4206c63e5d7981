"""Products by clusters of blocks: right in an emulator and on a card that has them, left out where there are none."""

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.model_worker.gpu.cluster_emulator import emulate
from tests.model_worker.gpu.test_fused_layers import weights_of
from vibe_sgl_lite.model_worker.gpu import driver
from vibe_sgl_lite.model_worker.gpu.driver import compile_source, has_clusters
from vibe_sgl_lite.model_worker.gpu.fused_layers import CLUSTERS, TILES, plan_tiles
from vibe_sgl_lite.model_worker.gpu.kernels.cluster_product import SHARED_MEMORY, ClusterTiles, ProductForm
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch, ProductTiles, added_product, normed_product

SHAPES = {"qkv": (4096, 1024), "output": (1024, 2048), "gate_up": (3072, 1024), "down": (1024, 3072)}  # of 0.6B
CUTS = [(name, tiles) for cuts in CLUSTERS.values() for name, tiles in cuts.items()]


def form_of(name: str, tiles: ClusterTiles) -> ProductForm:
    outputs, inputs = SHAPES[name]
    added = name in ("output", "down")
    return ProductForm(tiles, outputs, inputs, 0 if added else 16, added, name == "gate_up", torch.bfloat16)


def require_clusters(device: torch.device) -> None:
    """Skips on other cards alone: on a Hopper one they must be there."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper card")
    assert has_clusters(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", list(CLUSTERS))
def test_products_are_right(most: int, dtype: torch.dtype, device: torch.device) -> None:
    require_clusters(device)
    for name, tiles in CLUSTERS[most].items():
        outputs, inputs = SHAPES[name]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        for rows in (1, most // 2 + 5, most):
            matrix = torch.randn((outputs * (2 if name == "gate_up" else 1), inputs), **made) * inputs**-0.5
            x, gain = torch.randn((rows, inputs), **made), torch.rand(outputs, **made) + 0.5
            scratch, product = ProductScratch(device, 1, 1), x.double() @ matrix.double().T
            if name in ("output", "down"):
                stream = torch.randn((rows, outputs), **made)
                expected, gained = product + stream.double(), torch.full_like(stream, float("nan"))
                squares = torch.full((rows, outputs // tiles.outputs), float("nan"), device=device)
                for _ in range(2):  # the same bits again
                    again = stream.clone()
                    added_product(x, matrix, again, gain, gained, squares, tiles, scratch, pdl=True)
                    torch.testing.assert_close(again.double(), expected, atol=2e-2, rtol=1e-2)
                bits = stream.clone()
                added_product(x, matrix, bits, gain, gained, squares, tiles, scratch, pdl=True)
                assert torch.equal(bits, again)
                assert torch.equal(gained, (bits.float() * gain.float()).to(dtype))
                torch.testing.assert_close(squares.sum(1), bits.float().square().sum(1), atol=1e-3, rtol=1e-4)
                continue
            for parts in (2, 16):
                squares = torch.zeros((rows, parts), device=device)
                squares[:, parts // 2] = x.float().square().sum(1)
                normal = product * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-3)
                output = torch.full((rows, outputs), float("nan"), **made)
                silu = name == "gate_up"
                normed_product(x, squares, 1e-3, matrix, output, tiles, scratch, pdl=True, silu=silu)
                expected = F.silu(normal[:, :outputs]) * normal[:, outputs:] if silu else normal
                torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("rows", "tiles", "outputs", "inputs", "end"),
    [
        (21, ClusterTiles(16, 64, 4, 2), 128, 768, "add"),  # fewer stages than a block has steps
        (16, ClusterTiles(16, 128, 2, 8), 128, 256, "add"),  # two groups of warps
        (20, ClusterTiles(32, 32, 1, 3), 64, 512, "silu"),
        (9, ClusterTiles(16, 64, 2, 8), 64, 256, "silu"),
        (30, ClusterTiles(24, 64, 1, 2), 64, 256, "norm"),
    ],
)
def test_the_source_is_right(
    rows: int, tiles: ClusterTiles, outputs: int, inputs: int, end: str, tmp_path: Path
) -> None:
    """In an emulator of what it asks of a card."""
    add, silu, dtype = end == "add", end == "silu", torch.bfloat16
    x = torch.randn(rows, inputs).to(dtype)
    matrix = (torch.randn(outputs * (2 if silu else 1), inputs) * inputs**-0.5).to(dtype)
    product = x.double() @ matrix.double().T
    if add:
        stream, gain = torch.randn(rows, outputs).to(dtype), (torch.rand(outputs) + 0.5).to(dtype)
        expected, gained = product + stream.double(), torch.full_like(stream, float("nan"))
        squares = torch.full((rows, outputs // tiles.outputs), float("nan"))
        form = ProductForm(tiles, outputs, inputs, 0, True, False, dtype)
        emulate(form, tmp_path, x, matrix, stream, addend=stream, gain=gain, gained=gained, new_squares=squares)
        torch.testing.assert_close(stream.double(), expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(gained, (stream.float() * gain.float()).to(dtype))
        torch.testing.assert_close(squares.sum(1), stream.float().square().sum(1), atol=1e-3, rtol=1e-4)
        return
    parts = 2 if end == "norm" else 16
    squares, output = torch.zeros(rows, parts), torch.full((rows, outputs), float("nan")).to(dtype)
    squares[:, 1] = x.float().square().sum(1)
    emulate(
        ProductForm(tiles, outputs, inputs, parts, False, silu, dtype),
        tmp_path,
        x,
        matrix,
        output,
        squares=squares,
        eps=1e-3,
    )
    normal = product * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-3)
    expected = F.silu(normal[:, :outputs]) * normal[:, outputs:] if silu else normal
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    try:
        driver._nvrtc()
    except OSError as error:
        pytest.skip(str(error))
    for source in {form_of(name, tiles).source() for name, tiles in CUTS}:
        assert compile_source(source).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="undefined_thing"):
        compile_source("undefined_thing")


def test_cuts_fit_the_card() -> None:
    for name, tiles in CUTS:
        form = form_of(name, tiles)
        assert tiles.fits(form.outputs, form.inputs)
        assert f"#define RING {form.ring}\n" in form.source()
        assert form.shared_bytes <= SHARED_MEMORY


def test_a_plan_has_clusters_only_where_they_fit() -> None:
    weights = weights_of("0.6B")
    for (most, plain), (_, chosen), (_, tiles) in zip(
        plan_tiles(weights), plan_tiles(weights, clusters=True), TILES, strict=True
    ):
        assert plain == tiles
        for name in SHAPES:
            assert getattr(chosen, name) == CLUSTERS[most].get(name, getattr(plain, name))
    assert plan_tiles(weights, fixed_order=True, clusters=True) == plan_tiles(weights, fixed_order=True)
    wide = weights_of("8B")
    assert plan_tiles(wide, clusters=True) == plan_tiles(wide)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A card that there is not. What torch and the driver did with it; the driver loads nothing without a context."""
    did = list[str]()

    class Driver:
        def cuModuleLoadData(self, *_: Any) -> int:
            did.append("load")
            return 0 if "context" in did else 201  # CUDA_ERROR_INVALID_CONTEXT

        def __getattr__(self, name: str) -> Any:
            return lambda *_: 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("context"))
    monkeypatch.setattr(driver, "_driver", Driver)
    monkeypatch.setattr(driver, "_compiled", lambda source: b"")
    has_clusters.cache_clear()
    yield did
    has_clusters.cache_clear()


def test_a_card_is_asked_once_it_has_a_context(hopper: list[str]) -> None:
    assert has_clusters(torch.device("cuda", 7))
    assert hopper == ["context", "load"]


def test_other_cards_and_those_without_a_compiler_keep_tritons_products(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: str) -> bytes:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(driver, "_compiled", missing)
    assert not has_clusters(torch.device("cuda", 7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert not has_clusters(torch.device("cuda", 8))
    assert not has_clusters(torch.device("cpu"))


class NoCompiler:
    """Has a version and nothing else."""

    def nvrtcVersion(self, *_: Any) -> int:
        return 0


def test_a_source_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = list[str]()

    def compile_now(source: str) -> bytes:
        compiled.append(source)
        return source.upper().encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "_nvrtc", NoCompiler)
    monkeypatch.setattr(driver, "compile_source", compile_now)
    for source in ("one", "two", "one"):
        assert driver._compiled(source) == source.upper().encode()
    assert compiled == ["one", "two"]
    files = list((tmp_path / "vibe-sgl-lite").iterdir())
    assert sorted(file.read_bytes() for file in files) == [b"ONE", b"TWO"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_without_a_cache_folder_a_source_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vibe_sgl_lite.model_worker.kernel_cache.cache_folders", lambda: iter([tmp_path / "file"]))
    monkeypatch.setattr(driver, "_nvrtc", NoCompiler)
    monkeypatch.setattr(driver, "compile_source", lambda source: b"binary")
    assert driver._compiled("source") == b"binary"
    assert "compiled at every start: there is no cache folder" in caplog.text


def test_a_launch_tells_the_driver_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes, cluster, early start and arguments, as a driver that runs nothing gets them."""
    launched, maps = list[Any](), list[Any]()

    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 0

        def cuTensorMapEncodeTiled(self, at: Any, number: int, rank: int, address: Any, *rest: Any) -> int:
            maps.append([number, rank, *(list(part) for part in rest[:4])])
            return 0

        def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
            told = config._obj
            rows = ctypes.cast(arguments[8], ctypes.POINTER(ctypes.c_int)).contents.value
            attributes = {told.attributes[i].id: list(told.attributes[i].value[:3]) for i in range(2)}
            launched.append((list(told.grid), told.block[0], attributes, rows))
            return 0

    monkeypatch.setattr(driver, "_driver", Driver)
    monkeypatch.setattr(driver, "_compiled", lambda source: b"")
    stream: Any = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    x, matrix = torch.zeros((20, 1024), dtype=torch.bfloat16), torch.zeros((512, 1024), dtype=torch.bfloat16)
    output, squares = torch.zeros((20, 256), dtype=torch.bfloat16), torch.zeros((20, 16))
    tiles = ClusterTiles(16, 32, 2, 4)
    normed_product(x, squares, 1e-6, matrix, output, tiles, ProductScratch(x.device, 1, 1), pdl=True, silu=True)
    assert maps == [
        [9, 2, [1024, 20], [2048], [64, 16], [1, 1]],
        [9, 2, [1024, 512], [2048], [64, 32], [1, 1]],
    ]
    assert launched == [([8, 2, 2], 160, {4: [1, 1, 2], 6: [1, 0, 0]}, 20)]
    assert isinstance(tiles, ClusterTiles)
    assert not isinstance(tiles, ProductTiles)
