"""Kernels of several GPUs and of experts, in graphs, checked before they are timed; one JSON line last.

    python benchmarks/internal/gpu_parallel.py collectives --ranks 2
    python benchmarks/internal/gpu_parallel.py experts

collectives: a sum over the ranks in bf16 by NCCL, through symmetric memory, and that with residual and norm behind it;
read_norm_us is the last one with few rows read from the others as many are, not sent.
experts: one layer of the 30B-A3B shape on one GPU, in bf16 and in blocks of fp8, by number of tokens, with the tiles
that the engine chooses and some others; the floor is the bytes of the experts that were touched, in bf16, or their
products, at the card's measured rates.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_parallel.py` finds the package

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

WIDTHS, ROWS = (1024, 2560, 4096, 5120), (1, 16, 64, 256, 2048)
IN_A_GRAPH, ROUNDS = 20, 15
HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def in_graph_us(work: Callable[[], Any], count: int = IN_A_GRAPH) -> float:
    """Median microseconds of one `work` of `count` in a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(count):
            work()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return float(statistics.median(times))


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def collectives(rank: int, ranks: int, store: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """One rank of them."""
    import torch.distributed as dist

    from vibe_sgl_lite.model_worker.gpu.collectives import PeerMemory
    from vibe_sgl_lite.model_worker.parallel import init_parallel, join_peers

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    alone = init_parallel(rank, ranks, 1, device, store).tp
    group = join_peers(init_state(alone), device).tp
    peers, results = group.peers, list[dict[str, Any]]()
    for width in widths:
        for rows in ROWS:
            generator = torch.Generator(device).manual_seed(rank)
            given = (torch.randn((rows, width), device=device, generator=generator) * 0.1).bfloat16()
            total = given.float()
            dist.all_reduce(total)
            x, residual, weight = given.clone(), torch.zeros_like(given), torch.ones(width, device=device).bfloat16()
            result: dict[str, Any] = {"rows": rows, "width": width}
            result["nccl_us"] = in_graph_us(partial(alone.all_reduce, x))
            if isinstance(peers, PeerMemory):
                assert peers.takes(x)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    peers.all_reduce(x)
                for _ in range(3):  # of replays, each over what it is given anew
                    x.copy_(given)
                    graph.replay()
                    result["error"] = max(result.get("error", 0.0), difference(x, total))
                result["symmetric_us"] = in_graph_us(partial(peers.all_reduce, x))
                x.copy_(given)
                residual.fill_(0.5)
                norm = partial(peers.all_reduce_add_norm, x, residual, weight, 1e-6, sent=False)
                norm()
                expected = F.rms_norm((total + 0.5).bfloat16().float(), (width,))
                result["norm_error"] = difference(x, expected)
                result["symmetric_norm_us"] = in_graph_us(
                    partial(peers.all_reduce_add_norm, x, residual, weight, 1e-6, sent=False)
                )
                if given.nbytes <= peers.layout.small:
                    layout, peers.layout = peers.layout, replace(peers.layout, small=0)
                    result["read_norm_us"] = in_graph_us(
                        partial(peers.all_reduce_add_norm, x, residual, weight, 1e-6, sent=False)
                    )
                    peers.layout = layout
                gathered = peers.all_gather(given)
                if gathered is not None:
                    expected = torch.empty_like(gathered)
                    dist.all_gather_into_tensor(expected, given)
                    assert torch.equal(gathered, expected)
                    result["gather_us"] = in_graph_us(partial(peers.all_gather, given))
                same = [torch.empty_like(x) for _ in range(ranks)]
                dist.all_gather(same, x)
                assert all(torch.equal(other, x) for other in same)
            if isinstance(peers, PeerMemory):
                result |= sent_product(peers, given, residual, weight, rank)
            results.append(result)
            if rank == 0:
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}, flush=True)
    torch.cuda.synchronize()
    dist.barrier()
    return results


def sent_product(peers: Any, given: Tensor, residual: Tensor, weight: Tensor, rank: int) -> dict[str, float]:
    """A product that sends itself and the sum behind it, and both one after the other."""
    import torch.distributed as dist

    from vibe_sgl_lite.model_worker.gpu.kernels.gemv import gemv
    from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch
    from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import rank_product
    from vibe_sgl_lite.model_worker.gpu.rank_products import choose_cut

    (rows, width), inputs = given.shape, 4096
    cut = choose_cut(rows, width, inputs, given.dtype, silu=False)
    if cut is None or not peers.outbox.takes(given.numel(), given.dtype):
        return {}
    generator = torch.Generator(given.device).manual_seed(100 + rank)
    x = torch.randn((rows, inputs), device=given.device, generator=generator).bfloat16()
    matrices = torch.randn((4, width, inputs), device=given.device, generator=generator).bfloat16() / inputs**0.5
    scratch, output, number = ProductScratch(given.device, 1 << 21, 1 << 9), torch.empty_like(given), 0
    total = x.float() @ matrices[0].float().T
    dist.all_reduce(total)
    residual.fill_(0.5)

    def many(sends: bool) -> None:
        nonlocal number
        box = peers.outbox if sends else None
        rank_product(x, matrices[number % 4], output, cut, scratch, pdl=True, outbox=box)
        peers.all_reduce_add_norm(output, residual, weight, 1e-6, sent=sends)
        number += 1

    def few(sends: bool) -> None:
        nonlocal number
        box = peers.outbox if sends else None
        gemv(x, matrices[number % 4], output, pdl=True, block=2, warps=4, outbox=box)
        peers.all_reduce_add(output, residual, sent=sends)
        number += 1

    result = dict[str, float]()
    for name, work in [("", many), ("few_", few)] if rows <= 4 else [("", many)]:
        residual.fill_(0.5)
        number = 0
        work(True)
        error = difference(residual, total + 0.5)
        assert error < 1e-2, (name, error)
        result |= {
            f"{name}sent_us": in_graph_us(partial(work, True)),
            f"{name}unsent_us": in_graph_us(partial(work, False)),
        }
        result[f"{name}sent_error"] = error
    return result


def init_state(group: Any) -> Any:
    from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState

    return ParallelState(group.rank, tp=group, expert_tp=group)


def run_ranks(ranks: int, widths: Sequence[int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "collectives", "--ranks", str(ranks), "--store", f"{folder}/store"]
        command += ["--widths", ",".join(map(str, widths))]
        others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, ranks)]
        try:
            return collectives(0, ranks, Path(folder) / "store", widths)
        finally:
            for other in others:
                other.kill()


def plain_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As torch has it: a sort, two grouped products and what lies between."""
    flat = experts.flatten().long()
    order = torch.argsort(flat, stable=True)
    ends = torch.zeros(EXPERTS, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ends.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // TOP_K], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
    rows = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    scaled = rows * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // TOP_K, scaled)


def candidates(tokens: int) -> list[Any]:
    from vibe_sgl_lite.model_worker.gpu.kernels.experts import ExpertTiles, choose_expert_tiles

    chosen = choose_expert_tiles(tokens, TOP_K, EXPERTS, torch.bfloat16)
    few = [
        ExpertTiles(16, (16, 256, 4, 3), (32, 256, 4, 3)),
        ExpertTiles(16, (64, 128, 4, 3), (64, 256, 4, 2)),
        ExpertTiles(16, (32, 256, 8, 3), (64, 128, 4, 4)),
    ]
    some = [
        ExpertTiles(32, (64, 128, 4, 3), (128, 128, 4, 3)),
        ExpertTiles(32, (64, 64, 4, 4), (64, 64, 4, 5)),
        ExpertTiles(64, (32, 128, 4, 3), (64, 128, 4, 3)),
    ]
    many = [
        ExpertTiles(64, (64, 64, 4, 4), (64, 128, 4, 3)),
        ExpertTiles(64, (128, 64, 8, 3), (128, 64, 4, 4)),
        ExpertTiles(128, (128, 64, 8, 3), (128, 64, 8, 3)),
        ExpertTiles(128, (64, 64, 4, 4), (256, 64, 8, 3)),
    ]
    mean = tokens * TOP_K / EXPERTS
    others = few if mean <= 4 else some if mean <= 20 else many
    return [chosen, *(tiles for tiles in others if tiles != chosen)]


def coded_candidates(tokens: int) -> list[Any]:
    from vibe_sgl_lite.model_worker.gpu.kernels.experts import ExpertTiles

    few = [
        ExpertTiles(16, (32, 128, 4, 6), (64, 128, 4, 6)),
        ExpertTiles(16, (64, 128, 4, 5), (128, 128, 4, 4)),
        ExpertTiles(16, (32, 128, 8, 5), (64, 128, 8, 5)),
        ExpertTiles(16, (64, 128, 8, 4), (128, 128, 8, 4)),
    ]
    many = [ExpertTiles(64, (64, 128, 4, 3), (128, 128, 8, 3)), ExpertTiles(64, (128, 128, 8, 3), (128, 128, 8, 3))]
    mean = tokens * TOP_K / EXPERTS
    return [*(tiles for tiles in candidates(tokens) if fits_blocks(tiles)), *(few if mean <= 20 else many)]


def fits_blocks(tiles: Any) -> bool:
    return all(128 % side == 0 for part in (tiles.gate_up, tiles.down) for side in part[:2])


def compile_all() -> None:
    """A process for each number of tokens, all at once: compiling is what takes long."""
    command = [sys.executable, __file__, "experts", "--only-compile"]
    started = [subprocess.Popen([*command, str(tokens)]) for tokens in TOKENS]
    for process in started:
        process.wait()


def compile_experts(tokens: int) -> None:
    from vibe_sgl_lite.model_worker.gpu.block_experts import BlockExperts
    from vibe_sgl_lite.model_worker.gpu.kernels.experts import route, run_experts

    gate_up = torch.zeros(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16)
    down = torch.zeros(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(tokens, HIDDEN, device="cuda").bfloat16()
    coded = BlockExperts.of(gate_up), BlockExperts.of(down)
    scales = coded[0].scales, coded[1].scales
    weights, chosen = route(torch.randn(tokens, EXPERTS, device="cuda").bfloat16(), TOP_K, normalize=True, pdl=True)
    for tiles in candidates(tokens):
        with contextlib.suppress(Exception):  # told when they are timed
            run_experts(x, weights, chosen, gate_up, down, 0, tiles, pdl=True)
    for tiles in coded_candidates(tokens):
        with contextlib.suppress(Exception):
            run_experts(x, weights, chosen, coded[0].codes, coded[1].codes, 0, tiles, pdl=True, scales=scales)


def experts() -> list[dict[str, Any]]:
    from benchmarks.gpu_offline import measure_card
    from vibe_sgl_lite.model_worker.gpu.block_experts import BlockExperts
    from vibe_sgl_lite.model_worker.gpu.kernels.experts import route, run_experts

    card = measure_card()
    print(card, flush=True)
    compile_all()
    gate_up = (torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda") * 0.02).bfloat16()
    down = (torch.randn(EXPERTS, HIDDEN, INNER, device="cuda") * 0.02).bfloat16()
    coded = BlockExperts.of(gate_up), BlockExperts.of(down)
    flush = torch.empty(96 << 20, dtype=torch.uint8, device="cuda")  # else the experts of few tokens stay in the L2
    empty_us = in_graph_us(flush.zero_, 8)
    results = []
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        scores = torch.randn(tokens, EXPERTS, device="cuda").bfloat16()
        weights, chosen = route(scores, TOP_K, normalize=True, pdl=True)
        expected = plain_experts(x, weights, chosen, gate_up, down)
        touched = len(torch.unique(chosen))
        read = touched * 3 * HIDDEN * INNER * 2 / card["read_gb_s"] / 1e3
        products = tokens * TOP_K * 6 * HIDDEN * INNER / card["gemm_tflop_s"] / 1e6
        result: dict[str, Any] = {"tokens": tokens, "touched": touched, "floor_us": max(read, products)}
        tried = [("", tiles) for tiles in candidates(tokens)] + [("fp8_", tiles) for tiles in coded_candidates(tokens)]
        for form, tiles in tried:
            matrices = (coded[0].codes, coded[1].codes) if form else (gate_up, down)
            scales = (coded[0].scales, coded[1].scales) if form else None

            def layer(
                tiles: Any = tiles, x: Tensor = x, scores: Tensor = scores, matrices: Any = matrices,
                scales: Any = scales,
            ) -> Tensor:  # fmt: skip
                flush.zero_()
                weights, chosen = route(scores, TOP_K, normalize=True, pdl=True)
                return run_experts(x, weights, chosen, matrices[0], matrices[1], 0, tiles, pdl=True, scales=scales)

            try:
                error = difference(layer(), expected)
                us = in_graph_us(layer, 8) - empty_us
            except Exception as problem:  # noqa: BLE001 - tiles that the card has no room for
                print(tokens, tiles, repr(problem)[:200], flush=True)
                continue
            assert error < (0.1 if form else 2e-2), (tokens, tiles, error)
            result.setdefault(f"{form}tiles", {})[str(tiles)] = us
            result.setdefault(f"{form}us", us)
            result.setdefault(f"{form}error", error)

        def plain(x: Tensor = x, w: Tensor = weights, c: Tensor = chosen) -> Tensor:
            flush.zero_()
            return plain_experts(x, w, c, gate_up, down)

        result["torch_us"] = in_graph_us(plain, 8) - empty_us
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collectives", "experts"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only-compile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    if options.rank is not None:
        collectives(options.rank, options.ranks, options.store, widths)
        return
    if options.only_compile is not None:
        compile_experts(options.only_compile)
        return
    results = experts() if options.what == "experts" else run_ranks(options.ranks, widths)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
