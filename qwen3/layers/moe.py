"""The mixture-of-experts feed-forward block: a router, merged expert weights, and two ways to bring tokens to experts.

Shapes: T tokens, H hidden size, K experts a token, E experts, P (token, expert) pairs. Experts are split over the EP
group; each expert's intermediate dimension over the expert-TP group. Every path sorts pairs by expert and runs one
matmul an expert (one grouped matmul on a GPU); nothing loops over tokens.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from vibe_sgl_lite.qwen3.layers.linear import TokenAttributes
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState, shard
from vibe_sgl_lite.qwen3.layers.part_timer import OTHER, PartTimer
from vibe_sgl_lite.qwen3.layers.setup import Setup
from vibe_sgl_lite.qwen3.layers.weight import ExpertWeight, MatrixWeight

DispatchKind = Literal["all_reduce", "all_to_all"]


class Router:
    """Chooses experts: softmax in fp32 over all of them, the K largest, or over these alone if the config renormalises,
    which is the same.
    """

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.weight = MatrixWeight(config.num_experts, config.hidden_size, setup.dtype, setup.device)

    def __call__(self, x: Tensor, timer: PartTimer) -> tuple[Tensor, Tensor]:
        """[T, H] -> weights [T, K] in x's dtype, expert ids [T, K] int64."""
        timer.mark("router")
        scores = self.weight.multiply(x)
        timer.mark(OTHER)
        if self.normalize:
            chosen, experts = torch.topk(scores, self.top_k, dim=-1)
            weights = torch.softmax(chosen, dim=-1, dtype=torch.float32)
        else:
            probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
            weights, experts = torch.topk(probabilities, self.top_k, dim=-1)
        return weights.to(x.dtype), experts


class Experts:
    """This rank's experts, SwiGLU each, over rows already sorted by expert."""

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        self.operations = setup.operations
        self.ids = shard(config.num_experts, setup.parallel.ep)
        self.count = self.ids.stop - self.ids.start
        part = shard(config.moe_intermediate_size, setup.parallel.expert_tp)
        width = part.stop - part.start
        self.gate_up = ExpertWeight(self.count, 2 * width, config.hidden_size, setup.dtype, setup.device)
        self.down = ExpertWeight(self.count, config.hidden_size, width, setup.dtype, setup.device)

    def __call__(self, x: Tensor, counts: Tensor, timer: PartTimer) -> Tensor:
        """x: [P, H] sorted by local expert, counts: [local experts] int64 -> [P, H], partial over expert-TP."""
        timer.mark("gate_up")
        gate_up = self.gate_up.multiply_grouped(x, counts)
        timer.mark("silu")
        activated = self.operations.silu_multiply(gate_up)
        timer.mark("down")
        output = self.down.multiply_grouped(activated, counts)
        timer.mark(OTHER)
        return output


class ExpertDispatch(Protocol):
    """Routes the tokens of one layer through the experts of all ranks. Input and output [T, H] are replicated."""

    def __call__(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor: ...


class AllReduceDispatch:
    """Every rank has every token: it runs those that chose its experts, and one all-reduce adds up the parts.

    One collective of T x H a layer, whatever the routing: best for few tokens and few ranks.
    """

    def __init__(self, parallel: ParallelState) -> None:
        self.group = parallel.tp

    def __call__(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        return self.group.all_reduce(self.partial(x, router, experts, timer))

    def partial(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        """This rank's part of the sum, [T, H]."""
        weights, expert_ids = router(x, timer)
        local = expert_ids.flatten() - experts.ids.start
        local = torch.where((local >= 0) & (local < experts.count), local, experts.count)
        order = torch.argsort(local, stable=True)  # pairs of other ranks' experts sort to the end
        counts = _count(local, experts.count + 1)[: experts.count]
        if _reads_are_free(x):
            order = order[: int(counts.sum())]
            rows = experts(x[order // router.top_k], counts, timer)
        else:  # they stay, and count for nothing: only the device knows how many they are
            elsewhere = (local[order] == experts.count)[:, None]
            rows = experts(x[order // router.top_k], counts, timer).masked_fill_(elsewhere, 0)
        return _combine(rows, order, weights)


class AllToAllDispatch:
    """Each EP rank takes an equal part of the tokens and sends their rows only to the ranks whose experts they chose.

    Two exchanges of the routed rows and one all-gather of the result: best for many tokens over many ranks.
    """

    def __init__(self, parallel: ParallelState) -> None:
        self.ep = parallel.ep
        self.expert_tp = parallel.expert_tp

    def __call__(self, x: Tensor, router: Router, experts: Experts, timer: PartTimer) -> Tensor:
        num_tokens = x.shape[0]
        part = -(-num_tokens // self.ep.size)
        mine = x[self.ep.rank * part : (self.ep.rank + 1) * part]  # shorter or empty on the last ranks
        weights, expert_ids = router(mine, timer)
        flat = expert_ids.flatten()
        order = torch.argsort(flat, stable=True)  # experts lie on the EP ranks in order, so this also sorts by rank

        # counts_sent[r, e]: pairs for expert e of rank r; counts_received[r, e]: pairs of rank r for our expert e.
        counts_sent = _count(flat, self.ep.size * experts.count).view(self.ep.size, experts.count)
        ones = [1] * self.ep.size
        counts_received = self.ep.all_to_all(counts_sent, ones, ones)
        send_rows: list[int] = counts_sent.sum(dim=1).tolist()
        receive_rows: list[int] = counts_received.sum(dim=1).tolist()

        received = self.ep.all_to_all(mine[order // router.top_k], send_rows, receive_rows)
        local = torch.arange(experts.count, device=x.device).repeat(self.ep.size)
        by_expert = torch.argsort(local.repeat_interleave(counts_received.flatten()), stable=True)
        rows = torch.empty_like(received)
        rows[by_expert] = experts(received[by_expert], counts_received.sum(dim=0), timer)
        returned = self.ep.all_to_all(rows, receive_rows, send_rows)

        output = x.new_zeros((part, x.shape[1]))
        output[: mine.shape[0]] = _combine(returned, order, weights)
        return self.ep.all_gather(self.expert_tp.all_reduce(output))[:num_tokens]


def _reads_are_free(x: Tensor) -> bool:
    """Whether the host may look at numbers on x's device without waiting for it."""
    return x.device.type == "cpu"


def _count(values: Tensor, below: int) -> Tensor:
    """int64 [below]: how often each number is among `values`, int64. As torch.bincount, which waits for the device."""
    return values.new_zeros(below).scatter_add_(0, values, torch.ones_like(values))


def _combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's expert outputs.

    rows: [P, H], output of pair order[i] (token order[i] // K); pairs that are missing count as zero.
    weights: [T, K]. Returns [T, H]. Needs no atomics, so the order of additions never changes.
    """
    num_tokens, top_k = weights.shape
    pairs = rows.new_zeros((num_tokens * top_k, rows.shape[1]))
    pairs[order] = rows
    return torch.bmm(weights.unsqueeze(1), pairs.view(num_tokens, top_k, rows.shape[1])).squeeze(1)


class MoEBlock:
    """[T, H] -> [T, H], the same on every rank. dispatch: every rank must choose the same."""

    def __init__(self, setup: Setup, dispatch: DispatchKind) -> None:
        self.router = Router(setup)
        self.experts = Experts(setup)
        kind = AllToAllDispatch if dispatch == "all_to_all" else AllReduceDispatch
        self.dispatch: ExpertDispatch = kind(setup.parallel)

    def __call__(self, x: Tensor, timer: PartTimer, attributes: TokenAttributes | None = None) -> Tensor:
        """attributes: experts do not depend on them."""
        return self.dispatch(x, self.router, self.experts, timer)
