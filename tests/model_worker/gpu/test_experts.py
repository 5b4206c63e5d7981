"""Routing and grouped products of the GPU kernels against the plain dispatch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.qwen3.harness import MOE, load_model, make_checkpoint
from tests.qwen3.quantised import make_quantised
from vibe_sgl_lite.model_worker.gpu import grouped_matrix
from vibe_sgl_lite.model_worker.gpu.block_experts import BlockExperts
from vibe_sgl_lite.model_worker.gpu.experts import FixedDispatch, GroupedDispatch
from vibe_sgl_lite.model_worker.gpu.kernels import experts as kernels
from vibe_sgl_lite.model_worker.matrix_formats import keep_as_codes
from vibe_sgl_lite.model_worker.weights import load_weights
from vibe_sgl_lite.qwen3.layers import matrix as formats
from vibe_sgl_lite.qwen3.layers.moe import MoEBlock
from vibe_sgl_lite.qwen3.layers.operations import TorchOperations
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import WeightsError
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


class NoProcessGroup(Group):
    """One of several ranks, for what needs none of the others."""

    def __post_init__(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    make_checkpoint(folder, MOE)
    return folder


@pytest.mark.parametrize(
    ("ranks", "split", "tokens"), [(1, "ep", 1), (2, "ep", 1), (1, "ep", 5), (2, "expert_tp", 5), (2, "ep", 37)]
)
def test_each_ranks_part_is_that_of_the_plain_dispatch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, ranks: int, split: str, tokens: int
) -> None:
    monkeypatch.setattr(formats, "can_pack", lambda *_: False)
    x = torch.randn((tokens, MOE["hidden_size"]), generator=torch.Generator().manual_seed(tokens))
    for rank in range(ranks):
        group = NoProcessGroup(rank, ranks)
        parallel = ParallelState(rank, tp=group, ep=group)
        if split == "expert_tp":
            parallel = ParallelState(rank, tp=group, expert_tp=group)
        block = load_model(folder, parallel=parallel).layers[0].feed_forward
        assert isinstance(block, MoEBlock)
        with torch.inference_mode():
            expected = block.dispatch.partial(x, block.router, block.experts, NO_TIMER)  # type: ignore[attr-defined]
            for matrix in (block.router.weight, block.experts.gate_up, block.experts.down):
                plain, matrix.device = matrix.tensor.to(device), device
                matrix.install(plain)
            got = GroupedDispatch(parallel, pdl=False).partial(x.to(device), block.router, block.experts, NO_TIMER)
        torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)
        assert got.abs().max() > 0.01


@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_sent_to_experts_come_back_as_from_the_plain_dispatch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, tokens: int
) -> None:
    """To the one rank that there is; to others: test_ranks.py."""
    monkeypatch.setattr(formats, "can_pack", lambda *_: False)
    x = torch.randn((tokens, MOE["hidden_size"]), generator=torch.Generator().manual_seed(tokens))
    block = load_model(folder).layers[0].feed_forward
    assert isinstance(block, MoEBlock)
    with torch.inference_mode():
        expected = block(x, NO_TIMER)
        for matrix in (block.router.weight, block.experts.gate_up, block.experts.down):
            plain, matrix.device = matrix.tensor.to(device), device
            matrix.install(plain)
        got = FixedDispatch(ParallelState(), pdl=False)(x.to(device), block.router, block.experts, NO_TIMER)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_route(normalize: bool, device: torch.device) -> None:
    scores = torch.randn((9, 12), device=device)
    scores[3, 5:8] = 7.0  # equals: the lowest two
    scores[4, 2] = float("nan")
    weights, experts = kernels.route(scores, 2, normalize=normalize, pdl=False)
    assert experts[3].tolist() == [5, 6]
    assert len(set(experts[4].tolist())) == 2
    assert weights[4].isnan().all()
    keep = [0, 1, 2, 5, 6, 7, 8]
    expected, chosen = torch.softmax(scores, 1).topk(2)
    if normalize:
        expected = expected / expected.sum(1, keepdim=True)
    assert experts[keep].tolist() == chosen[keep].tolist()
    torch.testing.assert_close(weights[keep], expected[keep])
    torch.testing.assert_close(weights[3], expected[3])


@pytest.mark.parametrize("dtype", [torch.float16])
def test_many_rows_of_few_experts(dtype: torch.dtype, device: torch.device) -> None:
    """Several tiles of one expert, none of most; widths that no tile divides."""
    generator = torch.Generator().manual_seed(1)
    tokens, hidden, inner, count = 45, 40, 24, 9
    x = (torch.randn((tokens, hidden), generator=generator) * 0.5).to(device, dtype)
    gate_up = (torch.randn((count, 2 * inner, hidden), generator=generator) * 0.2).to(device, dtype)
    down = (torch.randn((count, hidden, inner), generator=generator) * 0.2).to(device, dtype)
    experts = torch.tensor([[7, 2 + 3 * (token == 13)] for token in range(tokens)], dtype=torch.int32, device=device)
    weights = torch.rand((tokens, 2), generator=generator).to(device, dtype)
    tiles = kernels.ExpertTiles(16, (16, 16, 4, 2), (16, 16, 4, 2))
    got = kernels.run_experts(x, weights, experts, gate_up, down, 0, tiles, pdl=False)
    expected = torch.zeros((tokens, hidden), device=device)
    for token in range(tokens):
        for share, expert in zip(weights[token].float(), experts[token].tolist(), strict=True):
            gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
            expected[token] += share * (down[expert].float() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(got.float(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("ranks", "split"), [(1, "ep"), (2, "ep"), (2, "expert_tp")])
def test_published_fp8_experts_stay_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, ranks: int, split: str
) -> None:
    """And do what the values do that they stand for; in slices of whole blocks."""
    monkeypatch.setattr(formats, "can_pack", lambda *_: False)
    make_checkpoint(tmp_path / "source", MOE | {"hidden_size": 128, "moe_intermediate_size": 256})
    make_quantised("fp8", tmp_path / "source", tmp_path / "fp8", tmp_path / "plain")
    config = settle(ModelConfig.from_folder(tmp_path / "fp8"), tmp_path / "fp8")
    for rank in range(ranks):
        group = NoProcessGroup(rank, ranks)
        parallel = ParallelState(rank, tp=group, **{split: group})
        expected_block = load_model(tmp_path / "plain", parallel=parallel).layers[1].feed_forward
        model = Qwen3(config, parallel, torch.float32, device, TorchOperations())
        keep_as_codes(model, everything=False)
        load_weights(model, tmp_path / "fp8")
        block = model.layers[1].feed_forward
        assert isinstance(block, MoEBlock)
        assert isinstance(expected_block, MoEBlock)
        for matrix, plain in (
            (block.experts.gate_up, expected_block.experts.gate_up),
            (block.experts.down, expected_block.experts.down),
        ):
            assert isinstance(matrix.stack, BlockExperts)
            assert torch.equal(matrix.stack.plain(torch.float32).cpu(), plain.tensor)
            assert matrix.nbytes < plain.nbytes / 3.9
        for tokens in (1, 9):
            x = torch.randn((tokens, 128), generator=torch.Generator().manual_seed(tokens))
            with torch.inference_mode():
                expected = expected_block.dispatch.partial(  # type: ignore[attr-defined]
                    x, expected_block.router, expected_block.experts, NO_TIMER
                )
                got = GroupedDispatch(parallel, pdl=False).partial(x.to(device), block.router, block.experts, NO_TIMER)
            torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_code_that_is_no_number_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", MOE | {"hidden_size": 128, "moe_intermediate_size": 128})
    make_quantised("fp8", tmp_path / "source", tmp_path / "fp8", tmp_path / "plain")
    tensors, name = load_file(tmp_path / "fp8" / "model.safetensors"), "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name].view(torch.uint8)[5, 7] = 0xFF
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    config = settle(ModelConfig.from_folder(tmp_path / "fp8"), tmp_path / "fp8")
    model = Qwen3(config, ParallelState(), torch.float32, torch.device("cpu"), TorchOperations())
    keep_as_codes(model, everything=False)
    with pytest.raises(WeightsError, match="no numbers") as error:
        load_weights(model, tmp_path / "fp8")
    assert name in str(error.value)


@pytest.mark.parametrize(("capability", "stay"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_cards_without_e4m3_widen_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, stay: bool
) -> None:
    make_checkpoint(tmp_path / "source", MOE | {"hidden_size": 128, "moe_intermediate_size": 128})
    make_quantised("fp8", tmp_path / "source", tmp_path / "fp8", tmp_path / "plain")
    config = settle(ModelConfig.from_folder(tmp_path / "fp8"), tmp_path / "fp8")
    model = Qwen3(config, ParallelState(), torch.float32, torch.device("cpu"), TorchOperations())
    monkeypatch.setattr(model, "device", torch.device("cuda"))  # of which only the name is asked
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(grouped_matrix, "ProductScratch", lambda *_: None)
    keep_as_codes(model, everything=False)
    block = model.layers[0].feed_forward
    assert isinstance(block, MoEBlock)
    assert (block.experts.down.stack_format is BlockExperts) == stay


def test_experts_made_fp8_are_near_and_take_new_values(device: torch.device) -> None:
    first, second = torch.randn((2, 3, 256, 128), device=device)
    stack = BlockExperts.of(first)
    codes, scales = stack.codes, stack.scales
    assert (stack.plain(torch.float32) - first).abs().max() < 0.04 * first.abs().max()
    stack.refill(second)
    assert stack.codes is codes
    assert stack.scales is scales
    assert (stack.plain(torch.float32) - second).abs().max() < 0.04 * second.abs().max()
