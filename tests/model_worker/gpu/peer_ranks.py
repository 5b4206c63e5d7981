"""One of several ranks whose regions are files that all of them map: what a card's peers are, on a machine without one.

    python -m tests.model_worker.gpu.peer_ranks RANK RANKS FOLDER

Does the sums of CALLS, one after another, and leaves what came of them in FOLDER/RANK.npz.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vibe_sgl_lite.model_worker.gpu.kernels.all_reduce import CALL, Layout, Outbox, all_gather, all_reduce
from vibe_sgl_lite.model_worker.gpu.kernels.gemv import gemv
from vibe_sgl_lite.model_worker.gpu.kernels.product import ProductScratch
from vibe_sgl_lite.model_worker.gpu.kernels.rank_product import ProductCut, rank_product

LAYOUT = Layout(1 << 15, 1024, 4)
EPS = 1e-6
INNER = 64  # of the products that are sent
CUTS = (ProductCut(16, 16, 16, 3, 4, 2, span=12), ProductCut(16, 16, 16, 1, 4, 2, matrix_first=True))
# Rows, columns, what is done and whether in two steps; many programs and few in turn.
CALLS = [
    (1, 48, "sum", False),
    (5, 48, "norm", False),
    (1, 48, "norm", False),
    (7, 96, "add", True),
    (9, 48, "norm", True),
    (2, 96, "sum", True),
    (6, 96, "sum", False),
    (5, 48, "sent", False),
    (3, 96, "sent", False),
    (2, 48, "few sent", False),
    (2, 96, "few sent", False),
    (3, 48, "norm", False),
]
SENT = ("sent", "few sent")
NORMED = ("norm", "sent")
PAIRED = (len(CALLS) - 4, len(CALLS) - 2, len(CALLS) - 1)  # in bfloat16


def inputs(rank: int, number: int) -> torch.Tensor:
    rows, columns, _, _ = CALLS[number]
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(100 * number + rank))
    return x.bfloat16() if number in PAIRED else x


def factors(rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a matrix, whose product is what this rank adds to a call of a product that is sent. In float32: the
    interpreter multiplies no bfloat16."""
    rows, columns, _, _ = CALLS[number]
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn((rows, INNER), generator=generator), torch.randn((columns, INNER), generator=generator) / 8


def residual_of(number: int) -> torch.Tensor:
    return inputs(99, number)


def weight_of(number: int) -> torch.Tensor:
    return inputs(98, number)[0].abs() + 0.5


def main(rank: int, ranks: int, folder: Path) -> None:
    regions = [torch.from_file(str(folder / f"region-{peer}"), shared=True, size=LAYOUT.nbytes, dtype=torch.uint8)
               for peer in range(ranks)]  # fmt: skip
    addresses = torch.tensor([region.data_ptr() for region in regions])
    calls = torch.tensor([((1 << 32) - 3) * CALL.value])  # more calls than 32 bits count
    results: dict[str, Any] = {}
    outbox, scratch = Outbox(addresses, calls, LAYOUT, rank), ProductScratch(calls.device, 5 * 96 * 3, 8)
    for number, (_, _, kind, two_shot) in enumerate(CALLS):
        x, residual = inputs(rank, number), residual_of(number)
        if kind == "few sent":
            gemv(*factors(rank, number), x, pdl=False, block=16, warps=4, outbox=outbox)
        elif kind == "sent":
            rank_product(*factors(rank, number), x, CUTS[number % 2], scratch, pdl=False, outbox=outbox)
        all_reduce(
            x, addresses, calls, LAYOUT, rank, pdl=False, two_shot=two_shot, sent=kind in SENT,
            beside=kind == "sent", eps=EPS,
            residual=None if kind == "sum" else residual, weight=weight_of(number) if kind in NORMED else None,
        )  # fmt: skip
        results |= {f"x{number}": x.float().numpy(), f"residual{number}": residual.float().numpy()}
        if number == PAIRED[-1]:
            gathered = x.new_empty((ranks, *x.shape))
            all_gather(inputs(rank, number), gathered, addresses, calls, LAYOUT, rank, pdl=False)
            results["gathered"] = gathered.float().numpy()
    np.savez(folder / f"{rank}.npz", **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
