"""Trains the dense or the MoE model on the synthetic corpus, on a CPU or a GPU, and saves a checkpoint.

    python -m examples.tiny_model.train --kind dense --tokenizer FOLDER --output FOLDER [--max-seconds 420]

The forward pass runs in bfloat16 on weights rounded to bfloat16, exactly what is saved; AdamW updates a float32 copy.
With --steps alone a run is a function of its seed; with --max-seconds the learning rate follows the clock, so that the
run ends in time with its rate decayed.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from examples.tiny_model.checkpoint import Kind, new_model, save_checkpoint
from examples.tiny_model.corpus import pack

# (tokens in a row, share of the steps): short rows begin a context afresh, long ones teach to ignore or use the past.
ROW_LENGTHS = ((128, 0.45), (256, 0.31), (1024, 0.15), (4096, 0.08), (16384, 0.01))

WARM_UP = 0.02
SAVE_EVERY_SECONDS = 150
LOG_EVERY_STEPS = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows. Shapes: ids [rows, length]; positions, targets and weights [tokens with a loss].

    `positions` index the flattened rows: the place whose next token is the target.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Batches(Dataset[Batch]):
    """Step number -> that step's batch, the same for the same seed in any process."""

    def __init__(self, tokenizer: Tokenizer, seed: int, steps: int, tokens_per_step: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._steps = steps
        self._tokens_per_step = tokens_per_step

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        lengths = [length for length, _ in ROW_LENGTHS if length <= self._tokens_per_step]
        shares = [share for length, share in ROW_LENGTHS if length <= self._tokens_per_step]
        length = Random(f"length:{self._seed}:{step}").choices(lengths, shares)[0]
        rows = pack(self._tokenizer, f"{self._seed}:{step}", self._tokens_per_step // length, length)
        ids = torch.frombuffer(rows.ids, dtype=torch.int32).view(rows.count, rows.length).long()
        weights = torch.frombuffer(rows.weights, dtype=torch.float32).view(rows.count, rows.length).clone()
        weights[:, 0] = 0.0  # nothing predicts a row's first token
        ends = weights.flatten().nonzero().squeeze(1)
        return Batch(ids, ends - 1, ids.flatten()[ends], weights.flatten()[ends])


class MasterWeights:
    """A float32 copy of a bfloat16 model's weights, updated by AdamW and rounded back after every step."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes its float32 copy from the model's present weights, on their device."""
        self._rounded: list[torch.Tensor] = list(model.parameters())
        self._masters = [weight.detach().float() for weight in self._rounded]
        matrices = [master for master in self._masters if master.dim() > 1]
        vectors = [master for master in self._masters if master.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        fused = self._masters[0].is_cuda
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=fused)

    def step(self, rate: float) -> None:
        """One update with learning rate `rate` from the model's gradients, clipped to norm 1; clears them."""
        for master, weight in zip(self._masters, self._rounded, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._rounded, self._masters)


def loss_of(model: PreTrainedModel, batch: Batch, moe: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss to minimise, and the cross-entropy alone of tokens with full weight, for the log."""
    outputs = model.model(input_ids=batch.ids, use_cache=False, **({"output_router_logits": True} if moe else {}))
    hidden = outputs.last_hidden_state.flatten(0, 1)[batch.positions]
    losses = F.cross_entropy(model.lm_head(hidden).float(), batch.targets, reduction="none")
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    if moe:
        config = model.config
        balance = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok)
        loss = loss + config.router_aux_loss_coef * balance
    full = (batch.weights == 1.0).float()
    return loss, ((losses * full).sum() / full.sum()).detach()


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to 0 at `progress` 1."""
    if progress < WARM_UP:
        return peak * (progress / WARM_UP + 1e-3)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def train(arguments: argparse.Namespace) -> None:
    """Trains and saves as the command line says."""
    kind: Kind = arguments.kind
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    device = torch.device(arguments.device)
    model = new_model(kind, tokenizer, arguments.seed)
    if arguments.start_from:
        weights = AutoModelForCausalLM.from_pretrained(arguments.start_from, dtype=torch.bfloat16)
        model.load_state_dict(weights.state_dict())
    model.train()
    torch.nn.Module.to(model, device)
    count = sum(parameter.numel() for parameter in model.parameters())
    _log(f"{kind}: {count:,} parameters on {device}")
    masters = MasterWeights(model)
    batches = Batches(tokenizer, arguments.seed, arguments.steps, arguments.tokens_per_step)
    started = saved = time.monotonic()
    for step, batch in enumerate(_load(batches, arguments.workers, device)):
        elapsed = time.monotonic() - started
        progress = max(step / arguments.steps, elapsed / arguments.max_seconds)
        if progress >= 1.0:
            break
        loss, answers = loss_of(model, batch, moe=kind == "moe")
        torch.autograd.backward(loss)
        masters.step(learning_rate(progress, arguments.peak_rate))
        if step % LOG_EVERY_STEPS == 0:
            _log(
                f"{kind}: step {step} {100 * progress:.1f}% loss {loss.item():.4f} answers {answers.item():.5f} "
                f"{elapsed:.0f} s {step * arguments.tokens_per_step / max(elapsed, 1e-9):,.0f} tok/s"
            )
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            save_checkpoint(model, kind, tokenizer, arguments.output)
            saved = time.monotonic()
    save_checkpoint(model, kind, tokenizer, arguments.output)
    _log(f"{kind}: {step + 1} steps, saved to {arguments.output}")


def _load(batches: Batches, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches in step order, made by `workers` processes ahead of time, moved to the device."""
    loader = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    for batch in loader:
        moved = [
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (batch.ids, batch.positions, batch.targets, batch.weights)
        ]
        yield Batch(*moved)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["dense", "moe"], default="dense")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=14_000, help="at most this many steps (default 14,000)")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="end cleanly within this time (default off)"
    )
    parser.add_argument("--tokens-per-step", type=int, default=32_768, help="default 32,768")
    parser.add_argument("--workers", type=int, default=2, help="processes that write the corpus (default 2)")
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate (default 2e-3)")
    parser.add_argument("--start-from", type=Path, help="checkpoint whose weights to go on from (default: random ones)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
