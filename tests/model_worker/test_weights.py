"""Loading: every file layout gives the same weights, and what is wrong with a folder is said in one clear error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.qwen3.harness import DENSE, MOE, load_model, make_checkpoint
from vibe_sgl_lite.model_worker import matrix_formats, weights
from vibe_sgl_lite.model_worker.cpu import load, slab_matrix
from vibe_sgl_lite.model_worker.cpu.slab_matrix import SlabMatrix
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.checkpoint import load_items
from vibe_sgl_lite.qwen3.layers.matrix import PlainMatrix
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight
from vibe_sgl_lite.qwen3.mlp import MLP
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig

CPU = torch.device("cpu")
PLAIN = torch.float16  # never packed on a CPU, so that what was loaded can be read back


def tensors(model: Qwen3) -> list[torch.Tensor]:
    return [weight.tensor for item in load_items(model) for weight in item.weights]


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_shards_equal_a_single_file(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = make_checkpoint(tmp_path / "single", shape)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    single, sharded = (
        tensors(load_model(tmp_path / "single", dtype=PLAIN)),
        tensors(load_model(tmp_path / "sharded", dtype=PLAIN)),
    )
    assert all(torch.equal(a, b) for a, b in zip(single, sharded, strict=True))


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE | {"tie_word_embeddings": True})
    model = load_model(tmp_path, dtype=PLAIN)
    assert model.head.weight.tensor.data_ptr() == model.embedding.weight.tensor.data_ptr()


def test_progress_is_told(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    seen: list[tuple[int, int]] = []
    model = Qwen3(ModelConfig.from_folder(tmp_path), ParallelState(), PLAIN, CPU, TorchOperations())
    load_weights(model, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1


def test_dummy_weights_are_seeded_and_random(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, MOE)
    config = ModelConfig.from_folder(tmp_path)

    def dummy(seed: int, parallel: ParallelState | None = None) -> Qwen3:
        model = Qwen3(config, parallel or ParallelState(), PLAIN, CPU, TorchOperations())
        load_dummy_weights(model, seed)
        return model

    first, again, other = dummy(0), dummy(0), dummy(1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert not torch.equal(first.embedding.weight.tensor, other.embedding.weight.tensor)
    assert 0.015 < first.embedding.weight.tensor.std() < 0.025
    assert torch.equal(first.norm.weight.tensor, torch.ones(64))
    rows = first.embedding.weight.tensor
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


@pytest.mark.parametrize("dummy", [False, True], ids=["files", "dummy"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 2), (4, 4)])
def test_slices_of_all_ranks_make_up_the_whole(tmp_path: Path, tp: int, ep: int, dummy: bool) -> None:
    make_checkpoint(tmp_path, MOE | {"num_hidden_layers": 2, "mlp_only_layers": [1]})
    config = ModelConfig.from_folder(tmp_path)

    def load(parallel: ParallelState) -> Qwen3:
        model = Qwen3(config, parallel, PLAIN, CPU, TorchOperations())
        if dummy:
            load_dummy_weights(model, 0)
        else:
            load_weights(model, tmp_path)
        return model

    group: Any = object()  # never used: nothing here communicates
    split = tp // ep
    whole = load(ParallelState())
    ranks = [
        load(
            ParallelState(
                rank=rank,
                tp=Group(rank, tp, group),
                ep=Group(rank // split, ep, group),
                expert_tp=Group(rank % split, split, group),
            )
        )
        for rank in range(tp)
    ]

    def joined(part: Callable[[Qwen3], torch.Tensor], dim: int) -> None:
        assert torch.equal(torch.cat([part(model) for model in ranks], dim), part(whole))

    def dense(model: Qwen3) -> MLP:
        block = model.layers[1].feed_forward
        assert isinstance(block, MLP)
        return block

    def moe(model: Qwen3) -> MoEBlock:
        block = model.layers[0].feed_forward
        assert isinstance(block, MoEBlock)
        return block

    joined(lambda model: model.embedding.weight.tensor, 0)
    joined(lambda model: model.head.weight.tensor, 0)
    joined(lambda model: model.layers[0].attention.output.weight.tensor, 1)
    joined(lambda model: dense(model).down.weight.tensor, 1)
    joined(lambda model: dense(model).gate_up.weight.tensor.view(2, -1, 64), 1)
    down = [moe(model).experts.down.tensor for model in ranks]
    experts = [torch.cat(down[i * split : (i + 1) * split], dim=2) for i in range(ep)]
    assert torch.equal(torch.cat(experts), moe(whole).experts.down.tensor)


@pytest.mark.parametrize("dummy", [False, True], ids=["files", "dummy"])
@pytest.mark.parametrize("rank", [None, 1], ids=["whole", "half"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_matrices_are_loaded_a_piece_at_a_time(
    tmp_path: Path, quantization: str, rank: int | None, dummy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the same bits as the whole ones; nothing but embedding and router is ever whole."""
    shape = MOE | {"mlp_only_layers": [1], "intermediate_size": 192, "moe_intermediate_size": 160}
    make_checkpoint(tmp_path, shape | {"tie_word_embeddings": quantization == "int4"})
    config = ModelConfig.from_folder(tmp_path)
    parallel = ParallelState()
    if rank is not None:
        group: Any = object()  # never used: nothing here communicates
        parallel = ParallelState(rank=rank, tp=Group(rank, 2, group), expert_tp=Group(rank, 2, group))
    kernels = load(threads=2)
    sizes: list[int] = []

    def loaded(install: Callable[[Qwen3], None]) -> Qwen3:
        model = Qwen3(config, parallel, torch.float32, CPU, TorchOperations())
        install(model)
        progress = sizes.append if install is in_pieces else None
        with monkeypatch.context() as patch:
            for source in (weights._DummySource, weights._Checkpoint):
                read = source.read

                def noted(self: Any, parts: Any, buffer: torch.Tensor, read: Any = read) -> None:
                    if progress is not None and len(buffer.shape) == 2:
                        progress(buffer.numel())
                    read(self, parts, buffer)

                patch.setattr(source, "read", noted)
            load_dummy_weights(model, 0) if dummy else load_weights(model, tmp_path)
        return model

    def in_pieces(model: Qwen3) -> None:
        choose_formats(model, quantization, kernels)

    def plain(model: Qwen3) -> None:
        for weight in matrix_formats._matrices(model):
            weight.keep_as(PlainMatrix)

    monkeypatch.setattr(slab_matrix, "BAND_ELEMENTS", 64 * 64)
    model, reference = loaded(in_pieces), loaded(plain)
    compared = 0
    for weight, other in zip(matrix_formats._matrices(model), matrix_formats._matrices(reference), strict=True):
        if isinstance(weight, ExpertWeight):
            pairs = [*zip(weight.matrices, other.tensor, strict=True)]
            form = weight._format
        else:
            pairs, form = [(weight.matrix, other.tensor)], weight.format
        for matrix, whole in pairs:
            assert isinstance(matrix, SlabMatrix)
            wanted = form(whole)
            assert isinstance(wanted, SlabMatrix)
            assert torch.equal(matrix.weights.data, wanted.weights.data)
            scales, wanted_scales = matrix.weights.scales, wanted.weights.scales
            assert (scales is None) == (wanted_scales is None)
            if scales is not None and wanted_scales is not None:
                assert torch.equal(scales, wanted_scales)
            compared += 1
    assert compared == 1 + 2 * 2 + 2 + 2 * 8
    ids, embedding = torch.arange(128), model.embedding.weight
    whole = reference.embedding.weight.rows(ids)
    assert torch.equal(embedding.rows(ids), embedding.format(whole).rows(ids).to(whole.dtype))
    elements = embedding.shape[0] * 64
    assert max(size for size in sizes if size != elements) <= 64 * 192  # 64 rows
    assert quantization == "none" or (elements in sizes) == (quantization == "int8")


def test_a_hub_cache_folder_loads(tmp_path: Path) -> None:
    """huggingface_hub keeps snapshots/<commit>/<file> as links into blobs/."""
    make_checkpoint(tmp_path / "real", DENSE)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.rename(tmp_path / "real" / name, blobs / name)
        os.symlink(Path("..") / ".." / "blobs" / name, snapshot / name)
    load_model(snapshot)
